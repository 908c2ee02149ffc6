"""Training on several ranks: the numbers of one, and what happens when a rank fails, cases of the fault list by number."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_tiny
from processes import until
from rank_runs import RUNS, SCORE, common, of_raft, of_sft
from ranks_of import start
from runs import TEXTS, failing_calls, not_finite, numbers, outcome, steps, write_lines

from rlhf_fast import cli
from rlhf_fast.config import (
    DataConfig,
    ModelConfig,
    OnlineDPOUpdateConfig,
    OptimConfig,
    PPOConfig,
    PPOUpdateConfig,
    RaftUpdateConfig,
    RolloutConfig,
)
from rlhf_fast.model import SharedModel
from rlhf_fast.train import loop, raft, sft
from rlhf_fast.train.checkpoint import CheckpointStore
from rlhf_fast.train.ranks import LETTER, ProcessRanks, RankError, Ranks, join

CURVE = 1e-5
"""Largest difference of a loss from that of one rank (fp32)."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny(folder / "model")
    write_lines(folder / "texts.jsonl", [{"text": t} for t in TEXTS * 3])
    write_lines(folder / "prompts.jsonl", [{"prompt": t[:8]} for t in TEXTS])
    pairs = [{"prompt": "", "chosen": f"a good film {c}.", "rejected": f"a bad story {c}."} for c in "abcdefghijkl"]
    write_lines(folder / "pairs.jsonl", pairs)
    labels = [
        {"prompt": "a ", "completion": p[c], "label": c == "chosen"} for p in pairs for c in ("chosen", "rejected")
    ]
    write_lines(folder / "labels.jsonl", labels)
    return folder


@pytest.fixture(scope="module", autouse=True)
def warm(source, tmp_path_factory):
    """Forked ranks get what a first run imports."""
    sft.train_sft(of_sft(source, tmp_path_factory.mktemp("warm") / "run"))


def losses(folder: Path) -> list[dict[str, float]]:
    of = lambda name: name.endswith(("loss", "grad_norm", "score")) or name in ("kl", "accuracy", "length")
    return [
        {k: v for k, v in row.items() if of(k) or k.startswith(("lr/", "reward", "eval"))} for row in numbers(folder)
    ]


def assert_same_curve(found: Path, expected: Path, rows: int) -> None:
    ours, theirs = losses(found), losses(expected)
    assert len(ours) == len(theirs) == rows
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=CURVE, rel=CURVE)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_learn_what_one_learns(source, tmp_path, name):
    train, config = RUNS[name]
    train(config(source, tmp_path / "one"))
    ranks = start(lambda _: train(config(source, tmp_path / "two")), tmp_path)
    assert ranks.wait() == [0, 0], ranks.words(0) + ranks.words(1)
    rows = len(numbers(tmp_path / "one"))
    assert_same_curve(tmp_path / "two", tmp_path / "one", rows)
    assert outcome(tmp_path / "two").keys() == outcome(tmp_path / "one").keys()
    assert len({row["loss"] if "loss" in row else next(iter(row.values())) for row in losses(tmp_path / "one")}) > 1


@pytest.mark.parametrize(
    ("name", "world"), [("sft", 5), ("ppo", 4), ("ppo with shared layers", 3), ("online-dpo across pairs", 4)]
)
def test_case_61_ranks_without_rows_hang_nobody_and_the_numbers_are_those_of_one(source, tmp_path, name, world):
    train, config = RUNS[name]
    rollout = {} if "online" in name else {"rollout": RolloutConfig(batch_size=3, max_new_tokens=6)}
    changes = {"batch_size": 3} if name == "sft" else rollout
    train(config(source, tmp_path / "one", changes))
    ranks = start(lambda _: train(config(source, tmp_path / "many", changes)), tmp_path, world)
    assert ranks.wait() == [0] * world, ranks.words(world - 1)
    assert_same_curve(tmp_path / "many", tmp_path / "one", 4 if name == "sft" else 3)


