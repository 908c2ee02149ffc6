"""Faults of whole runs, cases of the fault list by number: each test makes the fault happen and looks at what is left."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import child, flip
from models import save_tiny
from processes import gone, until
from runs import SCORERS, TEXTS, failing_calls, not_finite, numbers, outcome, steps, write_lines

from rlhf_fast.config import (
    DataConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOUpdateConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    SFTConfig,
)
from rlhf_fast.model import LoraConfig
from rlhf_fast.rewards import RewardError
from rlhf_fast.train import loop, ppo, sft
from rlhf_fast.train.checkpoint import CheckpointError
from rlhf_fast.train.loop import TrainingError
from rlhf_fast.train.micro_batches import MicroBatches, OutOfMemory, is_out_of_memory
from rlhf_fast.train.monitor import read_json_lines


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny(folder / "model")
    save_tiny(folder / "other", seed=1)
    write_lines(folder / "texts.jsonl", [{"text": t} for t in TEXTS * 3])
    write_lines(folder / "prompts.jsonl", [{"prompt": t[:8]} for t in TEXTS])
    pairs = [{"prompt": "", "chosen": f"a good film {c}.", "rejected": f"a bad story {c}."} for c in "abcdefghijkl"]
    write_lines(folder / "pairs.jsonl", pairs)
    return folder


@pytest.fixture(scope="module", autouse=True)
def warm(source, tmp_path_factory):
    """Forked children get what a first run imports."""
    sft.train_sft(sft_config(source, tmp_path_factory.mktemp("warm") / "run", epochs=1))


def model_config(source: Path) -> ModelConfig:
    lora = LoraConfig(r=2, alpha=8.0, dropout=0.2)
    return ModelConfig(str(source / "model"), dtype="float32", lora=lora)


def sft_config(
    source: Path, folder: Path, *, resume: bool = False, save_every: int = 1000, **changes: object
) -> SFTConfig:
    base = SFTConfig(
        model=model_config(source),
        data=DataConfig(str(source / "texts.jsonl")),
        run=RunConfig(str(folder), sample_every=0, save_every=save_every, resume=resume, threads=1),
        optim=OptimConfig(lr=2e-2),
        epochs=4,
        batch_size=4,
        micro_batch_size=4,
    )
    return dataclasses.replace(base, **changes)


def ppo_config(
    source: Path, folder: Path, *, resume: bool = False, save_every: int = 1000, **changes: object
) -> PPOConfig:
    base = PPOConfig(
        model=model_config(source),
        data=PromptDataConfig(str(source / "prompts.jsonl")),
        run=RunConfig(str(folder), sample_every=0, save_every=save_every, resume=resume, threads=1),
        reward=RewardSource(source=f"{SCORERS}:count_e", normalize="running"),
        optim=OptimConfig(lr=1e-2),
        rollout=RolloutConfig(batch_size=6, max_new_tokens=6),
        kl=KLConfig(kind="adaptive", horizon=100.0),
        ppo=PPOUpdateConfig(epochs=2, minibatch_size=3, micro_batch_size=3),
        steps=6,
    )
    return dataclasses.replace(base, **changes)


def test_case_37_twenty_losses_after_a_resume_in_mid_epoch_are_the_same_bits(source, tmp_path):
    # 15 texts in batches of 4: every epoch ends within a batch. Dropout, shuffling and the schedule go on.
    config = lambda name, **k: sft_config(source, tmp_path / name, epochs=7, **k)
    sft.train_sft(config("whole"))
    assert child(lambda: sft.train_sft(config("killed", save_every=3)), "train.step:8") == -signal.SIGKILL
    sft.train_sft(config("killed", resume=True))
    losses = [[row["loss"] for row in numbers(tmp_path / name)] for name in ("whole", "killed")]
    assert len(losses[0]) == 28 and losses[0] == losses[1]
    assert len(set(losses[0])) == 28


def test_case_29_a_full_disk_costs_one_checkpoint_and_two_in_a_row_stop_the_run(source, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def work(full_from: int, full_until: int) -> Callable[[], None]:
        def fill(number: int, _: object) -> None:
            # The system refuses to let a file grow past the limit: what a full disk does, and metrics still fit.
            size = 8192 if full_from <= number <= full_until else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        def run() -> None:
            failing_calls(monkeypatch, sft, "sft_loss", fill)
            try:
                sft.train_sft(sft_config(source, folder, save_every=1, epochs=2))
            except CheckpointError as error:
                assert "twice in a row" in str(error)
                os._exit(3)

        return run

    assert child(work(5, 5)) == 0
    assert steps(folder) == [7, 8]
    shutil.rmtree(folder)
    assert child(work(5, 6)) == 3
    assert steps(folder) == [3, 4] and not list((folder / "checkpoints").glob("*.tmp*"))
    sft.train_sft(sft_config(source, folder, epochs=2, resume=True))
    sft.train_sft(sft_config(source, tmp_path / "whole", epochs=2))
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_case_30_a_folder_deleted_at_run_time_is_made_again(source, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    failing_calls(monkeypatch, sft, "sft_loss", lambda n, _: shutil.rmtree(folder / "checkpoints") if n == 5 else None)
    sft.train_sft(sft_config(source, folder, save_every=1, epochs=2))
    assert "was deleted while the run was using it" in caplog.text and steps(folder) == [7, 8]


def test_case_31_a_resume_passes_over_a_damaged_checkpoint_and_never_starts_from_scratch(source, tmp_path, caplog):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    sft.train_sft(sft_config(source, whole, save_every=7, epochs=2))
    shutil.copytree(whole, folder)
    flip(folder / "checkpoints" / "step-8" / "model.safetensors")
    sft.train_sft(sft_config(source, folder, epochs=2, resume=True))
    assert "step-8 is damaged and passed over" in caplog.text and outcome(folder) == outcome(whole)
    for step in steps(folder):
        flip(folder / "checkpoints" / f"step-{step}" / "model.safetensors")
    with pytest.raises(CheckpointError, match="no whole checkpoint among 2"):
        sft.train_sft(sft_config(source, folder, epochs=2, resume=True))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="there is no checkpoint to resume from"):
        sft.train_sft(sft_config(source, folder, epochs=2, resume=True))


def other_model(config: SFTConfig, source: Path, **changes: object) -> SFTConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


CHANGES: dict[str, tuple[str, Callable[[SFTConfig, Path], object]]] = {
    "rank": ("lora", lambda c, s: other_model(c, s, lora=LoraConfig(r=4, alpha=8.0, dropout=0.2))),
    "base model": ("base", lambda c, s: other_model(c, s, path=str(s / "other"))),
    "dtype": ("base", lambda c, s: other_model(c, s, dtype="bfloat16")),
    "shared layers": ("shared_layers", lambda c, s: other_model(c, s, shared_layers=1)),
    "setting": ("config", lambda c, s: dataclasses.replace(c, epochs=3)),
    "data": ("data", lambda c, s: Path(c.data.path).write_text('{"text": "another"}\n') and None),
}


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    sft.train_sft(with_texts(sft_config(source, folder / "run", epochs=1), folder))
    return folder


def with_texts(config: SFTConfig, folder: Path) -> SFTConfig:
    """Settings that read a copy of the texts of this folder's own."""
    if not (folder / "texts.jsonl").exists():
        shutil.copy(config.data.path, folder / "texts.jsonl")
    return dataclasses.replace(config, data=DataConfig(str(folder / "texts.jsonl")))


