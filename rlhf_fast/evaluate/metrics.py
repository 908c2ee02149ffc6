"""Cheap text metrics that show how a policy pays for its reward: length, diversity, repetition.

Every function takes a list of units per text, either token ids or the words of :func:`words`, and never joins
texts: an n-gram does not cross from one text into the next.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

__all__ = ["distinct_n", "lengths", "repetition", "words"]

Units = Sequence[Hashable]


def words(text: str) -> list[str]:
    """Lower-case words; every other visible character stands alone, so that "!!!" counts as repetition."""
    return re.findall(r"\w+(?:'\w+)*|[^\w\s]", text.lower())


def lengths(texts: Sequence[Units]) -> np.ndarray:
    """(N,) number of units of each text."""
    return np.array([len(text) for text in texts], dtype=np.float64)


def distinct_n(texts: Sequence[Units], n: int) -> float:
    """Distinct n-grams of the whole collection / all its n-grams (Li et al., arXiv:1510.03055, section 5.1).

    The ratio falls with the amount of text, whatever its quality: compare only collections of the same number
    of texts and about the same length. 0.0 if no text has ``n`` units.
    """
    _check_order("distinct_n", n)
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for text in texts:
        grams = list(_grams(text, n))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def repetition(texts: Sequence[Units], n: int = 2) -> np.ndarray:
    """(N,) share of each text's n-grams that already occurred earlier in the same text; 0 for texts under
    ``n`` units.

    One minus the distinct-n of a single text. Unlike :func:`distinct_n` it is a mean over texts, so it has an
    interval.
    """
    _check_order("repetition", n)
    return np.array([1.0 - distinct_n([text], n) if len(text) >= n else 0.0 for text in texts])


def _grams(text: Units, n: int) -> Iterator[tuple[Hashable, ...]]:
    return zip(*(text[i:] for i in range(n)), strict=False)


def _check_order(function: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"{function}: n must be at least 1, got {n}")
