"""Kills a PPO run at a named point and resumes it; run by test_resume.py in a fresh process.

Usage: kill_driver.py FOLDER POINT[:NTH] ... Every run is a forked child, so that torch is imported once; nothing here computes
before a fork, so no thread pool is inherited.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from test_ppo import ppo_config

from rlhf_fast.config import PPOUpdateConfig, RewardSource, RolloutConfig, RunConfig
from rlhf_fast.train.ppo import train_ppo


def config(folder: Path, name: str, resume: bool):
    score = ppo_config(folder).reward.source
    return ppo_config(
        folder,
        run=RunConfig(str(folder / name), save_every=1, sample_every=0, resume=resume, threads=1),
        reward=RewardSource(source=score, normalize="running"),
        rollout=RolloutConfig(batch_size=8, max_new_tokens=6),
        ppo=PPOUpdateConfig(epochs=2, minibatch_size=4, micro_batch_size=4),
        kl=dataclasses.replace(ppo_config(folder).kl, kind="adaptive", horizon=100.0),
        steps=4,
    )


def child(folder: Path, name: str, resume: bool, fault: str = "") -> int:
    """Signal or exit status of a training in a forked child."""
    pid = os.fork()
    if pid == 0:
        os.environ["RLHF_FAST_FAULT"] = fault
        try:
            train_ppo(config(folder, name, resume))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main() -> None:
    folder = Path(sys.argv[1])
    assert child(folder, "whole", resume=False) == 0
    results = {}
    for point in sys.argv[2:]:
        name = point.replace(":", "-")
        killed = child(folder, name, resume=False, fault=point)
        assert killed == -signal.SIGKILL, f"{point} never came: {killed}"
        results[point] = child(folder, name, resume=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
