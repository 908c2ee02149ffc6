"""Tuning on a clock of our own: the fastest sizes that are right win, a small gain changes nothing, and the table reads back."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.bench import command, device, engine, tune
from rlhf_fast.bench.engine import GateError

CPU = torch.device("cpu")
FORWARD, BACKWARD = ("token_logprobs", "16-bit", "V > 4096"), ("token_logprobs_backward", "32-bit", "V <= 4096")
SMALL = {"V <= 4096": (5, 9), "V > 4096": (40, 41)}


class Kernels:
    """A module whose kernels take as long as we say, by the sizes they ask for."""

    def __init__(self, cost, wrong=()):
        self.config = lambda *_: pytest.fail("asked outside of the tuning")
        self.cost, self.wrong = cost, wrong
        self.timer = engine.Timer()
        self.timer.seconds = self.seconds
        self.seen: set = set()

    def seconds(self, call, inputs, repeats):
        sizes = self.config("op", "arch", torch.bfloat16, 1)
        assert sizes not in self.wrong
        self.seen.add((sizes, inputs["logits"].shape[1], inputs["logits"].dtype))
        return self.cost(*sizes, inputs["logits"].shape[1])

    def calls(self):
        """Those of tune, which give NaN at the wrong sizes."""
        plain = tune_calls()

        def of(op):
            def run(inputs):
                results = plain[op](inputs)
                bad = self.config() in self.wrong
                return tuple(x * torch.nan if bad else x for x in results)

            return run

        return {op: of(op) for op in plain}


tune_calls = tune.calls


def tuned(table, kernels, monkeypatch, report=lambda line: None):
    monkeypatch.setattr(tune, "calls", kernels.calls)
    return list(tune.tune(table, kernels.timer, CPU, kernels, None, 6, SMALL, report))


def test_candidates_fill_a_thread_and_do_not_overfill_it():
    found = tune.candidates()
    assert (2048, 8) in found and (256, 1) in found and (4096, 4) in found
    assert (4096, 1) not in found and (256, 16) not in found
    assert all(lanes & (lanes - 1) == 0 for lanes, _ in found)


def test_the_fastest_sizes_of_a_row_win(monkeypatch):
    kernels = Kernels(lambda lanes, warps, vocab: 1.0 + abs(lanes - 1024) / 1024 + abs(warps - 4))
    (row, other) = tuned({FORWARD: (2048, 8), BACKWARD: (256, 2)}, kernels, monkeypatch)
    assert row == tune.Tuned(FORWARD, (2048, 8), (1024, 4), pytest.approx(1 / 6))
    assert other.after == (1024, 4) and other.before == (256, 2)
    assert {(v, d) for _, v, d in kernels.seen} == {
        *((v, torch.bfloat16) for v in (40, 41)),
        *((v, torch.float32) for v in (5, 9)),
    }
    assert {sizes for sizes, v, _ in kernels.seen if v == 40} == set(tune.candidates())


def test_the_mean_over_vocabularies_decides(monkeypatch):
    """Twice as fast at one vocabulary and three times as slow at the other is no gain."""
    cost = {(1024, 4): {40: 0.5, 41: 3.0}, (512, 4): {40: 0.9, 41: 0.9}}
    kernels = Kernels(lambda lanes, warps, vocab: cost.get((lanes, warps), {}).get(vocab, 1.0))
    (row,) = tuned({FORWARD: (2048, 8)}, kernels, monkeypatch)
    assert row.after == (512, 4) and row.share == pytest.approx(0.9)


def test_a_gain_within_the_noise_changes_nothing(monkeypatch):
    kernels = Kernels(lambda lanes, warps, vocab: 1.0 if (lanes, warps) == (2048, 8) else 0.985)
    (row,) = tuned({FORWARD: (2048, 8)}, kernels, monkeypatch)
    assert row.after == (2048, 8) and row.share == pytest.approx(1.0)


def test_sizes_with_a_wrong_result_are_never_timed(monkeypatch):
    lines: list[str] = []
    kernels = Kernels(lambda lanes, warps, vocab: lanes * warps, wrong={(256, 1), (256, 2)})
    (row,) = tuned({FORWARD: (2048, 8)}, kernels, monkeypatch, lines.append)
    assert row.after == (512, 1) and set(row.wrong) == {(256, 1), (256, 2)}
    assert len(lines) == 2 and "token_logprobs 16-bit V > 4096 (256, 1): " in lines[0]
    with pytest.raises(GateError, match=r"the sizes \(256, 1\) that the table has give a wrong result"):
        tuned({FORWARD: (256, 1)}, kernels, monkeypatch)


def test_a_row_that_nothing_times_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"bench: --tune: the table has a row \('gae', '16-bit', 'V > 4096'\)"):
        tuned({("gae", "16-bit", "V > 4096"): (256, 1)}, Kernels(lambda *_: 1.0), monkeypatch)


@pytest.fixture
def configs():
    """kernels/common/configs.py, read again afterwards."""
    pytest.importorskip("triton")
    module = importlib.import_module("rlhf_fast.kernels.common.configs")
    yield module
    importlib.reload(module)


def test_every_row_of_the_checked_in_table_can_be_timed(configs):
    ops = {op for op, _, _ in configs._DEFAULT}
    assert ops == tune_calls().keys() == tune.truths().keys()
    for op, width, vocabulary in configs._DEFAULT:
        assert width in tune.DTYPES and vocabulary in tune.VOCABULARIES, op
    for vocabulary, sizes in tune.VOCABULARIES.items():
        for width, dtype in tune.DTYPES.items():
            for vocab in sizes:
                expected = configs._DEFAULT["token_logprobs", width, vocabulary]
                assert configs.config("token_logprobs", "", dtype, vocab) == expected


def test_the_table_is_written_and_read_back(configs, monkeypatch, tmp_path):
    lines: list[str] = []
    path = tmp_path / "tuned.py"
    before = {"gfx942": {FORWARD: (512, 2)}}
    tuned_module = importlib.import_module("rlhf_fast.kernels.common.tuned")
    monkeypatch.setattr(tuned_module, "TUNED", before)
    monkeypatch.setattr(tune, "target", lambda: path)
    launch = importlib.import_module("rlhf_fast.kernels.common.launch")
    monkeypatch.setattr(launch, "arch_of", lambda x: "sm_90")

    def rows(table, *_, **__):
        assert table.keys() == {key for key in configs._DEFAULT if key[0] in tune_calls()}
        for key, sizes in table.items():
            yield tune.Tuned(key, tuple(sizes), (1024, 4) if key == FORWARD else tuple(sizes), 0.5)

    monkeypatch.setattr(tune, "tune", rows)
    tune.run(engine.Timer(), CPU, lines.append)
    assert "token_logprobs 16-bit V > 4096: lanes, warps (1024, 4), was (2048, 8), 0.50 x its time" in lines
    assert sum("stays" in line for line in lines) == len(configs._DEFAULT) - 1 and "written:" in lines[-1]
    read: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), read)
    assert read["TUNED"]["gfx942"] == before["gfx942"] and read["TUNED"]["sm_90"][FORWARD] == (1024, 4)
    monkeypatch.setattr(tuned_module, "TUNED", read["TUNED"])
    importlib.reload(configs)
    assert configs.config("token_logprobs", "sm_90", torch.bfloat16, 50257) == (1024, 4)
    assert configs.config("token_logprobs", "sm_80", torch.bfloat16, 50257) == (2048, 8)


def test_the_checked_in_file_is_what_the_command_writes(configs):
    tuned_module = importlib.import_module("rlhf_fast.kernels.common.tuned")
    with open(tuned_module.__file__, encoding="utf-8") as file:
        assert file.read() == tune.text(tuned_module.TUNED)


def test_a_table_that_cannot_be_written_is_an_error_before_anything_is_timed(configs, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "tune", lambda *_, **__: pytest.fail("timed"))
    tuned_module = importlib.import_module("rlhf_fast.kernels.common.tuned")
    monkeypatch.setattr(tuned_module, "__file__", str(tmp_path / "absent" / "tuned.py"))
    with pytest.raises(ValueError, match=r"bench: --tune: the table .*tuned.py cannot be written: No such file"):
        tune.run(engine.Timer(), CPU)


def test_the_command_tunes_a_device_and_nothing_else(monkeypatch, capsys):
    with pytest.raises(ValueError, match="bench: --tune got --device cpu, expected --device cuda"):
        command.main(["--tune"])
    monkeypatch.setattr(device, "require", lambda: CPU)
    monkeypatch.setattr(device, "Events", lambda where: SimpleNamespace())
    asked = []
    monkeypatch.setattr(tune, "run", lambda timer, where: asked.append(where))
    assert command.main(["--device", "cuda", "--tune"]) == 0 and asked == [CPU]

    def wrong(*_):
        raise GateError("token_logprobs: wrong")

    monkeypatch.setattr(tune, "run", wrong)
    assert command.main(["--device", "cuda", "--tune"]) == 1
    assert "WRONG  token_logprobs: wrong" in capsys.readouterr().err
