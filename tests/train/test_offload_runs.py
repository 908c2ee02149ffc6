"""Runs whose layers, or AdamW's moments, are in host memory: on a device that is not the CPU, beside the same runs on it alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from elsewhere_runs import settings
from models import tiny_llama
from offload_runs import CASES, MOMENTS
from runs import near, numbers, outcome
from trainers import RUNS, save_source

from rlhf_fast.model.offload import Block

RUNNER = Path(__file__).parents[1] / "offload_runs.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of a process of its own, which registers the device."""
    source, folder = save_source(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("elsewhere")
    RUNS["reward"].train(settings(source, source / "reward", "reward"))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(source), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


def ran(folder: Path, name: str, *others: str) -> list[Path]:
    for error in (folder / name).glob("*.error"):
        raise AssertionError(f"{error.name}: {error.read_text()}")
    return [folder / name / other for other in others]


def test_adapters_that_come_later_are_on_the_device(folder):
    error = folder / "adapters.error"
    assert not error.exists(), error.read_text()


@pytest.mark.parametrize("name", CASES)
def test_offloaded_layers_change_no_bit_of_a_run(folder, name):
    layers, plain = ran(folder, name, "layers", "plain")
    assert numbers(layers) == numbers(plain)
    assert outcome(layers) == outcome(plain)


@pytest.mark.parametrize("name", CASES)
def test_two_layers_are_on_the_device_at_a_time(folder, name):
    ran(folder, name)
    told = json.loads((folder / name / "copies.json").read_text())
    assert told["most"] == 2 * Block(list(tiny_llama().model.layers[0].parameters())).size
    assert told["copied"] > 2 * 3


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_on_the_host_give_the_numbers_of_the_device_but_for_rounding(folder, name):
    both, plain = ran(folder, name, "both", "plain")
    near(both, plain)


@pytest.mark.parametrize("name", MOMENTS)
def test_a_killed_run_goes_on_bit_for_bit(folder, name):
    killed, both = ran(folder, name, "killed", "both")
    assert numbers(killed) == numbers(both)
    assert outcome(killed) == outcome(both)


@pytest.mark.parametrize("name", MOMENTS)
def test_its_checkpoint_goes_on_with_everything_on_the_device(folder, name):
    changed, plain = ran(folder, name, "changed", "plain")
    near(changed, plain)
