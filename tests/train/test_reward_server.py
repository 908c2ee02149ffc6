from __future__ import annotations

import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from processes import PATIENCE

from rlhf_fast import _http as module
from rlhf_fast.config import RewardSource
from rlhf_fast.rewards import Call, ContractError, Failure, RewardError, Scorer, Server
from rlhf_fast.train.rewards import Rewards

TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


class Handler(BaseHTTPRequestHandler):
    """Answers with the lengths of the completions; `server.script` holds what goes wrong first, one entry a request."""

    server: LocalServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), request))
            step = self.server.script.pop(0) if self.server.script else None
        if step == "close":
            return
        if step == "meet":
            self.server.together.wait(PATIENCE)
            step = None
        if step == "hang":
            self.server.released.wait(PATIENCE)
            return
        if step == "drip head" or step == "drip body":
            start = b"HTTP/1.0 200 OK\r\n" + (b"Content-Length: 1000\r\n\r\n" if step == "drip body" else b"X-Slow: ")
            self.wfile.write(start)
            while not self.server.released.wait(0.02):
                self.wfile.write(b" ")
            return
        status, headers, body = step if isinstance(step, tuple) else (200, {}, step)
        if body is None:
            body = json.dumps({"scores": [len(c) for c in request["completions"]]})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


class LocalServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock, self.released = [], [], threading.Lock(), threading.Event()
        self.together = threading.Barrier(3)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/score?k=1"

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture
def local():
    server = LocalServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Pauses between attempts, which take no time here."""
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    return pauses


def ask(local, completions=TEXTS, *, timeout=PATIENCE, retries=3):
    client = Server(local.url, 1, timeout=timeout, retries=retries)
    return client.run([Call(local.url, [""] * len(completions), completions)])[0]


def test_request_and_answer_are_the_documented_json(local, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_REWARD_TOKEN", "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # completions go to the host that was named
    assert ask(local, ["\ud800", "\N{GRINNING FACE}"]) == [1.0, 1.0]
    ((path, headers, request),) = local.seen
    assert path == "/score?k=1" and request == {"prompts": ["", ""], "completions": ["\ud800", "\N{GRINNING FACE}"]}
    assert headers["Authorization"] == "Bearer secret" and headers["Content-Type"] == "application/json"
    monkeypatch.delenv("RLHF_FAST_REWARD_TOKEN")
    ask(local)
    assert "Authorization" not in local.seen[-1][1]


def test_null_is_unscorable(local):
    local.script = ['{"scores": [1, null, 0.5, true, NaN]}']
    assert ask(local) == pytest.approx([1, math.nan, 0.5, 1, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"scores": [1, 2]}', "got 2 scores for 5 completions"),
        ('{"scores": {"a": 1}}', "got a dict, expected a list of 5"),
        ('{"scores": [1, 2, 3, 4, "5"]}', "score 4 got str, expected a number"),
        ('{"score": 1}', """got '{"score": 1}', expected {'scores': [...]}"""),
        ("<html>log in</html>", "got '<html>log in</html>', expected JSON"),
        ("[" * 5000, "expected JSON"),
        ("", "got '', expected JSON"),
        ("1" * 100_000, "got more than 6000 bytes for 5 completions"),
    ],
)
def test_an_answer_that_breaks_the_contract_stops_the_run(local, body, message):
    local.script = [body]
    with pytest.raises(ContractError) as caught:
        ask(local)
    assert str(caught.value).startswith(f"reward server {local.url}: ") and message in str(caught.value)
    assert len(str(caught.value)) < 300 and len(local.seen) == 1


@pytest.mark.parametrize(
    "step", ["close", (500, {}, "x"), (503, {}, ""), (429, {}, ""), "hang", "drip head", "drip body"]
)
def test_what_may_pass_is_tried_again_after_growing_pauses(local, pauses, step):
    local.script = [step, step]
    slow = isinstance(step, str) and step != "close"
    started = time.monotonic()
    assert ask(local, timeout=2.0 if slow else PATIENCE) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert pauses == [0.5, 1.0] and len(local.seen) == 3
    assert time.monotonic() - started < PATIENCE / 2  # a server that hangs does so for longer


def test_retries_are_bounded_and_the_failure_says_why(local, pauses):
    local.script = [(503, {"Retry-After": "7"}, "busy"), (503, {"Retry-After": "1000000"}, "busy"), (503, {}, "busy")]
    assert ask(local, retries=2) == Failure("server_errors", "status 503", "busy")
    assert pauses == [7.0, module.LONGEST_PAUSE] and len(local.seen) == 3
    local.script = ["hang"]
    assert ask(local, retries=0, timeout=0.2).headline.startswith("TimeoutError: ")  # the socket's own may be first


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404])
def test_other_errors_and_redirects_are_final(local, pauses, status):
    local.script = [(status, {"Location": local.url}, "no")]
    assert ask(local) == Failure("server_errors", f"status {status}", "no")
    assert pauses == [] and len(local.seen) == 1


def test_nobody_there_is_a_failure_and_not_the_end(pauses):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        answer = Server(url, 1, timeout=PATIENCE, retries=6).run([Call(url, [""], ["x"])])[0]
    assert isinstance(answer, Failure) and answer.headline.startswith("ConnectionRefusedError")
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_batch_is_split_into_requests_that_run_at_once(local):
    client = Server(local.url, 3, timeout=PATIENCE, retries=0)
    local.script = ["meet"] * 3  # none is answered before the third is there
    assert Scorer(client, size=2).scores(local.url, [""] * 5, TEXTS, 0) == [1, 2, 3, 4, 5]
    assert sorted(len(r["completions"]) for _, _, r in local.seen) == [1, 2, 2]
    local.script = ["hang"] * 3
    client = Server(local.url, 3, timeout=0.3, retries=0)
    scorer = Scorer(client, size=2)
    assert all(map(math.isnan, scorer.scores(local.url, [""] * 5, TEXTS, 5)))
    assert scorer.failures == {"server_errors": 3}


def test_a_server_is_a_source_like_any_other(local):
    config = RewardSource(mix={local.url: 2.0}, workers=2, retries=0, max_unscorable=0.5)
    with Rewards(config) as rewards:
        assert rewards([""] * 5, TEXTS, None)[1].tolist() == [2.0, 4.0, 6.0, 8.0, 10.0]
        local.script = [(500, {}, "")]  # one of two requests, of 3 and 2 completions
        rewards_lost = sorted([3, 2])
        try:
            lost = int(rewards([""] * 5, TEXTS, None)[1].isnan().sum())
        except RewardError as error:
            assert "3 of 5 completions have no score" in str(error) and "1 server_errors" in str(error)
            lost = 3
        assert lost in rewards_lost


@pytest.mark.parametrize(
    "url", ["http://", "http://user:word@host/", "ftp://host/", "http://host:99999/", "http://host/#x", "http://[::1/"]
)
def test_addresses_that_are_none_are_refused(url):
    with pytest.raises(ValueError, match="argument 'url' got"):
        Server(url, 1, timeout=1.0, retries=0)


def test_with_steps_a_server_gets_the_list_of_them_and_scores_each(local):
    steps = [["a", "b", "c"], ["d"], ["e", "f"], ["g"]]
    local.script += ['{"scores": [[1, 2, 3], [4], [5, null], null]}', '{"scores": [1, 2, 3, 4]}']
    source = RewardSource(local.url, retries=0, max_unscorable=0.5)
    raw = Rewards(source)(["p"] * 4, steps, None)[1]
    assert raw[:4].tolist() == [1, 2, 3, 4] and raw[4:].isnan().all()
    assert local.seen[0][2] == {"prompts": ["p"] * 4, "completions": steps}
    with pytest.raises(ContractError, match="scores 0 got a int, expected a list of 3, one for each step"):
        Rewards(source)(["p"] * 4, steps, None)
