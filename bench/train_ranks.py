"""One rank against two, and a rank that is killed: `python bench/train_ranks.py sft reward dpo kto ppo grpo online-dpo raft killed`.

Every run is `torchrun --nproc-per-node N -m rlhf_fast.cli ...` with the same settings and the same global batch, in fp32, on a small
Llama that is trained here on the prose that ships with Python. What is compared are the losses, gradient norms and scores that a run
logs in each of its steps; returns 1 where a loss differs by more than LIMIT. The seconds are those of two processes on this machine's
cores beside one on them, so they say what the exchange costs and nothing about scaling.

killed: SIGKILL of rank 1 between two messages of a gradient sum of sft. The other rank must end with a status other than 0 and a line
that names rank 1, and the run go on from its checkpoint with one rank and with two, to the losses of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_fast.demo.tiny import python_prose, tiny_model_folder

LIMIT = 1e-5
"""Largest difference of a loss, in nats, over all steps."""
REWARD = "def score(prompts, completions):\n    return [c.count('e') / max(len(c), 1) for c in completions]\n"
KILLER = '#!/bin/sh\n[ "$RANK" = 1 ] && export RLHF_FAST_FAULT=train.sum:%d\nexec %s -m rlhf_fast.cli "$@"\n'
SETTINGS: dict[str, dict[str, object]] = {
    "sft": {"batch_size": 16, "micro_batch_size": 4, "max_steps": 20, "optim.lr": 1e-3, "data.max_tokens": 64},
    "reward": {"batch_size": 16, "micro_batch_size": 4, "max_steps": 20, "optim.lr": 1e-3},
    "dpo": {"batch_size": 16, "micro_batch_size": 4, "max_steps": 20, "optim.lr": 1e-3},
    "kto": {"batch_size": 16, "micro_batch_size": 4, "max_steps": 20, "optim.lr": 1e-3},
    "ppo": {
        "steps": 20, "rollout.batch_size": 16, "rollout.max_new_tokens": 16, "ppo.minibatch_size": 8, "ppo.micro_batch_size": 4,
        "kl.kind": "adaptive", "reward.normalize": "running", "optim.lr": 1e-3,
    },
    "grpo": {
        "steps": 20, "rollout.batch_size": 16, "rollout.max_new_tokens": 16, "group_size": 4, "group.minibatch_size": 8,
        "group.micro_batch_size": 4, "kl.coef": 0.05, "optim.lr": 1e-3,
    },
    "online-dpo": {
        "steps": 20, "rollout.batch_size": 32, "rollout.max_new_tokens": 16, "group_size": 4, "dpo.minibatch_size": 4,
        "dpo.micro_batch_size": 2, "optim.lr": 1e-3,
    },
    "raft": {
        "steps": 20, "rollout.batch_size": 32, "rollout.max_new_tokens": 16, "group_size": 4, "raft.minibatch_size": 4,
        "raft.micro_batch_size": 2, "optim.lr": 1e-3,
    },
}  # fmt: skip
DATA = {"sft": "texts", "reward": "pairs", "dpo": "pairs", "kto": "labels"}
"""Of the others: prompts."""


def prepare(folder: Path) -> None:
    """Model, data and reward function."""
    model = tiny_model_folder(folder / "tiny")
    (folder / "model").symlink_to(model)
    texts = [text[:200] for text in python_prose() if len(text) > 120][:400]
    pairs = [
        {"prompt": a[:60], "chosen": a[60:110], "rejected": b[60:100]}
        for a, b in itertools.pairwise(texts)
        if a[60:110] != b[60:100]
    ]
    labels = [
        {"prompt": p["prompt"], "completion": p[name], "label": name == "chosen"}
        for p in pairs
        for name in ("chosen", "rejected")
    ]
    data = {
        "labels": labels,
        "texts": [{"text": t} for t in texts],
        "prompts": [{"prompt": t[:40]} for t in texts],
        "pairs": pairs,
    }
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD)


def arguments(name: str, folder: Path, output: str, more: Mapping[str, object]) -> list[str]:
    """Those of the command line."""
    settings = {
        "model.path": folder / "model",
        "model.dtype": "float32",
        "data.path": folder / f"{DATA.get(name, 'prompts')}.jsonl",
        "data.overlong": "truncate" if name == "sft" else "error",
        "run.output_dir": folder / output,
        "run.sample_every": 0,
        "run.threads": 1,
        **SETTINGS[name],
        **more,
    }
    if name not in DATA:
        settings["reward.source"] = f"{folder / 'reward.py'}:score"
    return [name, *(str(x) for key, value in settings.items() for x in (f"--{key}", value))]


def torchrun(ranks: int, program: Sequence[str], rest: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """The ended process and its seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        [*command, *program, *rest], capture_output=True, text=True, env=environment, timeout=1800, check=False
    )
    return done, time.monotonic() - began


