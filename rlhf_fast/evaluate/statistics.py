"""Intervals and win rates for before/after comparisons, by the bootstrap.

A mean over a few hundred sampled texts is uncertain. The percentile bootstrap (Efron 1979) draws the measured
units again with replacement, many times, recomputes the figure each time, and reports the range that holds
the middle 95 % of the results. Three rules make the range honest here:

* **Paired.** Before and after answer the same prompts; the unit drawn is the prompt with both its answers, so
  the easy and the hard prompts cancel and the interval of a difference is as narrow as it should be.
* **Clustered.** Several samples of one prompt are not independent: pass ``groups`` and whole prompts are
  drawn.
* **Seeded.** The same scores give the same interval.

What it cannot cover: another training seed, other prompts than this kind, or a judge that is wrong for all
texts alike.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "Comparison",
    "Interval",
    "best_of_n",
    "bootstrap_mean",
    "bootstrap_win_rate",
    "compare",
    "effective_sample_size",
    "expected_calibration_error",
    "pass_at_k",
]

_BLOCK = 1 << 22  # drawn indices held at once (8 bytes each): bounds memory, has no influence on the result


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval, which are NaN where none was computed."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def has_range(self) -> bool:
        """Whether an interval was computed."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Comparison:
    """One metric before and after, as a row of a table.

    ``difference`` is after - before on the same units. ``win_rate`` is the share of units where after is
    better (a tie is one half); None where better has no meaning. ``higher_is_better`` None marks a figure to
    watch, not to maximise. ``group`` collects rows under a heading; ``description`` explains the metric to a
    newcomer.
    """

    metric: str
    before: Interval
    after: Interval
    difference: Interval | None = None
    win_rate: Interval | None = None
    higher_is_better: bool | None = None
    group: str = "Judges"
    unit: str = ""
    description: str = ""


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` (N,) with its percentile bootstrap interval.

    ``groups`` (N,): units with the same key are drawn together. With one unit (or one group) there is nothing
    to draw: the interval is NaN. Raises ``ValueError`` on empty or non-finite input.
    """
    array = _finite("bootstrap_mean", "values", values)
    return _bootstrap("bootstrap_mean", array, groups, level, resamples, seed)


def bootstrap_win_rate(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    higher_is_better: bool = True,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Share of units where ``after`` beats ``before``, a tie counting one half. Arrays (N,)."""
    first, second = _pair("bootstrap_win_rate", before, after)
    wins = (np.sign(second - first) * (1.0 if higher_is_better else -1.0) + 1.0) / 2.0
    return _bootstrap("bootstrap_win_rate", wins, groups, level, resamples, seed)


def compare(
    metric: str,
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    higher_is_better: bool | None = True,
    group: str = "Judges",
    unit: str = "",
    description: str = "",
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Comparison:
    """Row for paired scores: ``before[i]`` and ``after[i]`` (N,) belong to the same prompt."""
    first, second = _pair(f"compare({metric!r})", before, after)

    def interval(values: np.ndarray) -> Interval:
        return _bootstrap("compare", values, groups, level, resamples, seed)

    win_rate = None
    if higher_is_better is not None:
        win_rate = bootstrap_win_rate(
            first,
            second,
            groups=groups,
            higher_is_better=higher_is_better,
            level=level,
            resamples=resamples,
            seed=seed,
        )
    return Comparison(
        metric=metric,
        before=interval(first),
        after=interval(second),
        difference=interval(second - first),
        win_rate=win_rate,
        higher_is_better=higher_is_better,
        group=group,
        unit=unit,
        description=description,
    )


def expected_calibration_error(confidence: npt.ArrayLike, correct: npt.ArrayLike, *, bins: int = 10) -> float:
    """Mean distance between confidence and accuracy over equal-width bins, weighted by their size.

    ``confidence`` (N,) in [0, 1], ``correct`` (N,) bool. Guo et al., arXiv:1706.04599, equation 3.
    """
    level = _finite("expected_calibration_error", "confidence", confidence)
    hit = np.asarray(correct, dtype=np.float64)
    if hit.shape != level.shape or level.min() < 0 or level.max() > 1 or bins < 1:
        raise ValueError("expected_calibration_error: needs confidence in [0, 1], one correct per entry, bins >= 1")
    index = np.minimum((level * bins).astype(np.int64), bins - 1)
    gap = np.bincount(index, weights=hit - level, minlength=bins)
    return float(np.abs(gap).sum() / level.size)


def effective_sample_size(weights: npt.ArrayLike) -> float:
    """(sum w)^2 / sum w^2 of importance weights (N,), between 1 and N (Kish 1965)."""
    array = _finite("effective_sample_size", "weights", weights)
    if array.min() < 0 or not array.any():
        raise ValueError("effective_sample_size: weights must be non-negative and not all zero")
    array = array / array.max()
    return float(array.sum() ** 2 / np.square(array).sum())


def best_of_n(scores: npt.ArrayLike, n: int) -> float:
    """Unbiased expectation of the best of ``n`` draws without replacement from ``scores`` (N,), 1 <= n <= N.

    sum_i C(i-1, n-1) / C(N, n) * score_(i), scores ascending: uses all N samples instead of one random n of
    them.
    """
    array = np.sort(_finite("best_of_n", "scores", scores))
    total = array.size
    if not 1 <= n <= total:
        raise ValueError(f"best_of_n: n must be in 1..{total}, got {n}")
    # Weight of rank i relative to rank i+1 is (i-n+1)/i: a running product avoids huge binomials.
    weights = np.zeros(total)
    weights[-1] = n / total
    for rank in range(total - 1, n - 1, -1):
        weights[rank - 1] = weights[rank] * (rank - n + 1) / rank
    return float(weights @ array)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that one of ``k`` answers is right: 1 - C(N-c, k) / C(N, k) (arXiv:2107.03374)."""
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass_at_k: needs 0 <= correct <= samples and 1 <= k <= samples, got {samples, correct, k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def _finite(function: str, argument: str, values: npt.ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{function}: {argument} must be a non-empty 1-D array of finite numbers, got {array.shape}")
    return array


def _pair(function: str, before: npt.ArrayLike, after: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = _finite(function, "before", before), _finite(function, "after", after)
    if first.shape != second.shape:
        raise ValueError(f"{function}: before and after must be paired, got {first.size} and {second.size} values")
    return first, second


def _bootstrap(
    function: str,
    values: np.ndarray,
    groups: Sequence[Hashable] | None,
    level: float,
    resamples: int,
    seed: int,
) -> Interval:
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"{function}: needs 0 < level < 1 and resamples >= 1, got {level}, {resamples}")
    sums, counts = values, np.ones_like(values)
    if groups is not None:
        if len(groups) != values.size:
            raise ValueError(f"{function}: groups must have {values.size} entries, got {len(groups)}")
        number = {key: i for i, key in enumerate(dict.fromkeys(groups))}
        index = np.array([number[key] for key in groups])
        sums, counts = np.bincount(index, weights=values), np.bincount(index).astype(np.float64)
    value = float(sums.sum() / counts.sum())
    units = sums.size
    if units == 1:
        return Interval(value)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _BLOCK // units)
    for start in range(0, resamples, step):
        drawn = generator.integers(0, units, size=(min(step, resamples - start), units))
        means[start : start + step] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
