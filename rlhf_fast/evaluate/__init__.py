"""Judging generated text: sentiment judges, text metrics, and intervals for what was measured.

Nothing here trains or loads a language model: inputs are texts (or token lists) and arrays of scores.
"""

from __future__ import annotations

from rlhf_fast.evaluate.judges import (
    Judge,
    JudgeQuality,
    Vader,
    demo_judges,
    half_b_judge,
    judge_quality,
    rotten_tomatoes_judge,
)
from rlhf_fast.evaluate.metrics import distinct_n, lengths, repetition, words
from rlhf_fast.evaluate.statistics import (
    Comparison,
    Interval,
    bootstrap_mean,
    bootstrap_win_rate,
)

__all__ = [
    "Comparison",
    "Interval",
    "Judge",
    "JudgeQuality",
    "Vader",
    "bootstrap_mean",
    "bootstrap_win_rate",
    "demo_judges",
    "distinct_n",
    "half_b_judge",
    "judge_quality",
    "lengths",
    "repetition",
    "rotten_tomatoes_judge",
    "words",
]
