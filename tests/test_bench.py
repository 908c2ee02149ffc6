"""The benchmark's own rules: no timing of a wrong result, contenders in turn, reasons for what is missing, honest shortfalls."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import rlhf_fast
from rlhf_fast.bench import engine, machine, peers, render, traffic
from rlhf_fast.bench.command import all_cases, chosen, main
from rlhf_fast.bench.engine import OURS, Case, GateError, Row, run
from rlhf_fast.cli import main as cli

LIMITS = machine.Machine("test", 1, "scalar", {}, read=1e9, copy=2e9, exp=1e9, gemm={"float32": 1e9})


def double(x):
    return (2 * x["x"],)


def case(**changes) -> Case:
    made = Case(
        "toy",
        "[4]",
        lambda: {"x": torch.arange(4.0)},
        {OURS: double, "eager": lambda x: (x["x"] + x["x"],)},
        lambda x: (2 * x["x"].double(),),
        memory=False,
        seconds=0.05,
    )
    return replace(made, **changes)


def test_every_op_has_rows():
    assert {c.op for c in all_cases()} == set(rlhf_fast.backends())


def test_a_wrong_result_is_never_timed():
    wrong = case(contenders={OURS: lambda x: (2.001 * x["x"],), "eager": double})
    with pytest.raises(GateError, match=r"toy \[4\]: result 0 is wrong"):
        run(wrong, LIMITS)


def test_a_contender_that_changes_its_input_is_found():
    with pytest.raises(GateError, match="changed its input x"):
        run(case(contenders={OURS: double, "careless": lambda x: (x["x"].mul_(2),)}), LIMITS)


def test_a_contender_that_fails_or_is_missing_is_a_reason_in_the_row():
    def fails(x):
        raise RuntimeError("no such\nkernel")

    row = run(case(contenders={OURS: double, "broken": fails, "absent": "not installed"}), LIMITS)
    assert row.missing == {"broken": "RuntimeError: no such kernel", "absent": "not installed"} and not row.ratios
    assert "broken: not here (RuntimeError: no such kernel)" in render.text_row(row)


def test_another_result_is_marked_and_ours_failing_is_an_error():
    row = run(case(contenders={OURS: double, "half": lambda x: (x["x"],)}), LIMITS)
    assert row.different == ["half"] and row.errors["half"] == 0.5
    with pytest.raises(ZeroDivisionError):
        run(case(contenders={OURS: lambda x: 1 / 0}), LIMITS)


def test_ratios_follow_the_clock_and_aims_that_are_missed_are_named():
    def slow(x):
        return (sum(2 * x["x"] / 200 for _ in range(200)),)

    row = run(case(contenders={OURS: double, "slow": slow}, bars={"slow": 2.0, "absent": 5.0}), LIMITS)
    assert row.ratios["slow"] > 10 and row.shortfalls == []
    row = run(case(bars={"eager": 1e6, "limit": 2.0}, limit=lambda m: 1e-12), LIMITS)
    assert [line.split(", ")[1] for line in row.shortfalls] == ["aim 1000000.00", "aim 2"]


def test_the_limit_is_memory_or_arithmetic_whichever_takes_longer():
    assert LIMITS.seconds(read=1e9) == pytest.approx(1.0)
    assert LIMITS.seconds(read=1e9, written=1e9) == pytest.approx(1.0)  # a copy moves both at its own rate
    assert LIMITS.seconds(read=1e9, exps=3e9) == pytest.approx(3.0)


def test_peak_memory_sees_what_a_call_allocates_and_frees():
    def call():
        return torch.ones(64 * 2**18).sum()  # 64 MiB, gone when it returns

    assert 60 * 2**20 < engine.peak_extra_bytes(call) < 90 * 2**20
    assert engine.peak_extra_bytes(lambda: None) < 8 * 2**20


def test_traffic_counts_every_kernel_once_and_our_ops_as_one_pass():
    rows, vocab = 64, 1000
    counts = {(c.name, "backward" in c.shape): c for c in traffic.audit(rows, vocab, torch.float32)}
    logits = rows * vocab * 4
    ours = counts["rlhf_fast", False]
    assert ours.launches == 1 and logits < ours.moved < 1.1 * logits and ours.peak < 0.1 * logits
    both = counts["rlhf_fast", True]
    assert 3 * logits <= both.moved < 3.2 * logits and logits <= both.peak < 1.1 * logits
    assert counts["eager", False].moved > 5 * logits and counts["eager", True].peak > 3 * logits
    assert "| rlhf_fast |" in traffic.table(list(counts.values()))


def test_traffic_of_single_operators():
    x = torch.empty(10, 100, device="meta")
    with traffic.Traffic() as seen:
        y = x + 1
        z = y.t()  # a view
        z.zero_()
    assert (seen.read, seen.written, seen.launches) == (4000, 8000, 2)
    assert traffic.touched(torch.empty(10, 1).expand(10, 100)) == 40


def test_limits_of_this_machine_are_positive_and_told(native):
    found = machine.measure()
    assert min(found.read, found.copy, found.exp, *found.gemm.values()) > 1e8
    assert found.isa == native.isa() and "GB/s" in "\n".join(found.lines())


def test_patterns_choose_rows_and_a_pattern_without_one_is_an_error():
    assert {c.op for c in chosen(["gae", "reward_loss 64*"])} == {"gae", "reward_loss"}
    assert len(chosen(["reward_loss 64*"])) == 1
    with pytest.raises(ValueError, match=r"no case matches 'gea'; ops: advantages, gae"):
        chosen(["gea"])


def test_peers_that_are_not_installed_are_reasons(monkeypatch):
    assert (
        peers.attempt(lambda: __import__("no_such_library")) == "ModuleNotFoundError: No module named 'no_such_library'"
    )


def test_the_command_measures_writes_and_reports(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    files = {name: str(tmp_path / name) for name in ("out.json", "out.md", "out.png")}
    done = main(
        [
            *("reward_loss 64*", "gae [[]64*", "--seconds", "0.05", "--json", files["out.json"]),
            *("--markdown", files["out.md"], "--plot", files["out.png"], "--readme", str(readme)),
        ]
    )
    assert done == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert {row["op"] for row in document["rows"]} == {"gae", "reward_loss"} and document["failed"] == []
    assert all(row["milliseconds"][OURS] > 0 for row in document["rows"])
    assert "2 rows, 0 wrong" in capsys.readouterr().out
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| `gae`" in text
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_a_wrong_result_makes_the_command_fail(monkeypatch, capsys):
    from rlhf_fast.bench import command

    monkeypatch.setattr(command, "all_cases", lambda: iter([case(contenders={OURS: lambda x: (x["x"],)})]))
    assert main(["toy"]) == 1
    assert "WRONG  toy [4]: result 0 is wrong" in capsys.readouterr().err


def test_the_command_line_has_it(capsys):
    assert cli(["bench", "nothing"]) != 0
    assert "no case matches 'nothing'" in capsys.readouterr().err


def test_a_readme_without_marks_is_refused(tmp_path):
    (tmp_path / "x.md").write_text("text")
    with pytest.raises(ValueError, match="has no <!-- bench -->"):
        render.into_readme(tmp_path / "x.md", "table")


def test_memory_columns_and_shares_appear_where_they_are_known():
    row = Row(
        "op",
        "x",
        {OURS: 2.0, "TRL": 8.0},
        {"TRL": 4.0},
        {OURS: 1e-7, "TRL": 1e-7},
        {},
        [],
        {OURS: 2**20, "TRL": 2**21},
        1.0,
    )
    assert row.share == 0.5
    assert "| 2 | 50 % | TRL 4 x | 1 / 2 |" in render.markdown(LIMITS, [row])
