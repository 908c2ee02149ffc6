"""The benchmark's own rules: no timing of a wrong result, contenders in turn, reasons for what is missing, honest shortfalls."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import pytest
import torch

import rlhf_fast
from rlhf_fast.bench import audit, engine, inductor, machine, peers, render, scale, scale_render, traffic
from rlhf_fast.bench.cases import linear_token_logprobs as heads
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


def test_a_small_value_of_the_wrong_size_counts_where_errors_are_relative():
    def off(x):
        return (2 * x["x"] + torch.tensor([0.0, 1e-6, 0.0, 0.0]),)

    row = run(case(contenders={OURS: double, "off": off}, relative=1e-7), LIMITS)
    assert row.errors == {OURS: 0.0, "off": pytest.approx(5e-7, rel=0.1)}
    run(case(contenders={OURS: off}), LIMITS)  # 2e-7 of the largest value
    with pytest.raises(GateError, match="result 0 is wrong"):
        run(case(contenders={OURS: off}, relative=1e-7), LIMITS)


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
    counts = {(c.name, "backward" in c.shape): c for c in audit.from_logits(rows, vocab, torch.float32)}
    logits, vector, ids = rows * vocab * 4, rows * 4, rows * 8
    ours = counts["rlhf_fast", False]
    assert ours.launches == 1 and logits < ours.moved < 1.1 * logits and ours.peak < 0.1 * logits
    both = counts["rlhf_fast", True]
    assert 3 * logits <= both.moved < 3.2 * logits and logits <= both.peak < 1.1 * logits
    # log_softmax r w; gather of a vector; exp r w; times 2r w; sum r; minus, of vectors
    assert counts["eager", False].moved == 8 * logits + (ids + 3 * vector) + vector + 2 * vector - vector
    assert counts["eager", False].launches == 6 and 3 * logits <= counts["eager", False].peak < 3.1 * logits
    assert counts["eager", True].peak > 3 * logits
    table = traffic.table("what", list(counts.values()))
    assert "| rlhf_fast |" in table and "TFLOP" not in table


@pytest.fixture
def meta():
    return lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")


def seen(call):
    """(bytes read, bytes written, kernels, operations of products)."""
    with traffic.Traffic() as counted:
        call()
    return counted.read, counted.written, counted.launches, counted.flops


def test_traffic_of_single_operators(meta):
    x, w, rows, ids = meta(10, 100), meta(100, 30), meta(3, 100), meta(3, dtype=torch.int64)
    out, m = meta(10, 30), 4000
    assert seen(lambda: (x + 1).t().zero_()) == (m, 2 * m, 2, 0)  # the view moves nothing
    assert seen(lambda: torch.zeros_like(x)) == seen(lambda: x.new_zeros(10, 100)) == (0, m, 1, 0)
    assert seen(lambda: torch.mm(x, w)) == (m + 12000, 1200, 1, 2 * 10 * 100 * 30)
    assert seen(lambda: torch.mm(x, w, out=out)) == (m + 12000, 1200, 1, 60000)  # what is only written is not read
    assert seen(lambda: out.addmm_(x, w)) == (m + 12000 + 1200, 1200, 1, 60000)
    assert seen(lambda: x[ids]) == (24 + 1200, 1200, 1, 0)
    assert seen(lambda: x.index_put_((ids,), rows)) == (24 + 1200, 1200, 1, 0)
    assert seen(lambda: x.index_add_(0, ids, rows)) == (24 + 1200 + 1200, 1200, 1, 0)
    assert traffic.touched(torch.empty(10, 1).expand(10, 100)) == 40


def test_traffic_of_a_branch_and_of_an_index_that_only_data_would_decide(meta):
    mask = meta(10, dtype=torch.bool)
    with traffic.Traffic() as counted:
        assert not mask.any()
        assert mask.nonzero().shape == (10, 1)
    assert counted.launches == 2


def test_the_backward_of_a_gather_touches_what_it_gathered(meta):
    x, ids = meta(10, 100).requires_grad_(), meta(10, 1, dtype=torch.int64)
    with traffic.Traffic() as counted:
        x.gather(1, ids).sum().backward()
    # gather (ids, 10 values r w), sum (r, w), seed (w), zeros (w), scatter (ids, value expanded, r w)
    assert (counted.read, counted.written) == (80 + 40 + 40 + 80 + 4 + 40, 40 + 4 + 4 + 4000 + 40)
    assert counted.peak < 4000 + 200


def test_the_head_of_ours_is_counted_chunk_by_chunk():
    rows, width, vocab = 24, 32, 100
    found = {}
    for c in audit.from_hidden(rows, width, vocab, torch.float32):
        found[c.name, "trained" in c.shape] = c
    logits, weight, product = rows * vocab * 4, vocab * width * 4, 2 * rows * vocab * width
    one = found["rlhf_fast", False]  # one chunk: logits written, read by forward, turned into their gradient, read
    assert one.flops == 2 * product
    # as large as the hidden states: they themselves, zeros, a sum r w, the scaling r w; and vectors
    states = one.moved - 5 * logits - 2 * weight - 6 * rows * width * 4
    assert 0 < states < 200 * rows
    assert found["rlhf_fast", True].flops == 4 * product  # the logits anew, and the gradient of the weight
    assert found["materialised", True].flops == found["torch.compile, materialised", True].flops == 3 * product
    assert found["rlhf_fast", False].launches == found["rlhf_fast, chunk_bytes 1 GiB", False].launches
    assert "TFLOP of products" in traffic.table("what", list(found.values()))


def test_smaller_chunks_read_the_weight_again(meta):
    x = {"hidden": meta(24, 32), "weight": meta(100, 32), "ids": meta(24, dtype=torch.int64), "upstream": meta(24)}

    def of(chunk_bytes):
        def call(hidden, weight, ids):
            return rlhf_fast.linear_token_logprobs(hidden, weight, ids, chunk_bytes=chunk_bytes).logprobs

        return traffic.count("ours", "", lambda: heads.both_of(call, False)(x), 1, audit.composition)

    row = (100 + 3 * 32) * 4  # its logits and, three times, its hidden state
    whole, thirds = of(24 * row), of(8 * row)
    assert thirds.flops == whole.flops and thirds.peak < whole.peak
    assert thirds.moved - whole.moved == 2 * 2 * 100 * 32 * 4  # two more chunks, two products each


def test_compiled_programs_are_counted_kernel_by_kernel(meta):
    def fused(x, y):
        return (2 * x + y).sum(-1)

    x, y = meta(50, 400), meta(50, 400)
    c = inductor.count("a", "s", fused, (x, y), 1)
    assert (c.moved, c.launches, c.peak, c.flops) == (2 * 80000 + 200, 1, 200, 0)

    def product(x, w):
        return torch.relu(x @ w).square()

    c = inductor.count("a", "s", product, (x, meta(400, 30)), 1)
    # the product r r w by a library, then one kernel in place or not
    assert (c.moved, c.launches, c.flops) == (80000 + 48000 + 6000 + 12000, 2, 2 * 50 * 400 * 30)
    c = inductor.count("a", "s", lambda x: x.exp(), (x,), 1, trained=(0,))
    assert (c.moved, c.launches) == (2 * 80000 + 3 * 80000, 2) and c.peak >= 2 * 80000


def test_a_compiled_gather_touches_what_it_gathers_and_its_backward_fills_with_zeros(meta):
    x, ids = meta(50, 400), meta(50, dtype=torch.int64)

    def picked(x, ids):
        return x.gather(1, ids[:, None]).squeeze(1)

    assert inductor.count("a", "s", picked, (x, ids), 1).moved == 400 + 200 + 200
    both = inductor.count("a", "s", picked, (x, ids), 1, trained=(0,))
    assert both.moved - 800 == 80000 + (400 + 200 + 200 + 200)  # zeros, then ids and upstream in, 50 sums


def test_a_kernel_that_reads_back_its_own_result_reads_it_once():
    text = """
