"""Requests to a server that was named: attempts that end in time, and repeats of those that may do better."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be better a moment later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first retry, which double from one to the next, and their limit, also for what the server asks for."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    content: bytes
    retry_after: float = 0.0
    """Seconds that the server asks to wait, 0 without."""


class Client:
    """Requests with JSON bodies to the server of `url`.

    owner: whose argument the url is, for errors. timeout: seconds of one attempt, from the connection to the last byte. retries:
    further attempts after a connection that fails, a timeout, or an answer of RETRIED. token: goes along as a bearer token. No
    redirect is followed and no proxy used: what is sent goes to the host that was named or nowhere. Threads may share it.

    Raises ValueError for a url that is none.
    """

    def __init__(self, owner: str, url: str, *, timeout: float, retries: int, token: str | None) -> None:
        try:
            parts = urlsplit(url)
            fine = (
                parts.scheme in ("http", "https") and parts.username is None and not parts.fragment and parts.port != 0
            )
        except ValueError:  # a port or an IPv6 address that is none
            fine = False
        if not fine or not parts.hostname:
            raise ValueError(f"{owner}: argument 'url' got {url!r}, expected http[s]://host[:port]/path without a user")
        self.url, self.timeout, self.retries = url, timeout, retries
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._closed = False
        self._links: set[socket.socket] = set()
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        """Path and query of the url."""

    def ask(
        self,
        method: str,
        target: str,
        body: bytes | None,
        *,
        limit: int,
        retried: Collection[int] = RETRIED,
        hopeless: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """The reply of the first attempt whose status is not one of `retried`, or the last one's; content ends after `limit` + 1 bytes.

        hopeless: whether another attempt cannot do better, asked before each. Raises what the last attempt did: OSError or
        http.client.HTTPException.
        """
        for attempt in range(self.retries + 1):
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
            last = attempt == self.retries
            try:
                reply = self._attempt(method, target, body, limit)
            except (OSError, http.client.HTTPException):
                if last or self._closed or hopeless():
                    raise
            else:
                if last or self._closed or reply.status not in retried or hopeless():
                    return reply
                pause = min(max(pause, reply.retry_after), LONGEST_PAUSE)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End what other threads ask: their attempts fail, and no other follows."""
        self._closed = True
        for link in tuple(self._links):
            _shut(link)

    def _attempt(self, method: str, target: str, body: bytes | None, limit: int) -> Reply:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        late = threading.Event()
        connected: list[socket.socket] = []

        def end() -> None:
            late.set()
            # The connection forgets its socket once the headers are there; before the handshake is over it alone has it.
            for link in connected or [connection.sock]:
                _shut(link)

        # The timeout of a socket starts anew with every byte; this one does not.
        alarm = threading.Timer(self.timeout, end)
        alarm.daemon = True
        alarm.start()
        try:
            connection.connect()
            connected.append(connection.sock)
            self._links.add(connection.sock)
            if self._closed:
                raise ConnectionAbortedError("the client is closed")
            connection.request(method, target, body, self._headers)
            answer = connection.getresponse()
            content = answer.read(limit + 1)
            if not late.is_set():
                return Reply(answer.status, content, _seconds(answer.headers.get("Retry-After")))
        except (OSError, http.client.HTTPException):
            if not late.is_set():
                raise
        finally:
            alarm.cancel()
            self._links.difference_update(connected)
            connection.close()
        raise TimeoutError(f"no whole answer within {self.timeout:g} s")


def one_line(error: BaseException) -> str:
    """Kind and message of an error, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _shut(link: socket.socket) -> None:
    with contextlib.suppress(OSError, AttributeError):
        link.shutdown(socket.SHUT_RDWR)


def _seconds(retry_after: str | None) -> float:
    # The header may also hold a date, of a clock that need not be ours: then the pause is our own.
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