@pytest.mark.parametrize(
    "name", ["sft", "kto", "ppo", "lite_ppo", "online-dpo", "online-dpo across pairs", "raft without shared layers"]
)
def test_a_base_that_is_spread_over_the_ranks_learns_the_same(source, tmp_path, monkeypatch, name):
    train, config = RUNS[name] if name in RUNS else (raft.train_raft, of_raft(0))
    size = {"batch_size": 4, "micro_batch_size": 1, "max_steps": 3}
    if name.startswith(("online-dpo", "raft")):
        # Two prompts a rank. Shares of three pairs or completions are uneven, and of one a rank has nothing.
        size = {"rollout": RolloutConfig(batch_size=16, max_new_tokens=6)}
        if name == "online-dpo":
            size["dpo"] = OnlineDPOUpdateConfig(epochs=2, minibatch_size=3, micro_batch_size=1)
        elif name.startswith("raft"):
            size["raft"] = RaftUpdateConfig(best=2, epochs=2, minibatch_size=3, micro_batch_size=1)
    elif name == "ppo":
        settings = PPOUpdateConfig(epochs=2, minibatch_size=4, micro_batch_size=2)
        size = {"rollout": RolloutConfig(batch_size=8, max_new_tokens=6), "ppo": settings}
    elif name == "lite_ppo":
        size = {"rollout": RolloutConfig(batch_size=16, max_new_tokens=6)}

    def work(folder: Path, shard: bool) -> None:
        settings = dataclasses.replace(config(source, folder), **size)
        model = dataclasses.replace(settings.model, shard=shard, gradient_checkpointing=name == "sft")
        held = failing_calls(monkeypatch, loop.Run, "update", lambda n, a: weights.append(local_weights(a[0].model)))
        weights: list[tuple[int, int]] = []
        train(dataclasses.replace(settings, model=model))
        assert held[0] and all(own == whole / (2 if shard else 1) for own, whole in weights)

    assert start(lambda _: work(tmp_path / "one", False), tmp_path / "log", 1).wait() == [0]
    ranks = start(lambda _: work(tmp_path / "two", True), tmp_path / "log")
    assert ranks.wait() == [0, 0], ranks.words(0) + ranks.words(1)
    assert_same_curve(tmp_path / "two", tmp_path / "one", 3)


def local_weights(model: SharedModel) -> tuple[int, int]:
    """(numbers of the decoder layers that this process holds, numbers that they have)."""
    weights = [p for layer in model.backbone.layers for p in layer.parameters()]
    return sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in weights), sum(p.numel() for p in weights)


def test_a_spread_base_wants_equal_shares_and_names_a_rank_that_dies(source, tmp_path, monkeypatch):
    def work(rank: int, size: int) -> None:
        if rank == 1:  # the other one waits for its part of a layer
            failing_calls(monkeypatch, sft, "sft_loss", lambda n, _: os.kill(os.getpid(), 9) if n == 4 else None)
        settings = of_sft(source, tmp_path / str(size), {"batch_size": size})
        sft.train_sft(dataclasses.replace(settings, model=dataclasses.replace(settings.model, shard=True)))

    ranks = start(lambda rank: work(rank, 3), tmp_path / "log")
    assert ranks.wait() == [1, 1]
    assert "'batch_size' got 3, expected a multiple of the 2 ranks with model.shard" in ranks.words(0)
    ranks = start(lambda rank: work(rank, 4), tmp_path / "log")
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert "rank 0 stops: rank 1 died or cannot be reached (step 2, weights)" in ranks.words(0)
    with pytest.raises(ValueError, match=r"'model\.shard' got True, expected False with shared_layers = 1"):
        PPOConfig(**{**common(source, tmp_path), "model": ModelConfig("x", shared_layers=1, shard=True)}, reward=SCORE)


