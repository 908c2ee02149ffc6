"""2 N steps are the same bits as N steps, kill -9, a resume and N steps, for every command that trains."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from checkpoints import child
from runs import numbers, outcome, steps
from trainers import RUNS, STEPS, save_source

from rlhf_fast.cli import COMMANDS
from rlhf_fast.train.raft import KEPT


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module", autouse=True)
def warm(source, tmp_path_factory):
    """Forked children get what a first run imports."""
    kind = RUNS["sft"]
    kind.train(kind.config(source, tmp_path_factory.mktemp("warm") / "run"))


def test_every_command_that_trains_is_among_them():
    trained = {name: c.run for name, c in COMMANDS.items() if c.run.startswith("rlhf_fast.train.")}
    assert {name.partition(":")[0] for name in RUNS} == set(trained)
    for name, kind in RUNS.items():
        assert trained[name.partition(":")[0]] == f"{kind.train.__module__}:{kind.train.__name__}"


@pytest.mark.parametrize("name", RUNS)
def test_case_28_37_38_every_trainer_goes_on_bit_for_bit_after_a_kill_and_does_so_twice(source, tmp_path, name):
    kind = RUNS[name]
    run = lambda folder, **k: lambda: kind.train(kind.config(source, tmp_path / folder, **k))
    assert child(run("whole")) == 0
    killed = child(run("a", save_every=2), f"train.step:{3 * kind.updates + 1}")
    assert killed == -signal.SIGKILL and steps(tmp_path / "a") == [0, 2]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = numbers(tmp_path / "whole")
    assert len(whole) == STEPS and len({json.dumps({**row, "step": 0}) for row in whole}) == STEPS
    for again in ("a", "b"):
        assert child(run(again, resume=True)) == 0
        assert numbers(tmp_path / again) == whole
        assert outcome(tmp_path / again) == outcome(tmp_path / "whole")
        for kept in (tmp_path / "whole").glob(KEPT):
            assert (tmp_path / again / KEPT).read_bytes() == kept.read_bytes() != b""
