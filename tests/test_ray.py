"""`rlhf-fast ray` on a real cluster of this machine with two logical nodes: the numbers of torchrun, and what dies is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_vllm
import pytest
from models import save_tiny
from processes import alive, gone, until
from runs import TEXTS, close, numbers, outcome, steps, write_lines

from rlhf_fast import cli
from rlhf_fast.config import RayConfig
from rlhf_fast.model import LoraConfig, SharedModel

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

from rlhf_fast import placement  # noqa: E402

ROOT = Path(__file__).parents[1]
NODE = {"num_cpus": 2, "num_gpus": 0, "resources": {"trainer": 1}, "object_store_memory": 80 << 20}
FAR = {**NODE, "resources": {"trainer": 1, "far": 1}}
SCORE = """
import json, os
from pathlib import Path

def score(prompts, completions):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "RLHF_FAST_REWARD_TOKEN")
    here = Path(__file__).with_name("rank-" + os.environ["RANK"])
    here.write_text(json.dumps({"pid": os.getpid(), **{name: os.environ.get(name) for name in names}}))
    return [float(text.count("e")) for text in completions]
"""


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:  # what the nodes' processes start with
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.delenv("RAY_ADDRESS", raising=False)
        found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        found.add_node(**FAR)
        yield found
        found.shutdown()


@pytest.fixture
def folder(tmp_path) -> Path:
    save_tiny(tmp_path / "model")
    write_lines(tmp_path / "texts.jsonl", [{"text": t} for t in TEXTS * 3])
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": t[:8]} for t in TEXTS])
    (tmp_path / "rewards.py").write_text(SCORE)
    return tmp_path


def sft(folder: Path, name: str, count: int, *more: str) -> list[str]:
    words = f"sft --model.path {folder}/model --data.path {folder}/texts.jsonl --model.dtype float32 --run.threads 1"
    words += f" --batch_size 4 --micro_batch_size 2 --max_steps {count} --run.output_dir {folder / name}"
    return [*words.split(), *more]


def ppo(folder: Path, name: str, count: int, *more: str) -> list[str]:
    words = f"ppo --model.path {folder}/model --data.path {folder}/prompts.jsonl --model.dtype float32 --run.threads 1"
    words += f" --model.lora.r 2 --steps {count} --rollout.batch_size 4 --rollout.max_new_tokens 6 --reward.workers 0"
    words += f" --ppo.minibatch_size 4 --ppo.micro_batch_size 2 --reward.source {folder}/rewards.py:score"
    words += f" --rollout.correction none --data.max_tokens 32 --run.output_dir {folder / name} --run.sample_every 0"
    return [*words.split(), *more]


def placed(cluster: Cluster, words: list[str], *more: str) -> list[str]:
    """Two ranks, a node each, unless told otherwise."""
    own = f"--ray.address {cluster.address} --ray.ranks 2 --ray.gpus_per_rank 0 --ray.rank_resources trainer=1"
    return ["ray", *words, *own.split(), *more]


def serving(folder: Path) -> list[str]:
    """A server that is no vLLM, which leaves its process's number in the folder."""
    script = folder / "python"
    program = f'exec "{sys.executable}" "{Path(fake_vllm.__file__)}" "$@"'
    script.write_text(f'#!/bin/sh\nexport OMP_NUM_THREADS=1\necho $$ > "{folder}/server"\n{program}\n')
    script.chmod(0o755)
    return ["--rollout.engine", "vllm", "--rollout.vllm.python", str(script), "--ray.vllm_gpus", "0"]


def rank(folder: Path, number: int) -> dict:
    return json.loads((folder / f"rank-{number}").read_text())


def pids(folder: Path) -> list[int]:
    """Of the ranks, and of the server where there was one."""
    server = [int((folder / "server").read_text())] if (folder / "server").exists() else []
    return [*(json.loads(file.read_text())["pid"] for file in folder.glob("rank-*")), *server]


def learning(folder: Path, count: int = 2) -> bool:
    """Whether a run has come so far."""
    log = folder / "run" / "metrics.jsonl"
    return log.exists() and len(log.read_text().splitlines()) >= count