def test_case_62_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(source, tmp_path, monkeypatch):
    def work(folder: Path, spoil: Callable[[int], bool], rank: int) -> None:
        calls, original = [0], sft.sft_loss

        def loss(*args):
            calls[0] += 1
            found = original(*args)
            return not_finite(found, "nan") if spoil(calls[0]) else found

        monkeypatch.setattr(sft, "sft_loss", loss)
        sft.train_sft(of_sft(source, folder, {"micro_batch_size": 2}))

    # Of four rows, two on each rank: the second call of a rank is its second step, and the fourth of one process.
    ranks = start(lambda rank: work(tmp_path / "two", lambda n: rank == 1 and n == 2, rank), tmp_path)
    assert ranks.wait() == [0, 0]
    assert start(lambda rank: work(tmp_path / "one", lambda n: n == 4, rank), tmp_path / "log", 1).wait() == [0]
    found, expected = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert [row.get("skipped_updates") for row in found] == [None, 1.0, None, None]
    for a, b in zip(found, expected, strict=True):
        assert (a["loss"] is None) == (b["loss"] is None) == (a["step"] == 2)
        assert a["step"] == 2 or a["loss"] == pytest.approx(b["loss"], abs=CURVE)
    assert "update skipped in step 2" in ranks.words(0) and "not finite on rank 1" in ranks.words(0)
    bad = [json.loads(line) for line in (tmp_path / "two" / loop.BAD_UPDATES).read_text().splitlines()]
    assert [(row["step"], len(row["records"])) for row in bad] == [(1, 4)]


@pytest.mark.parametrize("what", ["setting", "data", "output"])
def test_case_63_ranks_that_are_not_of_one_run_stop_at_the_start(source, tmp_path, what):
    for machine, texts in enumerate((TEXTS, [*TEXTS, "one more"])):
        (tmp_path / str(machine)).mkdir()
        write_lines(tmp_path / str(machine) / "texts.jsonl", [{"text": t} for t in texts])

    def work(rank: int) -> None:
        os.chdir(tmp_path / str(rank if what == "data" else 0))
        changes: dict = {"data": DataConfig("texts.jsonl")}
        if what == "setting" and rank:
            changes["optim"] = OptimConfig(lr=0.1)
        folder = tmp_path / ("another" if what == "output" and rank else "run")
        sft.train_sft(of_sft(source, folder, changes))

    ranks = start(work, tmp_path / "log")
    assert ranks.wait() == [1, 1]
    field = {"setting": "config", "data": "data", "output": "settings"}[what]
    for rank in (0, 1):
        assert re.search(
            rf"RankError: ranks 0 and 1 are not of one run: their '{field}' is \w+ and \w+", ranks.words(rank)
        )
    assert not (tmp_path / "run").exists() and not (tmp_path / "another").exists()


@pytest.mark.parametrize("name", ["sft", "ppo"])
@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)])
def test_case_64_a_run_goes_on_with_another_number_of_ranks(source, tmp_path, name, worlds):
    train, config = RUNS[name]
    start(lambda _: train(config(source, tmp_path / "whole")), tmp_path / "log", 1).wait()
    updates = 4 if name == "ppo" else 1
    fault = {0: {"RLHF_FAST_FAULT": f"train.step:{2 * updates + 1}"}}
    killed = start(lambda _: train(config(source, tmp_path / "run", save_every=1)), tmp_path / "log", worlds[0], fault)
    assert killed.wait()[0] == -signal.SIGKILL and steps(tmp_path / "run") == [1, 2]
    again = start(lambda _: train(config(source, tmp_path / "run", resume=True)), tmp_path / "log", worlds[1])
    assert again.wait() == [0] * worlds[1], again.words(0)
    assert_same_curve(tmp_path / "run", tmp_path / "whole", 3 if name == "ppo" else 4)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_two_ranks_with_dropout_go_on_bit_for_bit_after_a_kill(source, tmp_path, name):
    train, config = RUNS[name]

    def work(folder: Path, **run: object) -> None:
        settings = config(source, folder, save_every=2, **run)
        lora = dataclasses.replace(settings.model.lora, dropout=0.2)
        train(dataclasses.replace(settings, model=dataclasses.replace(settings.model, lora=lora)))

    assert start(lambda _: work(tmp_path / "whole"), tmp_path / "log").wait() == [0, 0]
    fault = {1: {"RLHF_FAST_FAULT": "train.sum:3" if name == "sft" else "train.sum:9"}}
    killed = start(lambda _: work(tmp_path / "run"), tmp_path / "log", 2, fault)
    assert killed.wait() == [1, -signal.SIGKILL]
    assert start(lambda _: work(tmp_path / "run", resume=True), tmp_path / "log").wait() == [0, 0]
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


