"""Where rewards are found: in this process, in worker processes, or at a server. All three take calls and give answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf_fast.rewards.functions import Completions, ContractError, RewardFunction, Scores, call, describe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """Completions to score with the source called `name`."""

    name: str
    prompts: Sequence[str]
    completions: Completions


@dataclass(frozen=True)
class Failure:
    """A call that gave no scores."""

    kind: str
    """Plural, as it is counted: raised, timeouts, crashes, server_errors."""
    headline: str
    """Says the same for every call that failed in the same way."""
    detail: str = ""
    """A traceback, or the end of what a worker printed."""


Answer = Scores | Failure
"""A finite number or NaN per completion, or one for each of its steps; or why there is none."""


class Backend(Protocol):
    """Runs calls, `width` at a time."""

    width: int
    repeats: bool
    """Whether a failed call is worth repeating completion by completion."""

    def run(self, calls: Sequence[Call]) -> list[Answer]:
        """An answer to each call. Raises ContractError for one that is no list of numbers."""
        ...

    def close(self) -> None:
        """Leave nothing running."""
        ...


class InProcess:
    """Functions in this process: nothing between them and the trainer, no timeout, and a crash of theirs is a crash of it."""

    width, repeats = 1, True

    def __init__(self, functions: Mapping[str, RewardFunction]) -> None:
        self._functions = dict(functions)

    def run(self, calls: Sequence[Call]) -> list[Answer]:
        """See Backend."""
        return [self._one(c) for c in calls]

    def _one(self, c: Call) -> Answer:
        try:
            return call(self._functions[c.name], f"reward function {c.name}", c.prompts, c.completions)
        except ContractError:
            raise
        except (Exception, SystemExit) as error:
            return Failure("raised", *describe(error))

    def close(self) -> None:
        """Nothing to do."""


class Scorer:
    """Scores of whole batches from one backend: split into calls, and what fails costs as few completions as possible.

    size: completions per call; None = an equal share for each call the backend runs at once. whole_batch: one call for all,
    and a failed one costs them all.
    """

    def __init__(self, backend: Backend, *, size: int | None = None, whole_batch: bool = False) -> None:
        self.backend, self.size, self.whole_batch = backend, size, whole_batch
        self.failures: dict[str, int] = {}
        """Kind of failure -> calls that failed so, since the counts were last taken."""
        self._logged: set[tuple[str, str, str]] = set()

    def scores(self, name: str, prompts: Sequence[str], completions: Completions, allowed: float) -> Scores:
        """(n,) finite numbers, or lists of one for each step; NaN for what has no score.

        allowed: completions that may go without. Beyond it the search for those that can be scored ends, since the batch is
        lost anyway.
        """
        n = len(completions)
        size = n if self.whole_batch else self.size or math.ceil(n / self.backend.width)
        spans = [range(i, min(i + size, n)) for i in range(0, n, max(size, 1))]
        found, lost = [math.nan] * n, 0
        again: list[range] = []
        for span, answer in self._run(name, prompts, completions, spans):
            if not isinstance(answer, Failure):
                found[span.start : span.stop] = answer
            elif self.backend.repeats and len(span) > 1 and not self.whole_batch:
                again += [range(i, i + 1) for i in span]
            else:
                lost += len(span)
        while again and lost <= allowed:
            wave, again = again[: self.backend.width], again[self.backend.width :]
            for span, answer in self._run(name, prompts, completions, wave):
                if isinstance(answer, Failure):
                    lost += 1
                else:
                    found[span.start] = answer[0]
        return found

    def _run(
        self, name: str, prompts: Sequence[str], completions: Completions, spans: Sequence[range]
    ) -> list[tuple[range, Answer]]:
        calls = [Call(name, prompts[s.start : s.stop], completions[s.start : s.stop]) for s in spans]
        answers = self.backend.run(calls)
        for answer, c in zip(answers, calls, strict=True):
            if isinstance(answer, Failure):
                self._count(name, answer, len(c.completions))
        return list(zip(spans, answers, strict=True))

    def _count(self, name: str, failure: Failure, completions: int) -> None:
        self.failures[failure.kind] = self.failures.get(failure.kind, 0) + 1
        key = (name, failure.kind, failure.headline)
        if key not in self._logged:
            self._logged.add(key)
            detail = f"\n{failure.detail}" if failure.detail else ""
            logger.warning(
                "reward %s: %s on a call of %d completions; the same again is counted, not logged%s",
                *(name, failure.headline, completions, detail),
            )
