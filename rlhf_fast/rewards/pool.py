"""Reward functions in worker processes: fresh interpreters that a hang or a crash can cost, and the trainer cannot."""

from __future__ import annotations

import logging
import math
import os
import selectors
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from rlhf_fast._worker import EXIT_TIMEOUT, LOAD_TIMEOUT, TICK, Worker
from rlhf_fast.rewards import functions
from rlhf_fast.rewards.backends import Answer, Call, Failure
from rlhf_fast.rewards.functions import ContractError, RewardError

logger = logging.getLogger(__name__)


class Pool:
    """Processes that run reward functions.

    They are new interpreters (no fork, no copy of the trainer's memory, no re-import of its main module), each in a process
    group of its own, so that a kill reaches what a function started as well. One event loop in the calling thread serves them
    all: no threads here, nothing that could hold up the interpreter's exit. A worker ends when its pool is closed, collected,
    or gone with a killed trainer.

    specs: functions every worker loads, as module:function or file.py:function. timeout: seconds a call may take.

    Raises ValueError for a function that cannot be loaded.
    """

    repeats = True

    def __init__(self, specs: Sequence[str], workers: int, *, timeout: float) -> None:
        if workers < 1 or not timeout > 0:
            got = f"{workers} and {timeout}"
            raise ValueError(f"Pool: arguments 'workers', 'timeout' got {got}, expected at least 1 and above 0")
        self.width, self.timeout = workers, timeout
        self._hello = {"path": [p or os.getcwd() for p in sys.path], "specs": list(specs), "timeout": timeout}
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _close, self._workers, os.getpid())
        for _ in range(workers):
            self._workers.append(_Worker(self._hello))
        try:
            while any(w.loading for w in self._workers):
                self._turn()
        except RewardError as error:
            self.close()
            raise ValueError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def run(self, calls: Sequence[Call]) -> list[Answer]:
        """See Backend. A call over the timeout, or whose worker died, is a Failure, and its worker is replaced.

        One thread at a time. Raises ValueError when the pool is closed, RewardError when a new worker cannot load its functions.
        """
        if not self._workers:
            raise ValueError("Pool.run: the pool is closed")
        answers: dict[int, Answer] = {}
        waiting = deque(enumerate(calls))
        try:
            for i, worker in enumerate(self._workers):
                if worker.idle and worker.gone():
                    logger.warning("a reward worker that had nothing to do is gone and replaced")
                    self._replace(i)
            while len(answers) < len(calls):
                for worker in self._workers:
                    if waiting and worker.idle:
                        worker.start(*waiting.popleft(), self.timeout)
                answers.update(self._turn())
        except BaseException:
            # The answers of the others belong to nobody any more.
            for i, worker in enumerate(self._workers):
                if not worker.idle:
                    self._replace(i)
            raise
        return [answers[i] for i in range(len(calls))]

    def close(self) -> None:
        """End the workers: idle ones leave by themselves, all others are killed."""
        self._finalizer()

    def _replace(self, i: int) -> None:
        self._workers[i].kill()
        self._workers[i] = _Worker(self._hello)

    def _turn(self) -> dict[int, Answer]:
        """Wait for news of the workers, and take it in. Raises RewardError if a worker cannot load its functions."""
        now = time.monotonic()
        until = min((w.deadline for w in self._workers if not w.idle), default=now)
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                worker.register(selector)
            for key, _ in selector.select(max(0.0, min(until - now, TICK))):
                key.data()
        answers = {}
        for i, worker in enumerate(self._workers):
            number, loading = worker.number, worker.loading
            message = worker.answer()
            if message is None and not worker.gone() and time.monotonic() < worker.deadline:
                continue
            if message is None:
                message = worker.obituary(self.timeout)
                self._replace(i)
            if loading:
                if (why := message.get("load")) is not None:
                    raise RewardError(why)
            elif number is not None:
                answers[number] = _answer(message)
        return answers


class _Worker(Worker):
    """A process that runs one call after the other."""

    def __init__(self, hello: Any) -> None:
        self.loading = True
        self.number: int | None = None
        """Of the call it works on."""
        self.deadline = time.monotonic() + LOAD_TIMEOUT
        self._name = ", ".join(hello["specs"])
        environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **os.environ}
        super().__init__([sys.executable, "-uP", functions.__file__], environment)
        self.send(hello)

    @property
    def idle(self) -> bool:
        return self.number is None and not self.loading

    def start(self, number: int, call: Call, timeout: float) -> None:
        self.send({"spec": call.name, "prompts": list(call.prompts), "completions": list(call.completions)})
        self.number, self._name = number, call.name
        self.deadline = time.monotonic() + timeout

    def answer(self) -> Any:
        """Its answer, once that is whole; the worker is idle then."""
        found = self.message()
        if found is None:
            return None
        printed = self.take_printed()
        if printed:
            logger.info("reward function %s printed: %s", self._name, printed)
        self.loading, self.number, self.deadline = False, None, math.inf
        return {**found[0], "printed": printed}

    def obituary(self, timeout: float) -> dict[str, Any]:
        """Why there is no answer, in the form of one."""
        late = not self.gone()
        printed = self.take_printed()
        headline = f"no answer within {LOAD_TIMEOUT if self.loading else timeout:g} s" if late else self.ending()
        if self.loading:
            told = f": {printed}" if printed else ""
            return {"load": f"reward functions {self._name}: {headline} while loading{told}"}
        return {"failure": "timeouts" if late else "crashes", "headline": headline, "printed": printed}


def _answer(message: dict[str, Any]) -> Answer:
    if "scores" in message:
        return functions.without_nulls(message["scores"])
    if "contract" in message:
        raise ContractError(message["contract"])
    printed = message["printed"] and f"it printed: {message['printed']}"
    if "raised" in message:
        return Failure("raised", message["raised"], "\n".join(filter(None, (message["traceback"].rstrip(), printed))))
    return Failure(message["failure"], message["headline"], printed)


def _close(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a forked child: they are not its own
        return
    for worker in workers:
        if worker.idle:
            worker.leave()
    deadline = time.monotonic() + EXIT_TIMEOUT
    while any(w.idle and not w.gone() for w in workers) and time.monotonic() < deadline:
        time.sleep(0.002)
    for worker in workers:
        worker.kill()
    workers.clear()
