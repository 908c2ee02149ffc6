"""A process beside this one: how it starts, the messages of both sides, and how its end is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_fast._guarded import has_ended

LOAD_TIMEOUT = 600.0
"""Seconds in which a process has to import and load what it needs."""
EXIT_TIMEOUT = 2.0
"""Seconds an idle process has to leave by itself."""
PRINTED = 4000
"""Bytes kept of what it prints between two messages."""
TICK = 0.5
"""Longest wait for news, after which it is looked at whether the process is still there."""


class Worker:
    """A new interpreter in a process group of its own, so that a kill reaches what it started as well.

    Messages are lines of JSON over two pipes; behind one with "bytes" = n stand n bytes, the payload. Nothing blocks: `register`
    says what a selector has to wait for. The other side is `functions.Requests` and `functions.answer` of rlhf_fast.rewards.

    command: gets the descriptors of its two pipes, requests and answers, as last arguments.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*command, str(requests), str(answers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(requests, answers),
                start_new_session=True,
                env=environment,
            )
        except BaseException:
            os.close(self._requests)
            os.close(self._answers)
            raise
        finally:
            os.close(requests)
            os.close(answers)
        self._output = self.process.stdout.fileno()  # type: ignore[union-attr]
        for descriptor in (self._requests, self._answers, self._output):
            os.set_blocking(descriptor, False)
        self._outbox, self._inbox = bytearray(), bytearray()
        self._head: Any = None
        """Of the message whose payload is still to come."""
        self._printed, self._dropped = bytearray(), 0
        self._open = {self._answers, self._output}

    def send(self, message: Mapping[str, Any], payload: bytes = b"") -> None:
        """Put a message into the outbox, which is emptied whenever a selector finds room."""
        head = {**message, "bytes": len(payload)} if payload else message
        self._outbox += json.dumps(head).encode() + b"\n"
        self._outbox += payload

    @property
    def sent(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._outbox

    def register(self, selector: selectors.BaseSelector) -> None:
        """Wait for room or news; the data of a key is what to call then."""
        if self._outbox:
            selector.register(self._requests, selectors.EVENT_WRITE, self._send)
        if self._answers in self._open:
            selector.register(self._answers, selectors.EVENT_READ, self._receive)
        if self._output in self._open:
            selector.register(self._output, selectors.EVENT_READ, self._listen)

    def _send(self) -> None:
        try:
            del self._outbox[: os.write(self._requests, self._outbox[: 1 << 16])]
        except BlockingIOError:
            pass
        except OSError:  # it is gone, as the other pipe will say
            self._outbox.clear()

    def _read(self, descriptor: int) -> bytes | None:
        """None if there is nothing now."""
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return None
        if not chunk:
            self._open.discard(descriptor)
        return chunk

    def _receive(self) -> None:
        self._inbox += self._read(self._answers) or b""

    def _listen(self) -> None:
        chunk = self._read(self._output) or b""
        kept = chunk[: PRINTED - len(self._printed)]
        self._printed += kept
        self._dropped += len(chunk) - len(kept)

    def _whole(self) -> bool:
        """Whether a message is here, its payload included."""
        if self._head is None:
            line, end, rest = self._inbox.partition(b"\n")
            if not end:
                return False
            self._head, self._inbox = json.loads(line), rest
        return len(self._inbox) >= self._head.get("bytes", 0)

    def message(self) -> tuple[Any, bytes] | None:
        """Its next message and the payload, once they are whole."""
        if not self._whole():
            return None
        head, self._head = self._head, None
        size = head.get("bytes", 0)
        payload = bytes(self._inbox[:size])
        del self._inbox[:size]
        return head, payload

    def gone(self) -> bool:
        """Whether it can answer no more."""
        if self._answers in self._open and has_ended(self.process):
            while chunk := self._read(self._answers):  # what it wrote last
                self._inbox += chunk
            return not self._whole()
        return self._answers not in self._open

    def ending(self) -> str:
        """How a process that is gone has ended."""
        deadline = time.monotonic() + EXIT_TIMEOUT  # its pipes close a moment before it has ended
        while not has_ended(self.process) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.kill()
        code = self.process.returncode or 0
        return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with status {code}"

    def take_printed(self) -> str:
        """What it printed since the last call."""
        for _ in range(16):  # a pipe holds less; a thread of it may write on and on
            before = len(self._printed) + self._dropped
            if self._output in self._open:
                self._listen()
            if len(self._printed) + self._dropped == before:
                break
        text = self._printed.decode(errors="replace").rstrip()
        if self._dropped:
            text += f" ... ({self._dropped} bytes more)"
        self._printed, self._dropped = bytearray(), 0
        return text

    def leave(self) -> None:
        """Ask it to end by itself."""
        os.close(self._requests)
        self._requests = -1

    def kill(self) -> None:
        """End it and what it started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_TIMEOUT)
        for descriptor in (self._requests, self._answers):
            if descriptor >= 0:
                os.close(descriptor)
        self._requests = self._answers = -1
        self._open.clear()
        self.process.stdout.close()  # type: ignore[union-attr]
