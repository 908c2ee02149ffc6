"""Sampling in a second process: it has the base from the same files, and the trainer's own decode loop and seeds."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from rlhf_fast._config_tree import build
from rlhf_fast._worker import LOAD_TIMEOUT, TICK, Worker
from rlhf_fast.config import ModelConfig, resolve_device
from rlhf_fast.model import SharedModel
from rlhf_fast.rewards.functions import Requests, answer, describe, outlive_signals
from rlhf_fast.rollout.engines import Engine, EngineError, Request, sample
from rlhf_fast.rollout.hf import PackedRollout, Rollout

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rlhf_fast.rollout.process import serve; serve()"


class ProcessEngine(Engine):
    """A new interpreter that holds the base with its folds and the policy role, and samples by `generate`.

    It reads the files that the trainer's base is from, keeps its linear layers packed, and gets adapters as safetensors over a
    pipe. Its rollouts have the bits of those of the trainer where `generate` promises them. It ends with its engine or with the
    trainer, however that dies, and is not replaced: a run stops with its last words, and resumes.

    model: settings of the base. threads: CPU threads of the process, None = PyTorch's choice. device: where it samples, as
    ProcessConfig.device. timeout: seconds that a caller waits for a batch, or for the process to take an adapter.

    Raises EngineError, from every method, when the process cannot load the base, dies or is late.
    """

    def __init__(
        self, model: ModelConfig, *, threads: int | None = None, device: str = "cpu", timeout: float = 600.0
    ) -> None:
        self.timeout = timeout
        self.span: tuple[float, float] | None = None
        """When the batch that was collected last began and ended, in seconds of time.monotonic."""
        self._loaded, self._asked = False, 0
        path = [p or os.getcwd() for p in sys.path]
        environment = {"PYTHONHASHSEED": "0", **os.environ}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._worker = Worker([sys.executable, "-uP", "-c", _BOOT, json.dumps(path)], environment)
        self._finalizer = weakref.finalize(self, _kill, self._worker, os.getpid())
        self._worker.send({"model": dataclasses.asdict(model), "threads": threads, "device": device})

    def update(self, model: SharedModel, version: int) -> None:
        state = {name: x.cpu().contiguous() for name, x in model.state_of("policy").items()}
        self._send({"version": version}, format_safetensors(state))

    def submit(self, request: Request) -> None:
        fields = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
        self._send({**fields, "seeds": request.seeds.tolist()})
        self._asked += 1

    def collect(self) -> tuple[Rollout, int]:
        if not self._asked:
            raise ValueError("ProcessEngine.collect: nothing was submitted that has not been collected")
        message, payload = self._hear(self.timeout, "no batch")
        self._asked -= 1
        if "failed" in message:
            raise EngineError(f"the sampling process: {message['failed']}")
        self.span = message["began"], message["ended"]
        return Rollout(**parse_safetensors(payload)), message["version"]

    def close(self) -> None:
        self._finalizer()  # once; there is nothing in it to wait for

    def _send(self, message: Mapping[str, Any], payload: bytes = b"") -> None:
        if not self._loaded:
            said, _ = self._hear(LOAD_TIMEOUT, "not ready")
            if "failed" in said:
                raise self._over(f"could not load the base: {said['failed']}")
            self._loaded = True
        self._worker.send(message, payload)
        # A thread of the other side takes what comes at once, also while it samples.
        self._turn(lambda: self._worker.sent or None, self.timeout, "nothing taken")

    def _hear(self, seconds: float, what: str) -> tuple[Any, bytes]:
        return self._turn(self._worker.message, seconds, what)

    def _turn(self, ready: Callable[[], Any], seconds: float, what: str) -> Any:
        """Move what is in the pipes until `ready` gives something."""
        if not self._finalizer.alive:
            raise EngineError("the sampling process has ended")
        deadline = time.monotonic() + seconds
        while (found := ready()) is None:
            if self._worker.gone():
                raise self._over(self._worker.ending())
            rest = deadline - time.monotonic()
            if rest <= 0:
                raise self._over(f"{what} within {seconds:g} s")
            with selectors.DefaultSelector() as selector:
                self._worker.register(selector)
                for key, _ in selector.select(min(rest, TICK)):
                    key.data()
        return found

    def _over(self, why: str) -> EngineError:
        printed = self._worker.take_printed()
        self.close()
        return EngineError(f"the sampling process: {why}" + (f"; it printed: {printed}" if printed else ""))


def serve() -> None:
    """The process: one batch after the other, by the adapter that came before it."""
    requests, answers = map(int, sys.argv[-2:])
    outlive_signals()
    messages = Requests(requests)
    hello = next(messages, None)
    if hello is None:
        return
    try:
        model = _load(hello)
        packed = PackedRollout(model)
    except BaseException as error:
        answer(answers, {"failed": _words(error)})
        return
    answer(answers, {"loaded": True})
    version = None
    for message in messages:
        if "version" in message:
            model.load_state_of("policy", parse_safetensors(message["payload"]))
            version = message["version"]
            continue
        began = time.monotonic()
        request = Request(**{**message, "seeds": torch.tensor(message["seeds"], dtype=torch.int64)})
        try:
            rollout = sample(model, request, packed)
        except Exception as error:
            answer(answers, {"failed": _words(error)})
            continue
        found: dict[str, Tensor] = {k: x.cpu().contiguous() for k, x in vars(rollout).items()}
        answer(answers, {"version": version, "began": began, "ended": time.monotonic()}, format_safetensors(found))


def _load(hello: Mapping[str, Any]) -> SharedModel:
    from rlhf_fast.train.loop import load_model

    if hello["threads"] is not None:
        torch.set_num_threads(hello["threads"])
    device = resolve_device("ProcessConfig", hello["device"])
    return load_model(build(ModelConfig, hello["model"]), ("policy",), 0, device=device)


def _kill(worker: Worker, owner: int) -> None:
    if os.getpid() == owner:  # a forked child: it is not its own
        worker.kill()


def _words(error: BaseException) -> str:
    _, trace = describe(error)
    return f"{type(error).__name__}: {error}\n{trace}"
