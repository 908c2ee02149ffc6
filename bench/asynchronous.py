"""Steps that sample in the training process, in a second one, and ahead of training: `python bench/asynchronous.py grpo ppo`.

The same Llama, prompts, reward and updates as `bench/steps.py`. local: sampling and training take turns in one process. process: a
second process samples, training waits (rollout.staleness 0); must give the same adapter as local, or the script fails. ahead: it
samples the next batch while this one is trained on (rollout.staleness 1). Where both work at once each gets half of the threads,
elsewhere whoever works has all of them. With --threads 1 everybody has one, which says what the overlap alone gives.

Every run is a process of its own, and they take turns, --rounds times. The first two steps of a run are not timed. Printed are the
seconds of a step, those of it that training waits for completions, and those in which both were at work, all medians, from the
clocks of the two processes (one clock, CLOCK_MONOTONIC); --timeline prints when each of them worked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import steps
import torch

WAYS = ("local", "process", "ahead")
UNTIMED = 2

Span = tuple[float, float]


def watched(
    function: Callable[..., Any], spans: list[Span], after: Callable[[], object] | None = None
) -> Callable[..., Any]:
    """The function, which notes when it ran."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        began = time.monotonic()
        result = function(*arguments, **keywords)
        spans.append((began, time.monotonic()))
        if after is not None:
            after()
        return result

    return run


def child(args: argparse.Namespace, what: str, way: str) -> dict[str, Any]:
    """One run, and when it sampled, waited and trained: lists of (begin, end), one of each for a step."""
    from rlhf_fast.config import GroupConfig, GroupUpdateConfig, PPOConfig, ProcessConfig
    from rlhf_fast.rollout.process import ProcessEngine
    from rlhf_fast.train import group, online, ppo

    threads = args.threads
    own = max(1, threads // 2) if way == "ahead" else threads
    sampling: list[Span] = []
    waiting: list[Span] = []
    training: list[Span] = []

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps.save(args, folder)
        common = steps.settings(args, folder)
        beside = ProcessConfig(threads=max(1, threads - own) if way == "ahead" else threads)
        engine = "local" if way == "local" else "process"
        rollout = replace(common["rollout"], engine=engine, staleness=int(way == "ahead"), process=beside)
        common |= {"rollout": rollout, "run": replace(common["run"], threads=own)}
        if what == "grpo":
            update = GroupUpdateConfig(minibatch_size=args.batch, micro_batch_size=args.micro)
            config: Any = GroupConfig(group_size=8, group=update, **common)
            trainer, train = group.Trainer, group.train_group
        else:
            config = PPOConfig(ppo=steps.ppo_update(args), **common)
            trainer, train = ppo.Trainer, ppo.train_ppo

        engines: list[ProcessEngine] = []
        collect = ProcessEngine.collect

        def collected(engine: ProcessEngine) -> Any:
            found = collect(engine)
            engines[:] = [engine]
            return found

        ProcessEngine.collect = watched(  # type: ignore[method-assign]
            collected, waiting, lambda: sampling.append(engines[0].span or (0.0, 0.0))
        )
        if way == "local":
            online.sample = watched(online.sample, waiting, lambda: sampling.append(waiting[-1]))
        trainer.score = watched(trainer.score, training)  # type: ignore[method-assign]
        trainer.update = watched(trainer.update, training)  # type: ignore[method-assign]
        adapter = train(config) / "adapter_model.safetensors"
        digest = hashlib.sha256(adapter.read_bytes()).hexdigest()
    trained = [(a[0], b[1]) for a, b in zip(training[::2], training[1::2], strict=True)]
    return {"sampling": sampling, "waiting": waiting, "training": trained, "adapter": digest}


def overlap(spans: Sequence[Span], others: Sequence[Span]) -> list[float]:
    """Seconds of each span in which one of the others was under way."""
    return [sum(max(0.0, min(b, d) - max(a, c)) for c, d in others) for a, b in spans]


def figures(found: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of every timed step: whole, waiting for completions, with sampling and training both at work."""
    ends = [b for _, b in found["training"]]
    both = overlap(found["training"], found["sampling"])
    return {
        "step": [b - a for a, b in zip(ends[UNTIMED - 1 :], ends[UNTIMED:], strict=False)],
        "waited": [b - a for a, b in found["waiting"][UNTIMED:]],
        "sampling": [b - a for a, b in found["sampling"][UNTIMED:]],
        "training": [b - a for a, b in found["training"][UNTIMED:]],
        "both": both[UNTIMED:],
    }


def timeline(found: dict[str, Any], columns: int = 100) -> list[str]:
    """Two lines: when completions were sampled and when there was training, batches by the last digit of their step."""
    last = found["training"][-1][1]
    first = min(found["training"][UNTIMED][0], last)
    lines = []
    for name in ("sampling", "training"):
        line = [" "] * columns
        for step, (a, b) in enumerate(found[name]):
            for i in range(columns):
                middle = first + (i + 0.5) * (last - first) / columns
                if a <= middle < b:
                    line[i] = str(step % 10)
        lines.append(f"  {name} |{''.join(line)}|")
    return [*lines, f"  {last - first:.1f} s from the training of step {UNTIMED} on"]


def run(arguments: Sequence[str], what: str, way: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments, "--child", what, way], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{what}, {way}: {done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="grpo, ppo; both when left out")
    parser.add_argument("--size", default="17M", choices=steps.SIZES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--response", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(child(args, *args.child)))
        return
    passed = [a for a in sys.argv[1:] if a not in ("grpo", "ppo")]
    print(
        f"{args.size} Llama, {args.dtype}, {args.batch} completions of up to {args.response} tokens, {args.threads} threads"
    )
    for what in args.what or ("grpo", "ppo"):
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, results in found.items():
                results.append(run(passed, what, way))
        if len({r["adapter"] for way in ("local", "process") for r in found[way]}) != 1:
            raise SystemExit(f"{what}: another process has trained another adapter")
        medians = {}
        for way, results in found.items():
            each = [figures(r) for r in results]
            medians[way] = {k: statistics.median(x for f in each for x in f[k]) for k in each[0]}
            m = medians[way]
            print(
                f"{what:5} {way:8} {m['step']:6.2f} s a step: sampling {m['sampling']:.2f}, training {m['training']:.2f}, "
                f"waited {m['waited']:.2f}, both at work {m['both']:.2f}"
            )
            if args.timeline:
                print("\n".join(timeline(results[-1])))
        print(
            f"{what:5} local / ahead: {medians['local']['step'] / medians['ahead']['step']:.2f} x; local / process: "
            f"{medians['local']['step'] / medians['process']['step']:.2f} x"
        )


if __name__ == "__main__":
    main()