DEATHS = {
    "forward": (1, None),
    "before the sum": (1, "train.step:3"),
    "in the sum": (1, "train.sum:3"),
    "save": (0, "save.mid_file:12"),
}


@pytest.mark.parametrize("where", DEATHS)
def test_case_60_a_rank_that_dies_ends_the_others_by_its_name_and_leaves_a_whole_checkpoint(
    source, tmp_path, monkeypatch, where
):
    victim, fault = DEATHS[where]

    def work(rank: int, **run: object) -> None:
        if fault is None and rank == victim and not run:
            failing_calls(monkeypatch, sft, "sft_loss", lambda n, _: os.kill(os.getpid(), 9) if n == 6 else None)
        sft.train_sft(of_sft(source, tmp_path / "run", save_every=1, **run))

    ranks = start(work, tmp_path / "log", 2, {victim: {"RLHF_FAST_FAULT": fault or ""}})
    found = ranks.wait()  # for less than rank_timeout, which is 600 s
    assert (found[victim], found[1 - victim]) == (-signal.SIGKILL, 1)
    assert re.search(
        rf"RankError: rank {1 - victim} stops: .*rank {victim}\b.* (died|is gone)", ranks.words(1 - victim)
    )
    saved = CheckpointStore(tmp_path / "run" / "checkpoints").load_latest()
    assert saved is not None and saved.step in (1, 2)
    assert start(lambda rank: work(rank, resume=True), tmp_path / "log").wait() == [0, 0]
    assert len(numbers(tmp_path / "run")) == 4


def test_case_60_what_a_rank_raises_is_told_by_the_others(source, tmp_path, monkeypatch):
    def work(rank: int) -> None:
        if rank == 1:
            failing_calls(monkeypatch, sft, "sft_loss", lambda n, _: [][1] if n == 3 else None)
        sft.train_sft(of_sft(source, tmp_path / "run"))

    ranks = start(work, tmp_path / "log", 3)
    assert ranks.wait() == [1, 1, 1]
    for rank in (0, 2):
        assert f"rank {rank} stops: rank 1 failed: IndexError: list index out of range" in ranks.words(rank)
    assert steps(tmp_path / "run") == [0, 2]  # what was done before the step that failed


def test_case_60_a_rank_that_never_comes_is_named_after_the_timeout(source, tmp_path, monkeypatch):
    def work(rank: int) -> None:
        if rank == 0:
            sft.train_sft(of_sft(source, tmp_path / "run", rank_timeout=2.0))

    ranks = start(work, tmp_path / "log")
    assert ranks.wait() == [1, 0]
    assert "RankError: rank 1 did not start within 2 s" in ranks.words(0)


def test_case_60_a_rank_that_hangs_ends_the_run_after_the_timeout(source, tmp_path, monkeypatch):
    def work(rank: int) -> None:
        if rank == 1:
            told = lambda: "did not come" in (tmp_path / "log" / "rank-0.err").read_text()
            failing_calls(monkeypatch, sft, "sft_loss", lambda n, _: until(told) if n == 6 else None)
        sft.train_sft(of_sft(source, tmp_path / "run", rank_timeout=10.0))

    ranks = start(work, tmp_path / "log")
    assert ranks.wait() == [1, 1]
    assert "rank 0 stops: rank 1 did not come within 10 s (step 3, values)" in ranks.words(0)
    assert steps(tmp_path / "run") == [0, 2]


def test_case_65_a_slow_rank_is_named_and_waited_for(source, tmp_path, monkeypatch):
    def work(rank: int) -> None:
        if rank == 1:
            told = lambda: "in step 3" in (tmp_path / "log" / "rank-0.err").read_text()
            failing_calls(monkeypatch, sft, "sft_loss", lambda n, _: until(told) if n == 3 else None)
        sft.train_sft(of_sft(source, tmp_path / "run", slow_rank=1.0))

    ranks = start(work, tmp_path / "log", 3)
    assert ranks.wait() == [0, 0, 0] and len(numbers(tmp_path / "run")) == 4
    told = re.findall(r"waiting (\d+) s for rank 1 \(in step 3\), which is slow: values of step 3", ranks.words(0))
    assert told and int(told[0]) >= 1
    assert "slow" not in ranks.words(1) + ranks.words(2)