class Command:
    """A command line in a process of its own."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.errors = folder / "errors"
        with open(self.errors, "wb") as file, open(folder / "output", "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_fast", *words], stdout=output, stderr=file, env=environment
            )

    def at(self, folder: Path) -> None:
        """Wait until the run is at work."""
        until(lambda: learning(folder) or self.process.poll() is not None, 120.0)
        assert self.process.poll() is None, self.errors.read_text()

    def end(self, seconds: float = 90.0) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()


def test_two_ranks_on_two_nodes_have_the_bits_of_torchrun(cluster, folder, capfd):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, "-m", "rlhf_fast.cli", *sft(folder, "torchrun", 3)]
    subprocess.run(command, env=environment, capture_output=True, timeout=300, check=True)
    assert cli.main(placed(cluster, sft(folder, "ray", 3))) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(folder / "ray" / "adapter")
    assert numbers(folder / "ray") == numbers(folder / "torchrun")
    assert outcome(folder / "ray") == outcome(folder / "torchrun")
    assert not ray.is_initialized()


def test_the_server_samples_for_both_ranks_and_ends_with_them(cluster, folder, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_REWARD_TOKEN", "secret")
    monkeypatch.setenv("RANK", "0")  # where rewards.py writes to
    assert cli.main(ppo(folder, "here", 2)) == 0
    monkeypatch.delenv("RANK")
    assert cli.main(placed(cluster, ppo(folder, "run", 2), *serving(folder))) == 0
    here, there = numbers(folder / "here"), numbers(folder / "run")
    for row, other in zip(here, there, strict=True):
        close({k: other[k] for k in row}, row)
        assert other["mismatch/mean"] < 1e-4
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    for n in range(2):
        found = rank(folder, n)
        assert found.pop("pid") != os.getpid()
        assert found == {"RANK": str(n), "RLHF_FAST_REWARD_TOKEN": "secret", **common}
    assert not any(map(alive, pids(folder)))  # when the command returns, not some time later


def test_a_server_that_dies_is_named_with_its_node_and_last_words(cluster, folder, capfd):
    words = placed(cluster, ppo(folder, "run", 1000), *serving(folder))
    words += ["--rollout.vllm.arguments", "[--fail-after, '9']", "--ray.ranks", "1"]
    assert cli.main(words) == 1
    err = capfd.readouterr().err
    told = err.splitlines()[0]
    assert told.startswith("rlhf-fast: the vLLM server on node")
    assert "ended with status 9" in told and "out of memory" in told
    assert not any(map(alive, pids(folder)))


def test_a_server_that_does_not_start_is_named_and_no_rank_starts(cluster, folder, capfd):
    words = [*serving(folder), "--rollout.vllm.arguments", "[--nonsense]"]
    assert cli.main(placed(cluster, ppo(folder, "run", 2), *words, "--ray.ranks", "1")) == 1
    err = capfd.readouterr().err
    assert "the vLLM server on node" in err and "it ended before it answered" in err and "--nonsense" in err
    assert not (folder / "run").exists() and not alive(int((folder / "server").read_text()))


def test_a_rank_that_is_killed_is_named_and_all_else_ends(cluster, folder):
    command = Command(folder, placed(cluster, ppo(folder, "run", 1000, "--run.save_every", "1"), *serving(folder)))
    command.at(folder)
    os.kill(rank(folder, 1)["pid"], signal.SIGKILL)
    began = time.monotonic()
    assert command.end() == 1
    assert time.monotonic() - began < placement.SETTLE + placement.GRACE + 15
    (told,) = [line for line in command.errors.read_text().splitlines() if line.startswith("rlhf-fast: rank")]
    assert told.startswith("rlhf-fast: rank 1 on node") and "was ended by signal 9" in told
    assert not any(map(alive, pids(folder)))


def test_a_node_that_dies_is_named_and_all_else_ends(cluster, folder):
    (worker,) = cluster.worker_nodes
    own = ["--ray.ranks", "1", "--ray.rank_resources", "far=1"]
    command = Command(folder, placed(cluster, ppo(folder, "run", 1000), *own))
    command.at(folder)
    cluster.remove_node(worker, allow_graceful=False)
    try:
        assert command.end() == 1
        (told,) = [line for line in command.errors.read_text().splitlines() if line.startswith("rlhf-fast: rank")]
        assert "is gone: its node died" in told and worker.node_id[:8] in told
        assert all(map(gone, pids(folder)))
    finally:
        cluster.add_node(**FAR)
        cluster.wait_for_nodes()


def test_ctrl_c_saves_after_the_step_and_leaves_nothing(cluster, folder):
    command = Command(folder, placed(cluster, ppo(folder, "run", 1000, "--run.save_every", "0"), "--ray.ranks", "1"))
    command.at(folder)
    command.process.send_signal(signal.SIGINT)
    assert command.end() == 130
    assert not any(map(alive, pids(folder)))
    assert steps(folder / "run")[-1] == numbers(folder / "run")[-1]["step"] >= 2


def test_nothing_outlives_a_command_that_is_killed(cluster, folder):
    command = Command(folder, placed(cluster, ppo(folder, "run", 1000), "--ray.ranks", "1"))
    command.at(folder)
    command.process.kill()
    assert all(map(gone, pids(folder)))


def test_more_than_the_cluster_has_is_refused_at_once(cluster, folder, capfd):
    began = time.monotonic()
    words = placed(cluster, sft(folder, "run", 1), "--ray.gpus_per_rank", "1")
    assert cli.main(words) == 1
    err = capfd.readouterr().err
    assert "argument 'resources' got 2 ranks of 1 CPU, 1 GPU, 1 trainer, expected at most what the cluster has" in err
    assert "4 CPU, 0 GPU, 2 trainer on 2 nodes (2 CPU, 0 GPU, 1 trainer; 2 CPU, 0 GPU, 1 trainer)" in err
    assert cli.main(placed(cluster, sft(folder, "run", 1), "--ray.ranks", "3")) == 1
    assert "got 3 ranks of 1 CPU, 1 trainer" in capfd.readouterr().err
    assert time.monotonic() - began < 60 and not (folder / "run").exists()


def test_what_others_hold_is_waited_for_and_then_named(cluster, folder, capfd):
    ray.init(cluster.address)
    try:
        held = ray.util.placement_group([{"trainer": 1}])
        assert held.wait(30)
        assert cli.main(placed(cluster, sft(folder, "run", 1), "--ray.timeout", "1")) == 1
        err = capfd.readouterr().err
        assert "no room for 2 ranks of 1 CPU, 1 trainer within ray.timeout = 1 s" in err and "1 trainer of" in err
        assert ray.is_initialized()  # the caller's own
    finally:
        ray.shutdown()


USAGE = {
    "no trainer": (["ray", "evaluate"], "ray: got 'evaluate', expected one of sft, reward, ppo"),
    "unknown name": (["ray", "sft", "--ray.rank", "2"], "ray.rank: unknown setting; did you mean ray.ranks?"),
    "no ranks": (["ray", "sft", "--ray.ranks", "0"], "ray.ranks: got 0, expected greater than or equal to 1"),
    "two GPUs of a rank": (["ray", "sft", "--ray.gpus_per_rank", "2"], "ray.gpus_per_rank: got 2, expected less than"),
    "the trainer's": (
        ["ray", *sft(Path("x"), "y", 1), "--ray.ranks", "2", "--epochs", "many"],
        "epochs: got 'many', expected",
    ),
}


@pytest.mark.parametrize("kind", USAGE)
def test_settings_are_checked_before_a_cluster_is_sought(kind, capsys):
    words, message = USAGE[kind]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_without_a_cluster_it_says_how_to_start_one(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # of one that crashed
    for more, where in (([], "127.0.0.1:1"), (["--ray.address", "127.0.0.1:2"], "127.0.0.1:2")):
        assert cli.main(["ray", *sft(tmp_path, "run", 1), *more]) == 1
        assert f"no Ray cluster at {where}: start one with `ray start --head`" in capfd.readouterr().err


def test_help_lists_the_settings(capsys):
    assert cli.main(["ray", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--ray.{name.replace('_', '-')}" in out for name in RayConfig.__dataclass_fields__)


def test_the_ranks_of_a_node_are_numbered_from_0():
    nodes = [placement.Node(name, "10.0.0.1") for name in "aabbb"]
    members = [placement._Member(f"rank {i}", None, node) for i, node in enumerate(nodes)]
    assert [(local, size) for _, local, size in placement._locals(members)] == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


def test_a_server_has_room_for_folds_and_the_longest_prompt(folder):
    from rlhf_fast import config

    model = SharedModel.from_pretrained(folder / "model", roles=("policy",), lora=LoraConfig(r=3))
    model.save_adapter("policy", folder / "fold")
    words = ppo(folder, "run", 1, "--model.fold", str(folder / "fold"))[1:]
    loaded = config.load_config(config.PPOConfig, None, words)
    assert placement._served(RayConfig(gpus_per_rank=0), loaded) == ("float32", 32 + 6, 3 + 2)
    loaded = config.load_config(config.PPOConfig, None, [*words, "--data.max_tokens", "1000"])
    assert placement._served(RayConfig(gpus_per_rank=0), loaded)[1] == 256  # the model's own limit
