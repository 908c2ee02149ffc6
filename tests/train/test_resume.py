from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import save_tiny

from rlhf_fast.train.checkpoint import SAVE_FAULTS

DRIVER = Path(__file__).parent / "kill_driver.py"

# Each save passes a point once; the third save (after step 2) is killed, so that there is something to go back to.
POINTS = [f"{name}:3" for name in SAVE_FAULTS if name not in ("save.mid_prune", "save.mid_file", "save.file")]
POINTS += [
    "save.mid_file:7",
    "save.file:8",
    "save.mid_prune:1",
]  # several files a save; the first prune is in the third
MID_STEP = ["train.step:6", "train.step:11"]  # four updates a step: within the second and the third


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model")
    prompts = ["the film", "a story of", "we saw", "it was", "this"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    command = [sys.executable, DRIVER, folder, *POINTS, *MID_STEP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def final_files(folder: Path, name: str) -> dict[str, bytes]:
    run = folder / name
    files = ["adapter/adapter_model.safetensors", "value/adapter_model.safetensors"]
    last = max((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    found = {f: (run / f).read_bytes() for f in files}
    return found | {p.name: p.read_bytes() for p in last.glob("*.safetensors")}


def test_case_27_at_least_ten_points_of_a_save_are_covered():
    assert len(POINTS) >= 10


@pytest.mark.parametrize("point", [*POINTS, *MID_STEP])
def test_case_27_28_a_killed_run_resumes_to_the_same_bits(runs, point):
    folder, statuses = runs
    assert statuses[point] == 0
    whole, resumed = final_files(folder, "whole"), final_files(folder, point.replace(":", "-"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert whole[name] == resumed[name], f"{name} differs after a kill at {point}"


def test_a_resumed_run_logs_every_step_once_with_the_same_numbers(runs):
    folder, _ = runs

    def numbers(name: str) -> list[dict]:
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows]

    assert numbers("train.step-11") == numbers("whole") and len(numbers("whole")) == 4


def cli(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "rlhf_fast", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def ppo_arguments(folder: Path, run: str, steps: int) -> list[str]:
    scorer = Path(__file__).parent / "scorers.py"
    options = {
        "model.path": folder / "model", "data.path": folder / "prompts.jsonl", "run.output_dir": folder / run,
        "reward.source": f"{scorer}:count_e", "rollout.batch_size": 8, "rollout.max_new_tokens": 6,
        "ppo.minibatch_size": 8, "ppo.micro_batch_size": 8, "steps": steps, "run.save_every": 1000, "run.threads": 1,
        "run.sample_every": 0, "model.dtype": "float32",  # as the runs of the driver have it, whatever the processor
    }  # fmt: skip
    return ["ppo", *(str(x) for name, value in options.items() for x in (f"--{name}", value))]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_case_34_a_signal_saves_and_ends_with_its_status(runs, tmp_path, number, status):
    folder, _ = runs
    name = f"signal-{status}"
    run = cli(*ppo_arguments(folder, name, steps=100_000))
    metrics = folder / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.05)
    run.send_signal(number)
    _, err = run.communicate(timeout=120)
    assert run.returncode == status, err
    steps = [int(p.name.split("-")[1]) for p in (folder / name / "checkpoints").glob("step-*")]
    assert max(steps) >= 2 and max(steps) == metrics.read_text().count("\n")


def test_a_used_folder_is_refused_and_a_changed_setting_is_named(runs):
    folder, _ = runs
    again = cli(*ppo_arguments(folder, "whole", steps=4))
    _, err = again.communicate(timeout=120)
    assert again.returncode == 1 and "is not empty" in err and "Traceback" not in err
    changed = cli(*ppo_arguments(folder, "whole", steps=4), "--run.resume", "--model.lora.r", "8")
    _, err = changed.communicate(timeout=120)
    assert changed.returncode == 1 and "lora" in err and "Traceback" not in err