def test_a_signal_to_one_rank_stops_all_after_the_step_with_a_checkpoint(source, tmp_path, monkeypatch):
    def work(rank: int) -> None:
        if rank == 1:
            failing_calls(monkeypatch, sft, "sft_loss", lambda n, _: os.kill(os.getpid(), 15) if n == 3 else None)
        sft.train_sft(of_sft(source, tmp_path / "run"))

    assert start(work, tmp_path / "log").wait() == [143, 143]
    assert steps(tmp_path / "run") == [0, 2] and len(numbers(tmp_path / "run")) == 2


def test_exchanges_of_three_ranks(tmp_path):
    def work(rank: int) -> None:
        torch.manual_seed(rank)
        with ProcessRanks(3, 20.0, 10.0, torch.device("cpu")) as ranks:
            long = "é" * (LETTER * rank)
            assert [len(text) for text in ranks.gather(long)] == [0, LETTER, 2 * LETTER]
            assert ranks.join([rank] * rank) == [1, 2, 2]
            own = {"x": torch.full((rank, 1 + rank), float(rank)), "m": torch.ones(rank, dtype=torch.bool)}
            rows = ranks.rows(own if rank else {})
            assert rows["x"].tolist() == [[1.0, 1.0, 0.0], [2.0] * 3, [2.0] * 3] and rows["m"].tolist() == [True] * 3
            parameters = {n: torch.nn.Parameter(torch.zeros(2, 3)) for n in "abc"}
            parameters["a"].grad = torch.full((2, 3), rank + 1.0)
            if rank == 1:
                parameters["b"].grad = torch.full((2, 3), float("inf"))
            assert ranks.sum_gradients(parameters) == [1]
            assert parameters["a"].grad.tolist() == [[6.0] * 3] * 2 and parameters["b"].grad.isinf().all()
            assert parameters["c"].grad is None
            state = {"w": torch.arange(3).bfloat16(), "n": torch.tensor(7), "empty": torch.zeros(0)}
            value, tensors = ranks.share_state({"step": 5}, state) if ranks.first else ranks.share_state({}, {})
            assert value == {"step": 5} and all(torch.equal(tensors[n], x) for n, x in state.items())
            assert ranks.mean([1.0, 2.0, 3.0, 6.0], lambda x: sum(x) / len(x)) == 3.0

    ranks = start(work, tmp_path, 3)
    assert ranks.wait() == [0, 0, 0], ranks.words(0) + ranks.words(1) + ranks.words(2)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8])
def test_shares_cover_the_rows_in_order_and_differ_by_one_at_most(rows):
    ranks, found = Ranks(), []
    ranks.world = 3
    for ranks.rank in range(3):
        found.append(range(rows)[ranks.share(rows)])
    assert [i for part in found for i in part] == list(range(rows))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_torchrun_trains_from_the_command_line_and_one_rank_reports(source, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",  # a port that nobody can get before it listens
        "--nproc-per-node",
        "2",
    ]
    settings = {
        "--model.path": source / "model",
        "--model.dtype": "float32",
        "--data.path": source / "texts.jsonl",
        "--run.output_dir": tmp_path / "run",
        "--run.threads": 1,
        "--batch_size": 4,
        "--micro_batch_size": 2,
        "--max_steps": 2,
    }
    arguments = [str(x) for pair in settings.items() for x in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "-m", "rlhf_fast.cli", "sft", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path / "run" / "adapter")) == 1 and done.stdout.count("sft  2/2") == 1
    assert len(numbers(tmp_path / "run")) == 2 and steps(tmp_path / "run") == [0, 2]


def test_half_of_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RankError, match="WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set"):
        join(1.0, 1.0, torch.device("cpu"))


def test_ranks_on_gpus_want_nccl(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RankError, match="no NCCL for ranks on CUDA devices"):
        ProcessRanks(2, 1.0, 1.0, torch.device("cuda", 0)).__enter__()


def test_what_does_not_train_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["doctor"]) == 2
    assert "doctor runs in one process, expected no torchrun" in capsys.readouterr().err