@pytest.mark.parametrize("change", CHANGES)
def test_case_32_38_53_a_checkpoint_of_another_run_is_refused_by_the_field_that_differs(source, finished, change):
    field, alter = CHANGES[change]
    config = with_texts(sft_config(source, finished / "run", epochs=1, resume=True), finished)
    before = outcome(finished / "run")
    content = (finished / "texts.jsonl").read_text()
    config = alter(config, source) or config
    with pytest.raises(CheckpointError, match=rf"step-4: field 'identity\.{field}' is .*, expected .* for this run"):
        sft.train_sft(config)
    assert outcome(finished / "run") == before
    (finished / "texts.jsonl").write_text(content)


def test_case_38_changed_code_is_told_at_resume(source, finished, monkeypatch, caplog):
    monkeypatch.setattr(loop, "code_fingerprint", lambda: "of tomorrow")
    sft.train_sft(with_texts(sft_config(source, finished / "run", epochs=1, resume=True), finished))
    assert "since this checkpoint was written the code of rlhf_fast has changed" in caplog.text


def test_case_38_a_changed_reward_function_is_told_at_resume(source, tmp_path, caplog):
    function = tmp_path / "score.py"
    function.write_text("def f(prompts, completions): return [float(len(c)) for c in completions]\n")
    config = lambda **k: ppo_config(
        source, tmp_path / "run", reward=RewardSource(f"{function}:f", workers=0), steps=1, **k
    )
    ppo.train_ppo(config())
    ppo.train_ppo(config(resume=True))
    assert "has changed" not in caplog.text
    function.write_text("def f(prompts, completions): return [0.0 for c in completions]\n")
    ppo.train_ppo(config(resume=True))
    assert f"since this checkpoint was written reward function {function}:f has changed" in caplog.text


