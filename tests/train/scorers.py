"""Reward functions for the tests of training."""

from __future__ import annotations


def count_e(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.count("e")) for text in completions]


def constant(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def skip_first(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None, *count_e(prompts[1:], completions[1:])]


def broken(prompts: list[str], completions: list[str]) -> list[float]:
    raise RuntimeError("no score today")


def short(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0]


def words(prompts: list[str], completions: list[str]) -> list[str]:
    return ["good"] * len(completions)


def selfish(prompts: list[str], completions: list[str]) -> list[float]:
    prompts.clear()
    return [0.0 for _ in range(len(completions))][: completions.clear() or None]