def triton_red(in_ptr0, out_ptr0, out_ptr1, xnumel, r0_numel, XBLOCK : tl.constexpr):
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp0 = tl.load(in_ptr0 + (r0_1 + 400*x0), r0_mask)
        tl.store(out_ptr0 + (r0_1 + 400*x0), tmp0, r0_mask)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp1 = tl.load(out_ptr0 + (r0_1 + 400*x0), r0_mask)
        tmp2 = tl.load(in_ptr0 + (r0_1 + 400*(x0 % 5)), r0_mask)
    tl.store(out_ptr1 + (x0), tmp2, None)
"""
    counted = traffic.Traffic()
    x = torch.empty(50, 400)
    inductor.Kernel(counted, text).run(x, torch.empty_like(x), torch.empty(50), 50, 400, stream=0)
    assert (counted.read, counted.written, counted.launches) == (80000, 80000 + 200, 1)


def test_limits_of_this_machine_are_positive_and_told(native):
    found = machine.measure(machine.Probe())
    assert min(found.read, found.copy, found.exp, *found.gemm.values()) > 1e8
    assert found.isa == native.isa() and "GB/s" in "\n".join(found.lines())


def test_patterns_choose_rows_and_a_pattern_without_one_is_an_error():
    found = list(all_cases())
    assert {c.op for c in chosen(["gae", "reward_loss 64*"], found)} == {"gae", "reward_loss"}
    assert len(chosen(["reward_loss 64*"], found)) == 1
    with pytest.raises(ValueError, match=r"no case matches 'gea'; ops: advantages, .*gae, "):
        chosen(["gea"], found)


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


def test_what_cannot_be_written_is_an_error_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "Probe", lambda: pytest.fail("measured"))
    with pytest.raises(FileNotFoundError):
        main(["gae", "--readme", str(tmp_path / "README.md")])
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="has no <!-- bench -->"):
        main(["gae", "--readme", str(tmp_path / "README.md"), "--json", str(tmp_path / "new" / "bench.json")])
    assert (tmp_path / "new").is_dir()


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
        0.5,
    )
    assert "| 2 | 50 % | TRL 4 x | 1 / 2 |" in render.markdown(LIMITS, [row])
    row.rates = {"read": 5e10, "copy": 6e10, "exp": 3e10}
    assert "| 2 | 50 %, 50 GB/s | TRL 4 x | 1 / 2 |" in render.markdown(LIMITS, [row])
    assert "50 % of the machine's limit (read 50 GB/s, copy 60 GB/s, exp 30 G/s)" in render.text_row(row)


def test_the_limit_is_the_one_of_the_moment():
    """A machine that slows down tenfold between two rounds makes neither slow nor fast kernels of ours."""

    class Probe:
        factor = 1.0

        def __init__(self):
            self.factors = itertools.cycle([1.0, 0.1])

        def rates(self):
            self.factor = next(self.factors)
            return {"read": self.factor * 1e9, "copy": self.factor * 1e9, "exp": 1e12}

    probe = Probe()

    def ours(x):
        time.sleep(0.01 / probe.factor)  # long beside what a busy machine adds to it
        return double(x)

    row = run(case(contenders={OURS: ours}, limit=lambda m: m.seconds(read=5e6), seconds=1.0), LIMITS, probe=probe)
    assert 0.35 < row.share_of_limit < 0.55 and row.rounds > 2 and set(row.rates) == {"read", "copy", "exp"}


def test_a_fit_finds_the_exponent_the_furthest_point_and_every_kink():
    xs = scale.powers(2**16)
    assert xs[0] == 1024 and xs[-1] == 65536 and len(xs) == 7
    straight = scale.fit(xs, [3e-6 * x for x in xs])
    assert straight.exponent == pytest.approx(1) and straight.deviation == pytest.approx(1) and straight.kinks == []
    bent = scale.fit(xs, [x**1.5 for x in xs])
    assert bent.exponent == pytest.approx(1.5)
    assert [(a, b) for a, b, _ in bent.kinks] == [(1024, 65536)]  # 2^0.5 a step, one direction
    assert bent.kinks[0][2] == pytest.approx(8) and bent.deviation == pytest.approx(8**-0.5)
    jump = scale.fit(xs, [x * (2 if x >= 8192 else 1) * (3 if x == 65536 else 1) for x in xs])
    assert jump.kinks == [(4096, 8192, 2), (32768, 65536, 3)]
    assert jump.at == 65536 and jump.deviation == 3
    fixed = scale.fit(xs, [16384 + x for x in xs])
    assert fixed.kinks[0][2] < 1 and 0 < fixed.exponent < 1
    assert scale.fit([1, 2, 4], [8, 4, 2], -1).exponent == pytest.approx(-1)
    assert scale.fit([1024], [1.0]) is None and scale.fit([1, 2], [0.0, 1.0]) is None


def test_threads_are_powers_of_two_and_the_whole_machine():
    assert scale.threads_of(1) == [1] and scale.threads_of(6) == [1, 2, 4, 6] and scale.threads_of(8) == [1, 2, 4, 8]


def toy_curve(**changes):
    def at(count, classes):
        return case(make=lambda: {"x": torch.ones(count, classes)}, memory=True, **changes)

    family = scale.Family("toy", "", at, {OURS: 1, "eager": 3})
    return scale.Curve("toy", "", "tokens", "64 classes", tuple((n, 64, 1) for n in (1024, 2048, 4096)), family)


def test_a_curve_has_a_time_and_a_peak_at_every_point_that_fits_into_memory():
    before = torch.get_num_threads()
    lines = scale.measure(toy_curve(), budget=4 * 64 * 4096 * 2, seconds=0.01)
    assert lines[OURS].xs == [1024, 2048, 4096] and lines[OURS].left_out == []
    assert lines["eager"].xs == [1024, 2048] and lines["eager"].left_out == [4096]
    assert [len(line.peaks) for line in lines.values()] == [3, 2] and min(lines[OURS].seconds) > 0
    assert torch.get_num_threads() == before
    assert "left out for memory: 4k" in scale_render.text(toy_curve(), lines)
    assert " at 2k) |" in scale_render.markdown(LIMITS, [(toy_curve(), lines)])


def test_a_wrong_point_is_never_timed():
    with pytest.raises(GateError, match="result 0 is wrong"):
        scale.measure(toy_curve(contenders={OURS: lambda x: (x["x"],), "eager": double}), 1e9, 0.01)
    with pytest.raises(GateError, match="eager computes something else"):
        scale.measure(toy_curve(contenders={OURS: double, "eager": lambda x: (x["x"],)}), 1e9, 0.01)


def test_repeated_rows_are_those_of_the_block():
    made = scale.repeated(lambda n: {"x": torch.arange(2 * n).view(n, 2), "ids": torch.arange(n)}, 4 * scale.BLOCK)
    assert made["x"].shape == (4 * scale.BLOCK, 2) and torch.equal(made["x"][-1], made["x"][scale.BLOCK - 1])
    assert torch.equal(made["ids"], torch.arange(scale.BLOCK).repeat(4))


def test_the_command_draws_curves(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- scale --><!-- /scale -->")
    files = {name: str(tmp_path / name) for name in ("out.json", "out.png")}
    options = ("--scale", "--largest", "2048", "--seconds", "0.01", "--json", files["out.json"])
    done = main(["token_logprobs", "linear*", "gae", *options, "--plot", files["out.png"], "--readme", str(readme)])
    assert done == 0
    curves = json.loads((tmp_path / "out.json").read_text())["curves"]
    axes = {op: [c["axis"] for c in curves if c["op"] == op] for op in ("gae", "linear_token_logprobs")}
    assert axes == {"gae": ["tokens", "threads"], "linear_token_logprobs": ["tokens", "classes", "threads"]}
    for c in curves:
        assert OURS in c["lines"] and len(c["lines"]) == 2
        for line in c["lines"].values():
            if c["axis"] != "threads":
                assert line["xs"] == [1024, 2048] and min(line["seconds"]) > 0
                assert len(line["peaks"]) == (0 if c["op"] == "gae" else 2)
                again = scale.fit(line["xs"], line["seconds"])
                assert line["fit"]["seconds"]["exponent"] == pytest.approx(again.exponent)
    grows = next(c for c in curves if c["op"] == "linear_token_logprobs")["lines"]["materialised"]["peaks"]
    assert grows[0] >= 1024 * 2048 * 4 and grows[1] > 1.5 * grows[0]
    assert "linear_token_logprobs frozen head, forward + backward against classes" in capsys.readouterr().out
    assert "| `gae` | tokens to 2k" in readme.read_text()
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "out.png").stat().st_size > 30_000


def test_the_command_stops_at_a_wrong_curve(monkeypatch, capsys):
    wrong = toy_curve(contenders={OURS: lambda x: (x["x"],), "eager": double})
    monkeypatch.setattr(scale, "curves", lambda largest: iter([wrong]))
    assert main(["--scale"]) == 1
    assert "WRONG  toy" in capsys.readouterr().err
