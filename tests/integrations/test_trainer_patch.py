"""bench/trainer_patch.py: its comparison, its table, and what it asks to install, without a framework."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "trainer_patch.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("trainer_patch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as for a script
        spec.loader.exec_module(module)
    return module


def run(losses, *, sizes=None, norms=(1.0, 2.0, 4.0), seconds=(9.0, 9.0, 2.0), peak=100.0, data=(1, 2, 3), reached=0):
    return {
        "losses": list(losses),
        "sizes": list(losses if sizes is None else sizes),
        "norms": list(norms),
        "seconds": list(seconds),
        "generation": [0.0] * len(seconds),
        "data": list(data),
        "peak": peak,
        "first peak": 2 * peak,
        "reached": reached,
        "fell through": 0,
    }


@pytest.mark.parametrize(
    ("plain", "ours", "sizes", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.5, 2.5], [1.0, 2.0], 0.5),
        ([1.0, -2.0], [1.0, -3.0], [1.0, -2.0], 0.5),
        ([0.0, 1.0], [0.0, 1.0], [0.0, 1.0], 0.0),
        ([0.0], [1e-9], [0.0], float("inf")),
        ([0.0], [1e-9], [2.0], 5e-10),
        ([1.0, 1.0], [float("nan"), 1.0], [1.0, 1.0], float("inf")),
    ],
)
def test_largest_difference(script, plain, ours, sizes, expected):
    assert script.largest(plain, ours, sizes) == pytest.approx(expected)


@pytest.mark.parametrize("lengths", [(2, 3, 2), (2, 2, 3), (0, 0, 0)])
def test_runs_of_other_lengths_are_not_compared(script, lengths):
    with pytest.raises(ValueError, match="one value per step"):
        script.largest(*([1.0] * n for n in lengths))


def test_the_time_of_a_step_is_that_of_its_fastest_round(script):
    assert script.fastest([[50.0, 1.0, 5.0], [60.0, 3.0, 2.0]], skip=1) == pytest.approx((1.0 + 2.0) / 2)
    with pytest.raises(ValueError, match="more than skip = 3"):
        script.fastest([[1.0, 1.0, 1.0]], skip=3)


def test_a_loss_whose_terms_cancel_is_judged_by_their_size(script):
    plain, ours = [1e-8, -2e-8, 1e-8], [2e-8, -1e-8, 1e-8]
    sizes = [0.8, 0.8, 0.8]
    row = script.compared("grpo", [run(plain, sizes=sizes)], [run(ours, sizes=sizes, reached=7)])
    assert row["loss"] == pytest.approx(1.0) and row["terms"] == pytest.approx(1.25e-8)
    assert row["reached"] == 7 and script.agrees(row)


@pytest.mark.parametrize(
    "other",
    [
        run([1.0, 2.0, 3.0001]),
        run([1.0, 2.0, 3.0], norms=[1.0, 2.0, 4.001]),
        run([1.0, 2.0, 3.0], data=(1, 2, 4)),
        run([1.0, 2.0, float("nan")]),
    ],
    ids=["loss", "norm", "completions", "nan"],
)
def test_a_difference_is_one(script, other):
    assert script.agrees(script.compared("dpo", [run([1.0, 2.0, 3.0])] * 2, [run([1.0, 2.0, 3.0])] * 2))
    assert not script.agrees(script.compared("dpo", [run([1.0, 2.0, 3.0])], [other]))


def test_every_round_is_compared(script):
    """A second round with other losses shows, though the first ones agree."""
    plain = [run([1.0, 2.0, 3.0])] * 2
    assert script.compared("dpo", plain, plain)["repeats"]
    assert not script.compared("dpo", plain, [plain[0], run([1.0, 2.0, 3.5])])["repeats"]


def test_the_table_has_both_figures_and_their_ratios(script):
    row = script.compared(
        "dpo",
        [run([1.0, 2.0, 3.0], seconds=(9.0, 9.0, 0.5), peak=300.0)],
        [run([1.0, 2.0, 3.0], seconds=(9.0, 9.0, 0.25), peak=150.0, reached=40)],
    )
    header, rule, line = script.table([row]).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")
    for text in ("500.0 / 250.0", "2.00 x", "300 / 150", "0.50 x", "600 / 300", "| 40 |"):
        assert text in line


def test_what_is_missing_is_named_with_its_extra(script):
    assert script.missing(["dpo", "verl"], has=lambda name: True) is None
    assert script.missing(["grpo", "dpo"], has=lambda name: None).endswith("pip install 'rlhf-fast[trl]'")
    assert script.missing(["dpo", "verl"], has=lambda name: None).endswith("pip install 'rlhf-fast[trl,verl]'")
    assert "verl cannot" in script.missing(["dpo", "verl"], has=lambda name: None if name == "verl" else True)


@pytest.mark.parametrize("name", ["trl", "verl"])
def test_the_extra_is_the_supported_range(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    low, high = import_module(f"rlhf_fast.integrations.{name}").FRAMEWORK.versions
    assert extras[name] == [f"{name}>={low},<{high}"]


def test_ranks_are_one_run(script):
    """The slowest rank makes the step, the largest the memory; every loss is compared."""
    a = run([1.0, 2.0], seconds=(9.0, 1.0), peak=100.0, data=(1, 2), reached=3)
    b = run([3.0, 4.0], seconds=(8.0, 2.0), peak=150.0, data=(3, 4), reached=4)
    found = script.ranks.merged([a, b])
    assert (found["losses"], found["data"]) == ([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])
    assert (found["seconds"], found["peak"], found["reached"]) == ([9.0, 2.0], 150.0, 7)
    assert found["norms"] == a["norms"]
    with pytest.raises(ValueError, match="norms must be those of every rank"):
        script.ranks.merged([a, run([3.0, 4.0], norms=(1.0, 2.0, 4.1))])


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trains with TRL itself, which is an extra")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_of_a_real_trainer_train_alike_with_and_without_the_patch(parallel):
    """GRPO: 0 means that every loss and every gradient norm of both ranks agreed, and that the model was sharded or replicated."""
    sizes = {
        "steps": 3,
        "rounds": 1,
        "vocab": 256,
        "hidden": 64,
        "layers": 1,
        "batch": 4,
        "prompt": 6,
        "response": 6,
        "lr": 1e-3,
    }
    options = ["--trainer", "grpo", "--parallel", parallel, *(f"--{name}={size}" for name, size in sizes.items())]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = int(done.stdout.splitlines()[-1].split("|")[-2])
    assert f"ranks under {parallel}" in done.stdout and calls >= 2 * 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "2"],
        ["--rounds", "0"],
        ["--batch", "6"],
        ["--hidden", "100"],
        ["--trainer", "ppo"],
        ["--parallel", "ddp"],
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments):
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and arguments[0].strip("-") in done.stderr
