"""Steps of a completion, for rewards that judge each of them (Lightman et al. 2023, arXiv 2305.20050; Math-Shepherd, 2312.08935)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate


def split_steps(text: str, separator: str) -> list[str]:
    """Steps whose concatenation is the text, at least one; a step ends with the separator, but for the last one.

    A piece of white space and separators alone is no step: it goes to the next one, or at the end to the last.
    """
    *ended, rest = text.split(separator)
    steps, begun = [], ""
    for piece in [*(piece + separator for piece in ended), rest]:
        begun += piece
        if piece.replace(separator, "").strip():
            steps.append(begun)
            begun = ""
    if not steps:
        return [text]
    steps[-1] += begun
    return steps


def step_ends(ids: Sequence[int], steps: Sequence[str], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """Positions in ids, the tokens of a completion, at which its steps are complete; the last step ends with the last token.

    decode: text of tokens. Steps that end within one token end there together.
    """
    text, ends = "".join(steps), list(accumulate(map(len, steps)))

    def complete(end: int) -> Callable[[int], bool]:
        return lambda position: decode(ids[: position + 1]).startswith(text[:end])

    last = len(ids) - 1
    return [bisect_left(range(last), True, key=complete(end)) for end in ends[:-1]] + [last]
