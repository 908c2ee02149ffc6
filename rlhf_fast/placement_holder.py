"""The actor of `rlhf-fast ray` on a node of the cluster: it holds a bundle of a placement group and the program that runs there."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from rlhf_fast._guarded import Guarded

SERVER = "the vLLM server"
_WORDS = 15
_HINT = "rlhf-fast: add --debug for the traceback"


class Node(NamedTuple):
    """Where an actor is."""

    id: str
    address: str

    def __str__(self) -> str:
        return f"node {self.address} ({self.id[:8]})"


class End(NamedTuple):
    """How a program ended."""

    status: int | None
    """Minus the signal; None if nobody saw it."""
    words: list[str]
    """The last lines it wrote."""


class Holder:
    """The actor that holds a bundle: one program, which ends with it. What the program prints goes to the logs that Ray keeps and shows."""

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.folder = name, folder
        self._program: Guarded | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix="rlhf_fast-"))

    def __repr__(self) -> str:  # what Ray shows before each line
        return self.name

    def node(self) -> Node:
        """Where this is."""
        return Node(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def free_port(self) -> int:
        """One below those that the system hands out and above those of Ray's workers: nobody gets it before its use by chance."""
        while True:
            with socket.socket() as s, contextlib.suppress(OSError):
                s.bind(("", port := random.SystemRandom().randrange(20_000, 32_000)))
                return port

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> str | None:
        """Run `python -m rlhf_fast` with these words in the folder. Returns what keeps it from that."""
        return self._start([sys.executable, "-um", "rlhf_fast", *command], {**os.environ, **environment})

    def serve(
        self, config: Any, dtype: str, context: int, rank: int, key: str, environment: Mapping[str, str]
    ) -> tuple[str, str | None]:
        """(url, what keeps it from that): a vLLM server that answers, as `server_command` has it; config: of the run."""
        from rlhf_fast.rollout.engines import EngineError
        from rlhf_fast.rollout.vllm import await_server, server_command, server_environment

        host, port = ray.util.get_node_ip_address(), self.free_port()
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        settings = config.rollout.vllm
        if shutil.which(settings.python) is None:
            return url, f"rollout.vllm.python: {settings.python} is no program there"
        fault = self._enter()
        if fault is None:
            command = server_command(
                settings, config.model.path, dtype=dtype, context=context, rank=rank, host=host, port=port
            )
            fault = self._start(command, {**server_environment(key), **environment})
        if fault is None:
            assert self._program is not None
            try:
                await_server(SERVER, self._program, url, key, settings.start_timeout)
            except EngineError as error:
                fault = str(error)
        return url, fault

    def _enter(self) -> str | None:
        try:
            os.chdir(self.folder)
        except OSError as error:
            return f"{self.folder}: {error.strerror}; every node has to see the folder that the run is started in"
        return None

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> str | None:
        fault = self._enter()
        if fault is None:
            self._program = Guarded(command, log=self._scratch / "log", environment=environment)
        return fault

    def wait(self) -> End:
        """Pass on what the program prints until it ends."""
        program = self._program
        assert program is not None
        with open(program.log, encoding="utf-8", errors="replace") as file:
            while True:
                over = program.ended  # before the read, so that nothing comes after it
                if text := file.read():
                    print(text, end="", flush=True)
                if over:
                    break
                time.sleep(0.1)
        lines = program.last_words(_WORDS).splitlines()[1:]
        return End(program.status, [line for line in lines if line.strip() and line != _HINT])

    def ask_to_end(self) -> None:
        """SIGTERM to the program, which a trainer answers with a checkpoint after its step."""
        if self._program is not None:
            self._program.ask_to_end()

    def end(self) -> None:
        """End the program and all of its children, and return when they are gone."""
        if self._program is not None:
            self._program.end()
        shutil.rmtree(self._scratch, ignore_errors=True)
