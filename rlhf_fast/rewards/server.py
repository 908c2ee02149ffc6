"""Rewards from a server, over HTTP.

    POST <url>   {"prompts": ["..."], "completions": ["..."]}
    200          {"scores": [0.5, null]}

One number per completion, null for one that cannot be scored. Both bodies are UTF-8 JSON; nothing else crosses the border.
If RLHF_FAST_REWARD_TOKEN is set, requests carry it as `Authorization: Bearer`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from rlhf_fast import _env
from rlhf_fast.rewards.backends import Answer, Call, Failure
from rlhf_fast.rewards.functions import ContractError, scores_of

RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be better a moment later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first retry, which double from one to the next, and their limit, also for what the server asks for."""
MAX_BYTES_PER_SCORE = 1000


class Server:
    """The reward server at `url`.

    requests: how many go out at once. timeout: seconds of one attempt, from the connection to the last byte. retries:
    further attempts after a connection that fails, a timeout, or an answer of RETRIED. No redirect is followed and no proxy
    used: completions go to the host that was named or nowhere.

    Raises ValueError for a url that is none.
    """

    repeats = False

    def __init__(self, url: str, requests: int, *, timeout: float, retries: int) -> None:
        try:
            parts = urlsplit(url)
            fine = (
                parts.scheme in ("http", "https") and parts.username is None and not parts.fragment and parts.port != 0
            )
        except ValueError:  # a port or an IPv6 address that is none
            fine = False
        if not fine or not parts.hostname:
            raise ValueError(f"Server: argument 'url' got {url!r}, expected http[s]://host[:port]/path without a user")
        self.url, self.width, self.timeout, self.retries = url, requests, timeout, retries
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def run(self, calls: Sequence[Call]) -> list[Answer]:
        """See Backend."""
        if len(calls) == 1:
            return [self._ask(calls[0])]
        with ThreadPoolExecutor(self.width, "rewards") as threads:
            return list(threads.map(self._ask, calls))

    def close(self) -> None:
        """Nothing to do: every request has ended with its call."""

    def _ask(self, call: Call) -> Answer:
        body = json.dumps({"prompts": list(call.prompts), "completions": list(call.completions)}).encode()
        for attempt in range(self.retries + 1):
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
            try:
                status, retry_after, content = self._post(body, MAX_BYTES_PER_SCORE * (len(call.completions) + 1))
            except (OSError, http.client.HTTPException) as error:
                failure = Failure("server_errors", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            else:
                if status == 200:
                    return self._scores(content, len(call.completions))
                failure = Failure("server_errors", f"status {status}", content[:500].decode(errors="replace"))
                if status not in RETRIED:
                    return failure
                pause = min(max(pause, retry_after), LONGEST_PAUSE)
            if attempt < self.retries:
                time.sleep(pause)
        return failure

    def _post(self, body: bytes, limit: int) -> tuple[int, float, bytes]:
        """(status, seconds of Retry-After or 0, content of at most `limit` + 1 bytes) of one attempt."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        token = _env.get("REWARD_TOKEN")
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        late = threading.Event()
        connected: list[socket.socket] = []

        def end() -> None:
            late.set()
            # The connection forgets its socket once the headers are there; before the handshake is over it alone has it.
            for link in connected or [connection.sock]:
                with contextlib.suppress(OSError, AttributeError):
                    link.shutdown(socket.SHUT_RDWR)

        # The timeout of a socket starts anew with every byte; this one does not.
        alarm = threading.Timer(self.timeout, end)
        alarm.daemon = True
        alarm.start()
        try:
            connection.connect()
            connected.append(connection.sock)
            connection.request("POST", self._target, body, headers)
            answer = connection.getresponse()
            content = answer.read(limit + 1)
            if not late.is_set():
                return answer.status, _seconds(answer.headers.get("Retry-After")), content
        except (OSError, http.client.HTTPException):
            if not late.is_set():
                raise
        finally:
            alarm.cancel()
            connection.close()
        raise TimeoutError(f"no whole answer within {self.timeout:g} s")

    def _scores(self, content: bytes, expected: int) -> list[float]:
        name = f"reward server {self.url}"
        if len(content) > MAX_BYTES_PER_SCORE * (expected + 1):
            raise ContractError(f"{name}: got more than {len(content) - 1} bytes for {expected} completions")
        try:
            answer: Any = json.loads(content)
        except (ValueError, RecursionError):
            raise ContractError(f"{name}: got {_short(content)}, expected JSON") from None
        if not isinstance(answer, dict) or "scores" not in answer:
            raise ContractError(f"{name}: got {_short(content)}, expected {{'scores': [...]}}")
        return scores_of(answer["scores"], name, expected)


def _seconds(retry_after: str | None) -> float:
    # The header may also hold a date, of a clock that need not be ours: then the pause is our own.
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0


def _short(content: bytes) -> str:
    text = " ".join(content[:80].decode(errors="replace").split())
    return repr(text if len(content) <= 80 else text + "...")
