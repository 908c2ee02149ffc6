"""A server with the part of vLLM's protocol that rollouts use, around our own sampler: what it answers is known bit for bit.

As a program it takes the arguments of vLLM's server, `-m vllm.entrypoints.openai.api_server` included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from rlhf_fast.model import SharedModel
from rlhf_fast.rollout.engines import Request, sample


class Handler(BaseHTTPRequestHandler):
    """`server.script` holds what goes wrong first, one entry a completion: a status, "close", "exit", or a reply's text."""

    server: FakeVLLM

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization"), None))
        if self.path == "/health":
            return self.reply(200, "")
        adapters = [{"id": name, "parent": self.server.path} for name in self.server.adapters]
        base = {"id": self.server.path, "parent": None, "max_model_len": self.server.context}
        self.reply(200, {"object": "list", "data": [base, *adapters]})

    def do_POST(self) -> None:
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        if self.path == "/v1/completions" and not server.open.is_set():
            server.waiting += 1
            server.open.wait(600.0)
        with server.lock:
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            if self.path == "/v1/completions":
                self.complete(body)
            elif not server.updating:
                self.reply(404, {"detail": "Not Found"})
            elif self.path == "/v1/load_lora_adapter":
                self.load(body["lora_name"], Path(body["lora_path"]))
            elif self.path == "/v1/unload_lora_adapter":
                known = server.adapters.pop(body["lora_name"], None)
                self.reply(200 if known else 404, "Success" if known else error("cannot be found"))

    def load(self, name: str, folder: Path) -> None:
        server = self.server
        if name in server.adapters:
            return self.reply(400, error(f"The lora adapter '{name}' has already been loaded."))
        if not folder.is_dir():
            return self.reply(404, error(f"Loading lora {name} failed: No adapter found for <path>"))
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > server.max_rank:
            return self.reply(500, error(f"LoRA rank {rank} is greater than max_lora_rank {server.max_rank}."))
        server.adapters[name] = folder
        self.reply(200, f"Success: LoRA adapter '{name}' added successfully.")

    def complete(self, body: dict) -> None:
        server = self.server
        step = server.script.pop(0) if server.script else None
        if step == "exit":
            print("out of memory", flush=True)
            os._exit(9)
        if step == "close":
            return
        if isinstance(step, int):
            return self.reply(step, error("busy"))
        if isinstance(step, str):
            return self.reply(200, step)
        if body["model"] not in server.adapters:
            return self.reply(404, error(f"The model `{body['model']}` does not exist."))
        # From the file each time, as a server does that had to forget an adapter.
        server.model.load_adapter("policy", server.adapters[body["model"]])
        (end,) = body["stop_token_ids"] or [None]
        request = Request(
            [body["prompt"]],
            1,
            torch.tensor([body["seed"]]),
            body["max_tokens"],
            body["min_tokens"],
            1.0 if server.raw else body["temperature"],
            end,
        )
        found = sample(server.model, request)
        tokens, logprobs = found.responses[0].tolist(), found.logprobs[0].tolist()
        choice = {"index": 0, "text": "", "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
        self.reply(200, {"object": "text_completion", "choices": [choice]})

    def reply(self, status: int, content: object) -> None:
        body = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def error(message: str) -> dict:
    return {"error": {"message": message, "code": 400}}


class FakeVLLM(ThreadingHTTPServer):
    """context, max_rank, updating, raw: --max-model-len, --max-lora-rank, whether adapters may be loaded, log-probs of temperature 1.

    open: cleared, completions wait; `waiting` counts them.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, path: Path | str, port: int = 0, *, host: str = "127.0.0.1", context: int = 256, max_rank: int = 16
    ) -> None:
        self.path, self.context, self.max_rank, self.updating, self.raw = str(path), context, max_rank, True, False
        self.model = SharedModel.from_pretrained(path, roles=("policy",))
        self.adapters: dict[str, Path] = {}
        self.script: list = []
        self.seen: list[tuple[str, str | None, dict | None]] = []
        self.lock, self.open, self.waiting = threading.Lock(), threading.Event(), 0
        self.open.set()
        super().__init__((host, port), Handler)
        self.url = f"http://{host}:{self.server_address[1]}"

    def bodies(self, path: str) -> list[dict]:
        return [body for seen, _, body in self.seen if seen == path]

    def handle_error(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="module", required=True)
    for name in ("--model", "--host", "--dtype", "--logprobs-mode", "--uvicorn-log-level", "--fail-after"):
        parser.add_argument(name)
    for name in ("--port", "--max-model-len", "--max-lora-rank", "--max-loras"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--enable-lora", action="store_true", required=True)
    options = parser.parse_args()
    assert options.module == "vllm.entrypoints.openai.api_server" and options.logprobs_mode == "processed_logprobs"
    assert "PYTHONPATH" not in os.environ and os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    torch.set_num_threads(1)
    limits = {"context": options.max_model_len, "max_rank": options.max_lora_rank}
    server = FakeVLLM(options.model, options.port, host=options.host, **limits)
    if options.fail_after:
        server.script = [*[None] * int(options.fail_after), "exit"]
    print(f"serving process {os.getpid()}", flush=True)
    server.serve_forever()
