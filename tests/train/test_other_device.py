"""Every trainer on a device that is not the CPU: the same numbers, and no tensor left behind on the host."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from elsewhere_runs import ALL, MORE, host_engine, judged, settings
from runs import close, near, numbers, outcome
from trainers import RUNS, save_source

from rlhf_fast.evaluate.compare import evaluate
from rlhf_fast.train import online

RUNNER = Path(__file__).parents[1] / "elsewhere_runs.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = save_source(tmp_path_factory.mktemp("source"))
    for name in ("sft", "reward"):
        RUNS[name].train(settings(folder, folder / name, name))
    return folder


@pytest.fixture(scope="module")
def elsewhere(source, tmp_path_factory) -> Path:
    """Runs of a process of its own, which registers the device."""
    folder = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(source), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ALL)
def test_every_trainer_computes_elsewhere_what_it_does_on_the_cpu_and_resumes_there(
    source, elsewhere, tmp_path, monkeypatch, name
):
    error = elsewhere / f"{name}.error"
    assert not error.exists(), error.read_text()
    monkeypatch.setattr(online, "engine_of", host_engine)
    RUNS[MORE.get(name, name)].train(settings(source, tmp_path / "cpu", name))
    near(elsewhere / name, tmp_path / "cpu")
    if name not in MORE:
        assert numbers(elsewhere / f"{name}.again") == numbers(elsewhere / name)
        assert outcome(elsewhere / f"{name}.again") == outcome(elsewhere / name)


def test_the_layers_of_a_base_to_be_sharded_wait_on_the_host(elsewhere):
    error = elsewhere / "shard.error"
    assert not error.exists(), error.read_text()


def test_evaluate_samples_and_judges_elsewhere_as_on_the_cpu(source, elsewhere, tmp_path):
    error = elsewhere / "evaluate.error"
    assert not error.exists(), error.read_text()
    expected = json.loads(evaluate(judged(source, tmp_path / "cpu")).read_text())
    close(json.loads((elsewhere / "evaluate" / "evaluation.json").read_text()), expected)


def test_a_run_goes_on_elsewhere_with_a_warning(source, elsewhere, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(elsewhere / "ppo", folder)
    shutil.rmtree(folder / "checkpoints" / "step-2")
    with caplog.at_level("WARNING"):
        RUNS["ppo"].train(settings(source, folder, "ppo", resume=True))
    assert "the kind of device has changed" in caplog.text
    close(numbers(folder), numbers(elsewhere / "ppo"))
