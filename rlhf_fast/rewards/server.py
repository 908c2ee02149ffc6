"""Rewards from a server, over HTTP.

    POST <url>   {"prompts": ["..."], "completions": ["..."]}
    200          {"scores": [0.5, null]}

One number per completion, null for one that cannot be scored. With steps a completion is the list of its steps, and gets a list of
one number for each, or null. Both bodies are UTF-8 JSON; nothing else crosses the border.
If RLHF_FAST_REWARD_TOKEN is set, requests carry it as `Authorization: Bearer`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf_fast import _env
from rlhf_fast._http import Client, one_line
from rlhf_fast.rewards.backends import Answer, Call, Failure
from rlhf_fast.rewards.functions import Completions, ContractError, Scores, scores_of

MAX_BYTES_PER_SCORE = 1000


class Server:
    """The reward server at `url`.

    requests: how many go out at once. timeout, retries: of rlhf_fast._http.Client.

    Raises ValueError for a url that is none.
    """

    repeats = False

    def __init__(self, url: str, requests: int, *, timeout: float, retries: int) -> None:
        self._client = Client("Server", url, timeout=timeout, retries=retries, token=_env.get("REWARD_TOKEN"))
        self.url, self.width = url, requests

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
        limit = _limit(call.completions)
        try:
            reply = self._client.ask("POST", self._client.target, body, limit=limit)
        except (OSError, http.client.HTTPException) as error:
            return Failure("server_errors", one_line(error))
        if reply.status == 200:
            return self._scores(reply.content, call.completions)
        return Failure("server_errors", f"status {reply.status}", reply.content[:500].decode(errors="replace"))

    def _scores(self, content: bytes, completions: Completions) -> Scores:
        name = f"reward server {self.url}"
        if len(content) > _limit(completions):
            raise ContractError(f"{name}: got more than {len(content) - 1} bytes for {len(completions)} completions")
        try:
            answer: Any = json.loads(content)
        except (ValueError, RecursionError):
            raise ContractError(f"{name}: got {_short(content)}, expected JSON") from None
        if not isinstance(answer, dict) or "scores" not in answer:
            raise ContractError(f"{name}: got {_short(content)}, expected {{'scores': [...]}}")
        return scores_of(answer["scores"], name, completions)


def _limit(completions: Completions) -> int:
    """Bytes of an answer."""
    scores = sum(1 if isinstance(completion, str) else len(completion) + 1 for completion in completions)
    return MAX_BYTES_PER_SCORE * (scores + 1)


def _short(content: bytes) -> str:
    text = " ".join(content[:80].decode(errors="replace").split())
    return repr(text if len(content) <= 80 else text + "...")