SLOW = (
    "import time\n\ndef f(prompts, completions):\n    open(__file__ + '.called', 'a').close()\n    time.sleep(1000)\n"
)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_case_34_39_a_second_run_is_refused_and_a_second_signal_ends_the_first_with_a_whole_checkpoint(
    source, tmp_path, number, status
):
    function = tmp_path / "slow.py"
    function.write_text(SLOW)
    config = ppo_config(source, tmp_path / "run", reward=RewardSource(f"{function}:f", timeout=900.0))
    if (pid := os.fork()) == 0:
        torch.set_num_threads(1)
        ppo.train_ppo(config)
        os._exit(1)
    until(Path(f"{function}.called").exists)
    with pytest.raises(CheckpointError, match=rf"in use by another run \(process {pid}\)"):
        sft.train_sft(sft_config(source, tmp_path / "run", resume=True))
    os.kill(pid, number)
    time.sleep(0.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    for _ in range(6):  # of two that come before the first is seen there is one
        os.kill(pid, number)
        if ended := gone(pid, 10.0):
            break
    assert ended and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    assert loop.CheckpointStore(tmp_path / "run" / "checkpoints").load_latest().step == 0


@pytest.mark.parametrize("kind", ["nan", "inf", "loss"])
def test_case_35_an_update_that_is_not_finite_changes_nothing_and_names_its_records(
    source, tmp_path, monkeypatch, caplog, kind
):
    folder = tmp_path / "run"
    original = sft.sft_loss
    failing_calls(monkeypatch, sft, "sft_loss", lambda n, args: not_finite(original(*args), kind) if n == 3 else None)
    sft.train_sft(sft_config(source, folder, epochs=1, run=RunConfig(str(folder), save_every=1, keep=10, threads=1)))
    stored = [(folder / "checkpoints" / f"step-{n}") for n in (2, 3, 4)]
    for file in ("model.safetensors", "optim.safetensors"):
        before, after, later = ((path / file).read_bytes() for path in stored)
        assert before == after and before != later
    (bad,) = read_json_lines(folder / loop.BAD_UPDATES)
    assert bad["step"] == 2 and len(bad["records"]) == 4 and bad["records"][0].startswith(f"{source}/texts.jsonl:")
    assert "update skipped in step 3" in caplog.text and bad["records"][3] in caplog.text
    assert (len(bad["parameters"]) > 0) is (kind != "loss")
    assert read_json_lines(folder / "metrics.jsonl")[2]["skipped_updates"] == 1.0


def test_case_35_too_many_in_a_row_stop_the_run_with_their_records_written(source, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    original = sft.sft_loss
    failing_calls(monkeypatch, sft, "sft_loss", lambda n, args: not_finite(original(*args), "nan") if n >= 3 else None)
    with pytest.raises(TrainingError, match=rf"5 updates in a row .*{loop.BAD_UPDATES}"):
        sft.train_sft(sft_config(source, folder, save_every=1000))
    rows = read_json_lines(folder / loop.BAD_UPDATES)
    assert [row["step"] for row in rows] == [2, 3, 4, 5, 6] and all(row["loss"] == "nan" for row in rows)
    assert steps(folder) == [0, 6]  # saved as it stopped: nothing has changed since step 2


def out_of_memory(limit: int) -> Callable[[int, tuple], None]:
    """A device on which no more than `limit` rows fit: it fails in the backward, with part of the gradient added already."""

    def fault(_: int, args: tuple) -> torch.Tensor | None:
        model, batch = args[:2]
        if len(batch) <= limit:
            return None
        first = next(iter(model.parameters_of("policy").values()))
        loss = (first * 1e6).sum()
        loss.register_hook(lambda g: first.grad is None and setattr(first, "grad", torch.full_like(first, 7.0)))

        def fail(_: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        loss.register_hook(fail)
        return loss

    return fault


def test_case_36_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(source, tmp_path, monkeypatch, caplog):
    def run(name: str, size: int, dropout: float) -> Path:
        config = sft_config(source, tmp_path / name, epochs=1, batch_size=8, micro_batch_size=size)
        lora = dataclasses.replace(config.model.lora, dropout=dropout)
        sft.train_sft(other_model(config, source, lora=lora))
        return tmp_path / name

    whole = run("whole", 8, 0.0)
    small = {p: run(f"small-{p}", 2, p) for p in (0.0, 0.2)}
    failing_calls(monkeypatch, sft, "sft_loss", out_of_memory(3))
    for dropout in (0.0, 0.2):
        # The same bits as with parts of two from the start, dropout included; the same gradients as in one part.
        halved = run(f"halved-{dropout}", 8, dropout)
        assert numbers(halved) == numbers(small[dropout])
        adapter = "adapter/adapter_model.safetensors"
        assert outcome(halved)[adapter] == outcome(small[dropout])[adapter]
    assert caplog.text.count("a micro-batch of 8 does not fit") == 2 and caplog.text.count("going on with 2") == 2
    for got, expected in zip(numbers(tmp_path / "halved-0.0"), numbers(whole), strict=True):
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    state = json.loads((tmp_path / "halved-0.0" / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["state"]["extra"]["micro_batch_size"] == 2  # a resume goes on with it


@pytest.mark.parametrize(("halve", "limit", "advice"), [(False, 3, "smaller micro_batch_size"), (True, 0, "shorter")])
def test_case_36_where_it_cannot_be_halved_the_run_stops_with_a_checkpoint(
    source, tmp_path, monkeypatch, halve, limit, advice
):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    sft.train_sft(sft_config(source, whole, epochs=1))
    with monkeypatch.context() as patch:
        fault = out_of_memory(limit)
        failing_calls(patch, sft, "sft_loss", lambda n, args: fault(n, args) if n >= 3 else None)
        run = RunConfig(str(folder), save_every=1000, halve_on_oom=halve, threads=1)
        with pytest.raises(OutOfMemory, match=advice):
            sft.train_sft(sft_config(source, folder, epochs=1, run=run))
    assert steps(folder) == [0, 2]
    sft.train_sft(sft_config(source, folder, epochs=1, resume=True))
    assert outcome(folder) == outcome(whole) and numbers(folder) == numbers(whole)


def test_case_36_memory_that_the_system_refuses_is_told_from_other_errors(tmp_path):
    report = tmp_path / "report"

    def work() -> None:
        os.environ["TORCH_DISABLE_ADDR2LINE"] = "1"  # names in the error's trace take seconds
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 7 * 2**29, resource.RLIM_INFINITY))
        part = MicroBatches(8, halve=True, clear=lambda: None)
        # 1 GiB a row where 3.5 are left: two fit at once.
        sizes = part.map(8, lambda rows: len(torch.empty((rows.stop - rows.start) * 2**30, dtype=torch.uint8)) >> 30)
        report.write_text(f"{sizes} {part.size}")

    assert child(work) == 0 and report.read_text() == "[2, 2, 2, 2] 2"
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(ZeroDivisionError):
        MicroBatches(2, halve=True, clear=lambda: None).map(4, lambda rows: 1 // 0)


def test_case_36_ppo_halves_too(source, tmp_path, monkeypatch):
    config = lambda name, size: ppo_config(
        source, tmp_path / name, steps=1, ppo=PPOUpdateConfig(epochs=2, minibatch_size=4, micro_batch_size=size)
    )
    ppo.train_ppo(config("small", 1))

    def fault(_: int, args: tuple) -> None:
        if len(args[0]) > 1:  # rows of the value loss, when the gradient of the policy loss is there already
            raise torch.OutOfMemoryError("out of memory")

    failing_calls(monkeypatch, ppo, "ppo_loss", fault)
    ppo.train_ppo(config("halved", 4))
    (got,), (expected,) = numbers(tmp_path / "halved"), numbers(tmp_path / "small")
    for name, value in expected.items():  # scored in fours and in ones, which differ in the last bits
        assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    state = json.loads((tmp_path / "halved" / "checkpoints" / "step-1" / "state.json").read_text())
    assert state["state"]["extra"]["micro_batch_size"] == 1


def test_case_40_jumps_of_the_clock_and_of_the_time_zone_change_nothing(source, tmp_path, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    sft.train_sft(sft_config(source, whole, epochs=2))
    real, zone = time.time, os.environ.get("TZ")

    def jump(number: int, _: object) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + (-1) ** number * number * 1e8)
        os.environ["TZ"] = f"X{number - 4:+d}"
        time.tzset()
        for path in (folder / "checkpoints").glob("step-*"):
            os.utime(path, (1e9 - number, 1e9 - number))

    try:
        with monkeypatch.context() as patch:
            failing_calls(patch, sft, "sft_loss", jump)
            assert sft.train_sft(sft_config(source, folder, save_every=1, epochs=2))
        sft.train_sft(sft_config(source, folder, epochs=2, resume=True))
    finally:
        os.environ.pop("TZ", None)
        if zone is not None:
            os.environ["TZ"] = zone
        time.tzset()
    assert outcome(folder) == outcome(whole) and numbers(folder) == numbers(whole) and steps(folder) == [7, 8]


def test_case_41_a_sink_that_fails_costs_the_sink_alone(source, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    original = loop.Monitor._use

    def close_file(self, name, action):
        if name == "metrics file" and self._step == 2 and name in self._sinks:
            self._sinks[name]._file.close()
        original(self, name, action)

    monkeypatch.setattr(loop.Monitor, "_use", close_file)
    adapter = sft.train_sft(sft_config(source, folder, epochs=1))
    assert (adapter / "adapter_model.safetensors").is_file() and len(read_json_lines(folder / "metrics.jsonl")) == 1
    assert caplog.text.count("the metrics file failed and is dropped; the run goes on") == 1


def test_case_42_a_run_that_stops_for_its_rewards_keeps_every_step_before(source, tmp_path):
    function = tmp_path / "score.py"
    good = "def f(prompts, completions):\n    {}\n    return [float(c.count('e')) for c in completions]\n"
    limited = good.format(f"n = open({str(tmp_path / 'n')!r}, 'a+'); n.write('x'); assert n.tell() < 4")
    function.write_text(limited)
    config = lambda name, **k: ppo_config(
        source, tmp_path / name, steps=4, reward=RewardSource(f"{function}:f", normalize="running"), **k
    )
    with pytest.raises(RewardError, match=r"6 of 6 completions have no score .*calls that failed: \d raised"):
        ppo.train_ppo(config("run", save_every=1000))
    assert steps(tmp_path / "run") == [0, 3]
    function.write_text(good.format("pass"))
    ppo.train_ppo(config("run", resume=True))
    ppo.train_ppo(config("whole"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_a_step_that_has_begun_to_change_the_parameters_is_not_saved(source, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    original = ppo.Trainer._backward
    calls = [0]

    def backward(*args):
        calls[0] += 1
        if calls[0] == 7:  # four updates a step: in the middle of the second
            raise RuntimeError("not out of memory")
        return original(*args)

    monkeypatch.setattr(ppo.Trainer, "_backward", backward)
    with pytest.raises(RuntimeError, match="not out of memory"):
        ppo.train_ppo(ppo_config(source, folder, save_every=1000))
    assert steps(folder) == [0]
