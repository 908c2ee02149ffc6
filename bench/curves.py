"""Learning curves of GRPO, ours and TRL's: `python bench/curves.py --seed 300 --workers 2` (pip install trl peft).

Mean rewards of the completions over STEPS steps of bench/steps.py's `grpo`, several seeds a side: the difference stretch by stretch, and
how likely seeds alone would set the two so far apart. Options that are not named here are those of bench/steps.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import steps
import torch
from torch import Tensor

NAMES = tuple(steps.CONTENDERS["grpo"])
STEPS, SEEDS, POINTS = 40, 24, 8
DEALS = 20_000
"""Most ways to deal the curves to two sides that are all looked at; of more, so many are drawn."""
CHANCE = 0.05
"""Curves differ when seeds alone would set them as far apart with no more than this probability."""


def points(curve: Sequence[float]) -> list[float]:
    """Means over POINTS equal stretches of a curve."""
    size = max(1, len(curve) // POINTS)
    return [statistics.fmean(curve[i : i + size]) for i in range(0, len(curve) - size + 1, size)]


def largest_difference(sides: Tensor) -> Tensor:
    """Of the means of two sides (..., 2, seeds, stretches) over the stretches: (...)."""
    means = sides.mean(-2)
    return (means[..., 0, :] - means[..., 1, :]).abs().amax(-1)


def chance_of(table: Tensor) -> tuple[float, float]:
    """The largest difference between the first half of the curves (2 * seeds, stretches) and the second, and the probability of one as
    large when the curves are dealt to the sides at random.

    A permutation test, without assumptions on how curves spread, which they do most where they are steepest (Fisher's test with the
    maximum over stretches, Westfall and Young 1993): exact where all deals can be looked at, otherwise of DEALS drawn ones and the one
    at hand (Phipson and Smyth 2010).
    """
    n = len(table)
    observed = float(largest_difference(table.view(2, n // 2, -1)))
    reached = lambda deals: int(
        (largest_difference(table[deals].view(len(deals), 2, n // 2, -1)) >= observed - 1e-12).sum()
    )
    if (total := math.comb(n, n // 2)) <= DEALS:
        halves = itertools.combinations(range(n), n // 2)
        deals = torch.tensor([[*half, *sorted({*range(n)} - {*half})] for half in halves])
        return observed, reached(deals) / total
    generator = torch.Generator().manual_seed(0)
    deals = torch.rand(DEALS, n, generator=generator).argsort(dim=1)
    return observed, (reached(deals) + 1) / (DEALS + 1)


def rewards_of(args: argparse.Namespace, passed: list[str]) -> Tensor:
    """Mean rewards (2, seeds, steps) of the runs of both sides; those that stand in args.save are not made again."""
    threads = max(1, torch.get_num_threads() // args.workers)
    stand: dict[tuple[str, int], list[float]] = {}
    if args.save is not None and args.save.exists():
        lines = map(json.loads, args.save.read_text().splitlines())
        stand = {(x["trainer"], x["seed"]): x["rewards"] for x in lines if x["settings"] == passed}

    def rewards(name: str, seed: int) -> list[float]:
        if (found := stand.get((name, seed))) is None:
            arguments = ["--size", steps.FEW_WORDS, "--steps", str(STEPS - 1), *passed, "--seed", str(seed)]
            found = steps.run(arguments, "grpo", name, threads)["rewards"]
            if args.save is not None:
                line = {"trainer": name, "seed": seed, "settings": passed, "rewards": found}
                with args.save.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        return found

    pool = ThreadPoolExecutor(args.workers)
    try:
        seeds = range(args.seed, args.seed + args.seeds)
        pairs = [[pool.submit(rewards, name, seed) for name in NAMES] for seed in seeds]
        return torch.tensor([[pair[i].result() for pair in pairs] for i in range(2)], dtype=torch.float64)
    finally:
        pool.shutdown(cancel_futures=True)  # where one failed, the others need not begin


def plot(rewards: Tensor, path: Path) -> None:
    """Every run, their means, and where a mean lies with 95 % when nothing is assumed but the spread of the runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    numbers = range(1, rewards.shape[-1] + 1)
    for name, runs, color in zip(NAMES, rewards, ("tab:blue", "tab:orange"), strict=True):
        mean, error = runs.mean(0), 1.96 * runs.std(0) / len(runs) ** 0.5
        axes.plot(numbers, runs.T, color=color, linewidth=0.4, alpha=0.25)
        axes.fill_between(numbers, mean - error, mean + error, color=color, alpha=0.25, linewidth=0)
        axes.plot(numbers, mean, color=color, linewidth=1.8, label=f"{name}, mean of {len(runs)} seeds")
    axes.set(xlabel="step", ylabel="mean reward of the completions")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each side, with seeds from --seed on")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the threads")
    parser.add_argument(
        "--save", type=Path, help="JSON lines that rewards are added to, and taken from where they stand"
    )
    parser.add_argument("--plot", type=Path, help="an image of the curves (matplotlib)")
    args, passed = parser.parse_known_args()
    seeds, rewards = args.seeds, rewards_of(args, passed)
    if args.plot is not None:
        plot(rewards, args.plot)
    table = torch.tensor([points(curve) for side in rewards.tolist() for curve in side], dtype=torch.float64)
    sides = table.view(2, seeds, -1)
    means = sides.mean(1)
    spread = sides.var(1).mean(0).sqrt() if seeds > 1 else torch.full_like(means[0], float("nan"))
    for i, (a, b, deviation) in enumerate(zip(*means.tolist(), spread.tolist(), strict=True)):
        print(
            f"stretch {i + 1}: {NAMES[0]} {a:.3f}, {NAMES[1]} {b:.3f}, {a - b:+.3f}; "
            f"deviation between seeds {deviation:.3f}"
        )
    observed, chance = chance_of(table)
    learned = (means[:, -1] - means[:, 0]).tolist()
    few = 2 / math.comb(2 * seeds, seeds) > CHANCE
    verdict = "too few seeds to tell" if few else "overlay" if chance > CHANCE else "differ"
    print(
        f"learned {learned[0]:+.3f} and {learned[1]:+.3f}; largest difference {observed:.3f}, which seeds alone reach with"
        f" probability {chance:.3f} ({seeds} seeds a side): {verdict}"
    )


if __name__ == "__main__":
    main()
