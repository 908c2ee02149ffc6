"""Timing on a device, with a clock of our own in the place of CUDA's events: nothing here claims a time of a GPU."""

from __future__ import annotations

import json
import math
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlhf_fast
from rlhf_fast.bench import audit, command, device, device_cases, engine, machine, render, roofline, traffic
from rlhf_fast.bench.engine import OURS, Case, GateError, Prepared, run
from rlhf_fast.cli import main as cli

CPU = torch.device("cpu")
SMALL = device_cases.Sizes(
    logits=((40, 301),),
    steps=((40, 301),),
    keys=((20, 9),),
    rollout=(6, 140),
    head=(24, 32, 200),
    layer=(48, 40, 33),
    groups=(4, 8),
    pairs=64,
)
ROOT = Path(__file__).parents[1]


class Clock:
    """torch.cuda as far as the timing asks, with a clock that only work moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.allocated = self.highest = 1000

    def work(self, seconds: float, what: str = "work") -> None:
        self.now += seconds
        self.log.append(what)

    def Event(self, enable_timing: bool):
        assert enable_timing
        clock = self

        class Event:
            def record(self) -> None:
                self.at = clock.now
                clock.log.append("record")

            def elapsed_time(self, other) -> float:
                assert clock.log[-1] == "synchronize"  # an event that is not complete has no time
                return 1e3 * (other.at - self.at)

        return Event()

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def reset_peak_memory_stats(self) -> None:
        self.highest = self.allocated

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.highest

    def get_device_properties(self, where):
        return SimpleNamespace(name="NVIDIA H100 toy", multi_processor_count=7, major=9, minor=0, L2_cache_size=64)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(device, "FLUSHED", 4096)
    return Clock()


@pytest.fixture
def events(clock) -> device.Events:
    found = device.Events(CPU, clock)
    found._flush = SimpleNamespace(zero_=lambda: clock.work(100.0, "flush"))
    return found


def test_only_the_call_is_between_the_events_and_the_cache_is_cold(clock, events):
    assert events.seconds(lambda x: clock.work(x["t"]), {"t": 2.0}, 3) == pytest.approx(2.0)
    assert clock.log == [*["flush", "record", "work", "record"] * 3, "synchronize"]


def test_of_a_call_in_two_parts_the_second_is_timed(clock, events):
    call = Prepared(lambda x: clock.work(50.0, "before") or 3.0, lambda seconds: clock.work(seconds))
    assert events.seconds(call, {}, 2) == pytest.approx(3.0)
    assert clock.log[:5] == ["before", "flush", "record", "work", "record"]
    assert events.whole(call, {}) is None


def test_a_whole_call_is_one_of_many_in_a_row(clock, events):
    assert events.whole(lambda x: clock.work(0.5), {}) == pytest.approx(0.5)
    assert "flush" not in clock.log and clock.log.count("work") == device.CALLS + 1


def test_the_peak_is_what_a_call_adds(clock, events):
    def call():
        clock.highest = 1000 + 300

    assert events.peak(call) == 300 and events.peak(lambda: None) == 0


def test_a_row_that_runs_out_of_memory_is_told_and_the_others_go_on(monkeypatch, capsys):
    place = command.Place([toy(), toy()], limits("x"), SimpleNamespace(rates=dict), Steady(1.0, 1.0), ["head"])
    place.timer.settle = iter([torch.OutOfMemoryError("CUDA out of\nmemory"), None]).__next__
    monkeypatch.setattr(command, "on_cpu", lambda config: place)

    def run(case, *_, timer, **__):
        if (error := timer.settle()) is not None:
            raise error
        return engine.run(case, limits("x"), timer=Steady(1.0, 1.0))

    monkeypatch.setattr(command, "run", run)
    assert command.main([]) == 1
    out = capsys.readouterr()
    assert "FAILED  reward_loss toy: CUDA out of memory" in out.err and "1 rows, 1 wrong" in out.out


def test_before_a_row_the_allocator_gives_back_its_blocks(clock, events):
    clock.empty_cache = lambda: clock.log.append("empty")
    calls = {OURS: lambda x: clock.work(1.0) or (2 * x["x"],)}
    run(toy(contenders=calls, aims_ms={}, limit=None, memory=False), limits("x"), timer=events)
    assert clock.log[0] == "empty" and clock.log.count("empty") == 1


def test_the_flush_covers_the_second_level_cache(clock):
    clock.get_device_properties = lambda where: SimpleNamespace(L2_cache_size=5000)
    assert device.Events(CPU, clock)._flush.numel() == 10000
    clock.get_device_properties = lambda where: SimpleNamespace()
    assert device.Events(CPU, clock)._flush.numel() == 4096


def test_limits_are_those_of_a_copy_and_of_products(clock, events, monkeypatch):
    probe = device.CopyProbe(events, CPU, copied=1000)
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a: (clock.work(0.5), copy(*a))[1])
    assert probe.rates() == {"read": 4000.0, "copy": 4000.0}
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *a: (clock.work(2.0), product(*a))[1])
    found = device.measure(probe, 8, clock)
    assert found.gemm == {"float32": 512.0, "bfloat16": 512.0} and found.copy == 4000.0
    assert found.seconds(read=4000, exps=1e30) == pytest.approx(1.0)  # bytes alone
    assert found.isa == "sm_90" and "NVIDIA H100 toy, 7 multiprocessors, sm_90" in device.lines(found)[0]


def toy(**changes) -> Case:
    made = {
        "contenders": {OURS: lambda x: (2 * x["x"],), "eager": lambda x: (x["x"] + x["x"],)},
        "limit": lambda m: m.seconds(read=100),
        "aims_ms": {"device": 2e3, "call": 4e3},
        "card": "H100",
        "seconds": 0.0,
        **changes,
    }
    return Case("reward_loss", "toy", lambda: {"x": torch.arange(4.0)}, truth=lambda x: (2 * x["x"].double(),), **made)


def limits(name: str) -> machine.Machine:
    return machine.Machine(name, 7, "sm_90", {}, read=100.0, copy=100.0, exp=math.inf, gemm={"bfloat16": 1e12})


class Steady(engine.Timer):
    """Times and peaks of our choosing."""

    def __init__(self, on_device: float, whole: float, peak: int = 0) -> None:
        self.times, self.bytes = (on_device, whole), peak

    def seconds(self, call, inputs, repeats):
        return self.times[0]

    def whole(self, call, inputs):
        return self.times[1]

    def peak(self, call):
        return self.bytes


def test_aims_are_met_missed_or_not_judged():
    row = run(toy(memory_bar=100), limits("NVIDIA H100 SXM"), timer=Steady(1.9, 4.1, 90))
    assert row.milliseconds[OURS] == pytest.approx(1900) and row.call_ms[OURS] == pytest.approx(4100)
    assert row.verdicts == [
        "1.9e+03 ms on the device, aim 2000 on H100: met",
        "4.1e+03 ms a whole call, aim 4000 on H100: missed",
        "0 MiB of extra memory, aim 0: met",
    ]
    assert row.shortfalls == ["4.1e+03 ms a whole call, aim 4000 on H100"]
    assert row.share_of_limit == pytest.approx(1 / 1.9)
    row = run(toy(memory_bar=100), limits("NVIDIA B200"), timer=Steady(1.9, 4.1, 110))
    assert all(line.endswith(": not judged on NVIDIA B200") for line in row.verdicts)
    assert row.shortfalls == ["0 MiB of extra memory, aim 0"]
    text, table = render.text_row(row), render.device_markdown(["head"], [row])
    assert "not judged on NVIDIA B200" in text and "ms a whole call" in text
    assert "| 53 % |" in table and table.startswith("head\n\n| op, shape | backend |")
    assert {line.count("|") for line in table.splitlines()[2:]} == {10}


def test_without_a_device_the_timer_is_the_clock_of_the_process():
    row = run(toy(aims_ms={}), limits("a processor"))
    assert row.call_ms == {} and row.verdicts == [] and row.milliseconds[OURS] > 0


ON_DEVICE = sorted(
    op for op, cells in rlhf_fast.backends().items() if any(name != "reference" for name, *_ in cells["cuda"])
)
"""Ops with a kernel for a device."""


def test_every_op_has_rows_with_peers_and_the_aims_of_the_card():
    found = list(device_cases.cases(torch.device("meta")))
    assert set(ON_DEVICE) <= {c.op for c in found} <= set(rlhf_fast.backends())
    assert all(OURS in c.contenders and len(c.contenders) > 1 for c in found)
    names = {name for c in found for name in c.contenders}
    assert {
        "TRL",
        "verl",
        "Liger, log-prob alone",
        "Liger (loss)",
        "flash-attn, log-prob alone",
        "torch.compile",
    } <= names
    aims = {(c.op, kind): (aim, c.card) for c in found for kind, aim in c.aims_ms.items()}
    assert aims[("advantages", "call")] == (0.034, "H100")
    assert [c.aims_ms for c in found if c.op == "token_logprobs"][:2] == [{"device": 0.85}, {"device": 1.7}]
    (head,) = [c for c in found if c.op == "linear_token_logprobs" and c.aims_ms]
    assert head.aims_ms == {"device": 55.0} and head.memory_bar == 2**30 and "[8192, 131072]" in head.name
    assert not any(c.aims_ms for c in device_cases.cases(torch.device("meta"), SMALL))


def test_the_head_that_is_timed_can_meet_its_aims():
    """By its counted memory, and by the least time of its bytes and products."""
    meta = torch.device("meta")
    (case,) = [c for c in device_cases.cases(meta) if c.op == "linear_token_logprobs" and c.aims_ms]
    x = case.make()
    found = traffic.count("ours", "", lambda: case.contenders[OURS](x), 1, audit.composition)
    card = next(c for c in roofline.CARDS if c.name.startswith(case.card))
    assert found.peak < device_cases.HEAD_BYTES and 1e3 * card.seconds(found) < case.aims_ms["device"] / 2


@pytest.mark.parametrize("op", ON_DEVICE)
def test_inputs_have_the_shapes_of_the_row_without_data(op):
    """At full size, on meta tensors: every input lies on the device."""
    meta = torch.device("meta")
    for c in device_cases.cases(meta):
        if c.op == op and op != "linear_ppo_loss":  # its log-probs are computed
            assert all(x.device == meta for x in c.make().values() if isinstance(x, torch.Tensor)), c.name


@pytest.mark.parametrize("op", ON_DEVICE)
def test_rows_pass_their_gate_and_agree_with_their_peers(op, clock, events):
    """The very cases at small sizes on the CPU: gate, contenders and limits run as they will on a device."""
    for c in device_cases.cases(CPU, SMALL):
        if c.op != op:
            continue
        case = engine.replace(c, seconds=0.0)
        row = run(case, limits("NVIDIA H100"), only=lambda n: not n.startswith("torch.compile"), timer=Steady(1.0, 1.0))
        native = {n for n in c.contenders if command.is_native(n) and not n.startswith("torch.compile")}
        assert not native & row.missing.keys(), row.missing
        assert set(row.different) <= {"Liger (loss)"}, (row.name, row.errors)
        assert row.errors[OURS] < 0.02


def test_a_wrong_backward_is_never_timed():
    (case,) = [c for c in device_cases.cases(CPU, SMALL) if c.name.endswith("backward with entropy")]
    wrong = device_cases.back_of(lambda logits, ids: (logits.float().logsumexp(-1), logits.float().sum(-1)))
    with pytest.raises(GateError, match="result 0 is wrong"):
        run(engine.replace(case, contenders={OURS: wrong}), limits("x"), timer=Steady(1.0, 1.0))


def test_no_device_is_one_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert cli(["bench", "--device", "cuda"]) != 0
    message = capsys.readouterr().err
    assert "bench: --device cuda: this PyTorch" in message and "is built for the CPU alone" in message
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"bench: --device cuda: PyTorch .* finds no CUDA device"):
        command.main(["--device", "cuda"])
    with pytest.raises(ValueError, match="bench: --scale got --device cuda, expected no device"):
        command.main(["--device", "cuda", "--scale"])


def test_the_command_runs_a_device_and_leaves_one_file(clock, events, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    events._flush = torch.zeros(8)
    rows = [c for c in device_cases.cases(CPU, SMALL) if c.op in ("advantages", "token_logprobs")]
    monkeypatch.setattr(device, "require", lambda: CPU)
    asked: list[set[str]] = []
    monkeypatch.setattr(device, "parity", lambda ops: asked.append(ops))
    monkeypatch.setattr(device, "Events", lambda where: Steady(1.0, 1.0))
    monkeypatch.setattr(device, "CopyProbe", lambda events, where: SimpleNamespace(rates=lambda: {"read": 50.0}))
    monkeypatch.setattr(device, "measure", lambda probe: limits("NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(device_cases, "cases", lambda where: iter(rows))
    monkeypatch.setattr(command, "is_native", lambda name: name == "eager")
    assert command.main(["--device", "cuda", "token*", "--seconds", "0", "--markdown", "table.md"]) == 0
    out = capsys.readouterr().out
    assert asked == [{"token_logprobs"}]
    assert "2 rows, 0 wrong" in out and "written: bench-nvidia-h100-80gb-hbm3.json" in out
    document = json.loads((tmp_path / "bench-nvidia-h100-80gb-hbm3.json").read_text(), parse_constant=pytest.fail)
    assert document["machine"]["exp"] is None and document["failed"] == []
    assert [row["backend"] for row in document["rows"]] == [rlhf_fast._op.OPS["token_logprobs"].select("cuda").name] * 2
    assert "| `token_logprobs` [40, 301] bf16, forward with entropy |" in (tmp_path / "table.md").read_text()


def test_a_suite_that_fails_stops_the_run(monkeypatch, capsys, tmp_path):
    suite = tmp_path / "tests" / "gpu" / "device"
    assert device.parity({"gae"}, suite) is None and "not in this installation" in capsys.readouterr().out
    suite.mkdir(parents=True)
    (suite / "test_it.py").write_text("def test_gae():\n    pass\n\ndef test_whiten():\n    assert False\n")
    assert device.parity({"gae"}, suite) is None
    assert device.parity({"gae", "whiten"}, suite) == "the parity suite failed (status 1); nothing is timed"
    monkeypatch.setattr(device, "require", lambda: CPU)
    monkeypatch.setattr(device, "parity", lambda ops: "the parity suite failed")
    monkeypatch.setattr(device_cases, "cases", lambda where: iter([toy()]))
    monkeypatch.setattr(device, "measure", lambda probe: pytest.fail("measured"))
    assert command.main(["--device", "cuda"]) == 1
    assert "WRONG  the parity suite failed" in capsys.readouterr().err


def test_the_suite_of_this_checkout_is_found_and_can_be_chosen_by_op():
    assert device.SUITE.is_dir()
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", str(device.SUITE), "-k", "gae or token_logprobs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "[gae-" in listed and "[linear_token_logprobs-" in listed and "poisoned_gaps" in listed
    assert "[whiten-" not in listed


def sanitize(*arguments: str, path: str, **environment: str):
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "sanitize.py"), *arguments],
        env={"PATH": path, "CUDA_HOME": "/nowhere", "PYTHONPATH": environment.pop("PYTHONPATH", ""), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tool(tmp_path) -> Path:
    """A stand-in for compute-sanitizer that writes its arguments down; racecheck finds something."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f'#!/bin/sh\necho "$@ cache=$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {tmp_path}/log\n'
        'case "$*" in *"--tool racecheck"*) exit 86;; *"--tool synccheck"*) exit 1;; esac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_the_sanitizer_says_what_it_lacks(tool):
    found = sanitize(path="/nowhere")
    assert found.returncode == 2 and "sanitize: compute-sanitizer is neither on PATH nor" in found.stderr
    if not torch.cuda.is_available():
        found = sanitize(path=str(tool.parent))
        assert found.returncode == 2 and "finds no CUDA device" in found.stderr


def test_the_sanitizer_runs_all_four_tools_over_the_suite(tool, tmp_path):
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("__version__ = 'x'\nclass cuda:\n    is_available = staticmethod(lambda: True)\n")
    found = sanitize(path=f"{tool.parent}:/bin:/usr/bin", PYTHONPATH=str(fake.parent))
    calls = (tmp_path / "log").read_text().splitlines()
    assert [c.split()[1] for c in calls] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all("-m pytest -q -x tests/gpu/device cache=1" in c and "--error-exitcode 86" in c for c in calls)
    assert found.returncode == 1
    assert [line.split(None, 1)[1] for line in found.stdout.splitlines()[-4:]] == [
        *("clean", "findings above", "clean", "the suite failed with status 1")
    ]
    assert (ROOT / "tests/gpu/device").is_dir()