def curve(folder: Path) -> list[dict[str, float]]:
    """What a run logged, without the clock's."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows]


def difference(one: Path, two: Path, ends: tuple[str, ...]) -> float:
    """The largest over all steps of the numbers whose names end so; infinity where the runs have other steps."""
    a, b = curve(one), curve(two)
    if [row["step"] for row in a] != [row["step"] for row in b]:
        return float("inf")
    return max(abs(x[k] - y[k]) for x, y in zip(a, b, strict=True) for k in x if k.endswith(ends))


def compare(name: str, folder: Path) -> bool:
    """One trainer with one rank and with two."""
    seconds = []
    for ranks in (1, 2):
        rest = arguments(name, folder, f"{name}-{ranks}", {})
        done, took = torchrun(ranks, ["-m", "rlhf_fast.cli"], rest)
        if done.returncode:
            print(done.stdout, done.stderr)
            raise SystemExit(f"{name} failed on {ranks} ranks")
        seconds.append(took)
    runs = folder / f"{name}-1", folder / f"{name}-2"
    loss, norm = difference(*runs, ("loss",)), difference(*runs, ("grad_norm",))
    rows = curve(runs[0])
    key = next(k for k in rows[0] if k.endswith("loss"))
    print(
        f"{name:7} {len(rows)} steps, {key} {rows[0][key]:+.5f} to {rows[-1][key]:+.5f}: 1 and 2 ranks differ by {loss:.1e} "
        f"(loss), {norm:.1e} (gradient norm); {seconds[0]:.0f} s, {seconds[1]:.0f} s with start",
        flush=True,
    )
    return loss <= LIMIT


def killed(folder: Path) -> bool:
    """Rank 1 dies in step 11; the run goes on under one rank and under two."""
    whole = folder / "sft-1"
    if not whole.exists():
        torchrun(1, ["-m", "rlhf_fast.cli"], arguments("sft", folder, "sft-1", {}))
    killer = folder / "killer.sh"
    killer.write_text(KILLER % (11, sys.executable))
    killer.chmod(0o755)
    saving = {"run.save_every": 5}
    done, took = torchrun(2, ["--no-python", str(killer)], arguments("sft", folder, "killed", saving))
    words = [line for line in done.stderr.splitlines() if "rank 0 stops" in line]
    print(f"killed  torchrun ended with {done.returncode} after {took:.0f} s with start; rank 0: {words[:1]}")
    ok = done.returncode != 0 and any("rank 1 died" in line for line in words)
    for ranks in (1, 2):
        again = folder / f"again-{ranks}"
        shutil.copytree(folder / "killed", again)
        done, _ = torchrun(
            ranks, ["-m", "rlhf_fast.cli"], [*arguments("sft", folder, again.name, saving), "--run.resume"]
        )
        far = difference(whole, again, ("loss",)) if done.returncode == 0 else float("inf")
        print(f"        resumed under {ranks}: losses differ from an uninterrupted run of one by {far:.1e}", flush=True)
        ok &= far <= LIMIT
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*SETTINGS, "killed"]
    parser.add_argument("what", nargs="*", default=known, help=f"among {', '.join(known)}; all of them when left out")
    args = parser.parse_args()
    if not {*args.what} <= {*known}:
        parser.error(f"argument what: got {args.what}, expected among {', '.join(known)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        found = [killed(folder) if what == "killed" else compare(what, folder) for what in args.what]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
