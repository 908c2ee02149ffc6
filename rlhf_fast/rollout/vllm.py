"""Completions by a vLLM server that holds the base, and is handed the policy's adapter after every training step.

One mechanism for a server that the run starts, in another environment (vLLM pins a torch of its own, and nothing of it is imported
here), and for one that runs elsewhere. Prompts go to `/v1/completions` as token ids, one request a completion, since a request has
one seed; the server's prefix cache reads a prompt once for its samples. Adapters go through a folder that the server sees, to
`/v1/load_lora_adapter`, each under a name of its own, so that nothing cached under an older one is taken for it. If RLHF_FAST_VLLM_TOKEN
is set, requests to a server elsewhere carry it as `Authorization: Bearer`.

The server holds the base as it lies in `model.path`, before any fold: an adapter is what lies between that and the policy, folds
included (`SharedModel.export_adapter`), so its rank is the sum of theirs. Folds are rounded into the weights here and are not there,
one part of the mismatch that the trainers log.

A resumed run asks the same with the same seeds (of which vLLM's generators on a CPU read the low 32 bits), but vLLM promises no bits:
what else runs in a batch, its caches and its version change a rounding and with it, now and then, a token.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import secrets
import shutil
import socket
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_fast import _check, _env
from rlhf_fast._guarded import Guarded
from rlhf_fast._http import RETRIED, Client, Reply, one_line
from rlhf_fast.batch import pad
from rlhf_fast.config import ModelConfig, VLLMConfig, resolve_dtype
from rlhf_fast.model import SharedModel
from rlhf_fast.model.adapters import CONFIG_FILE
from rlhf_fast.ops import token_logprobs
from rlhf_fast.rollout.engines import Engine, EngineError, Request
from rlhf_fast.rollout.hf import Rollout

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank (vllm/config/lora.py, 0.32)."""
PROBE_TEMPERATURE = 2.0
MISMATCH = 0.3
"""Mean difference of a log-prob in nats at that temperature, beyond which the server holds something else than the policy: several
times what bf16 or weights of 8 bits cost."""
BYTES_PER_TOKEN, BYTES_PER_REPLY = 4096, 1 << 16
"""Bounds of a reply: the text of a token, which comes three times and escaped, and everything else."""
_PRIVATE = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that speak to this process, and would mislead another Python or vLLM's own process groups."""


class _Batch(NamedTuple):
    """A request under way."""

    adapter: str
    version: int
    request: Request
    answers: list[Future[tuple[list[int], list[float]]]]


class VLLMEngine(Engine):
    """Samples by a vLLM server (0.32 was tried); see the module.

    settings: which server. model: whose path and dtype a server has that the run starts. context: tokens of the longest prompt and
    completion together. folder: where the log and the adapters go, and from where a server elsewhere has to read them unless the
    settings name another.

    The server starts with the first `update`. No entropy comes with its rollouts.
    Raises ValueError for an address that is none or a Python that is not there, EngineError from every method for a server that
    cannot be used.
    """

    for_all_ranks = True

    def __init__(self, settings: VLLMConfig, model: ModelConfig, *, context: int, folder: Path) -> None:
        self.settings, self.path, self.context = settings, model.path, context
        self.dtype = str(resolve_dtype(model.dtype)).removeprefix("torch.")
        self.folder = folder.absolute()
        self.adapters = Path(settings.adapters).absolute() if settings.adapters is not None else self.folder
        self._program: Guarded | None = None
        self._client: Client | None = None
        if settings.server is not None:
            self._client = self._client_of(settings.server, _env.get("VLLM_TOKEN"))
        elif settings.python is None or shutil.which(settings.python) is None:
            raise _check.error(
                ValueError, "VLLMEngine", "python", repr(settings.python), "a Python that vLLM is installed for"
            )
        self._threads = ThreadPoolExecutor(settings.requests, "vllm")
        self._ready = False
        # Other runs may use the server, also an earlier one of this folder.
        self._prefix, self._count = f"policy-{secrets.token_hex(4)}", 0
        self._adapter, self._version = "", 0
        self._written: list[str] = []
        """Adapters that lie in the folder, which are all that the server may have."""
        self._batches: deque[_Batch] = deque()

    def update(self, model: SharedModel, version: int) -> None:
        """See Engine. The first one starts the server, and checks that it computes what the model computes."""
        name = f"{self._prefix}-{self._count}"
        folder = self.adapters / name
        self._written.append(name)
        self._count += 1
        model.export_adapter("policy", folder)
        rank = int(json.loads((folder / CONFIG_FILE).read_text())["r"])
        if not self._ready:
            self._begin(rank)
        self._load(name, folder, rank)
        self._adapter, self._version = name, version
        if not self._ready:
            self._check_served(model)
            self._ready = True
        self._unload()

    def submit(self, request: Request) -> None:
        """See Engine. Raises ValueError before the first update, and for prompts that leave no room for the completion."""
        if not self._ready:
            raise ValueError("VLLMEngine.submit: no adapter has been handed over, expected `update` first")
        longest = max(map(len, request.prompts), default=0)
        if longest + request.max_new_tokens > self.context:
            got = f"{longest} tokens and {request.max_new_tokens} new ones"
            raise _check.error(ValueError, "VLLMEngine.submit", "request", got, f"at most {self.context} in all")
        name, seeds = self._adapter, request.seeds.tolist()
        prompts = [prompt for prompt in request.prompts for _ in range(request.num_samples)]
        answers = [
            self._threads.submit(self._complete, prompt, seed, request, name)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        self._batches.append(_Batch(name, self._version, request, answers))

    def collect(self) -> tuple[Rollout, int]:
        """See Engine. Raises ValueError if nothing was submitted."""
        if not self._batches:
            raise ValueError("VLLMEngine.collect: nothing was submitted")
        batch = self._batches[0]
        try:
            found = [answer.result() for answer in batch.answers]
        except BaseException:
            for answer in batch.answers:
                answer.cancel()
            raise
        self._batches.popleft()
        self._unload()
        return _rollout(batch.request, found), batch.version

    def close(self) -> None:
        """End the server if the run started it, else take the adapters from it."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()  # the server drops what it works on
        if self._program is not None:
            self._program.end()
        elif self._client is not None:
            self._adapter = ""
            self._batches.clear()
            self._client = Client("VLLMEngine", self._client.url, timeout=10.0, retries=0, token=_env.get("VLLM_TOKEN"))
            self._unload(quietly=True)
        for name in self._written:
            shutil.rmtree(self.adapters / name, ignore_errors=True)
        self._written.clear()

    def _begin(self, rank: int) -> None:
        """Have a server that answers, and knows enough tokens."""
        if self.settings.server is None:
            self._start(rank)
        try:
            models = self._json(self._ask("GET", "/v1/models"), "/v1/models")
            cards = [card for card in models["data"] if card.get("parent") is None]
            held = min(int(card["max_model_len"]) for card in cards)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self._name}: /v1/models got {one_line(error)}, expected that of vLLM") from None
        if held < self.context:
            raise EngineError(
                f"{self._name}: its context has {held} tokens, and the longest prompt and completion have {self.context}: "
                f"start it with --max-model-len {self.context}, or shorten rollout.max_new_tokens or data.max_prompt_tokens"
            )

    def _start(self, rank: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Not an argument, which every user of the machine could read.
        key = secrets.token_hex(16)
        command = server_command(
            self.settings, self.path, dtype=self.dtype, context=self.context, rank=rank, host="127.0.0.1", port=port
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "server.log"
        self._program = Guarded(command, log=log, environment=server_environment(key))
        self._client = self._client_of(f"http://127.0.0.1:{port}", key)
        await_server(self._name, self._program, self._client.url, key, self.settings.start_timeout)

    def _check_served(self, model: SharedModel) -> None:
        """Compare the log-probs of a few sampled tokens with those of the policy here."""
        vocabulary = model.base.get_output_embeddings().weight.shape[0]
        length = min(8, self.context // 2)
        prompt = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
        new = min(16, self.context - length)
        request = Request([prompt], 1, torch.zeros(1, dtype=torch.int64), new, 0, PROBE_TEMPERATURE, None)
        tokens, there = self._complete(prompt, 0, request, self._adapter)
        device = model.backbone.device
        if max(tokens) >= vocabulary:
            raise EngineError(
                f"{self._name}: sampled token {max(tokens)} of a base with {vocabulary}: {self._expected}"
            )
        ids = torch.tensor([prompt + tokens], device=device)
        with torch.no_grad():
            logits = model(ids, roles=("policy",)).policy.logits[:, length - 1 : -1]
        off = {}
        for temperature in (PROBE_TEMPERATURE, 1.0):
            here = token_logprobs(logits, ids[:, length:], temperature=temperature).logprobs[0].cpu()
            off[temperature] = float((here - torch.tensor(there)).abs().mean())
        if off[1.0] < min(off[PROBE_TEMPERATURE], MISMATCH):
            raise EngineError(
                f"{self._name}: its log-probs are those before the temperature: start it with "
                "--logprobs-mode processed_logprobs"
            )
        if not off[PROBE_TEMPERATURE] <= MISMATCH:
            raise EngineError(
                f"{self._name}: its log-probs are {off[PROBE_TEMPERATURE]:.2g} nats off those of the policy here: {self._expected}"
            )

    def _load(self, name: str, folder: Path, rank: int) -> None:
        body = {"lora_name": name, "lora_path": str(folder)}
        # An adapter that cannot be loaded is a 500, and no better a moment later.
        reply = self._ask("POST", "/v1/load_lora_adapter", body, retried=set(RETRIED) - {500})
        told = _message(reply)
        if reply.status == 200 or "already been loaded" in told:  # by an attempt whose answer was lost
            return
        if reply.status == 404 and "adapter" not in told:
            hint = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        elif reply.status == 404:
            hint = f"it has to see {folder} under the same name; rollout.vllm.adapters names another folder"
        else:
            hint = (
                f"the adapter has rank {rank} (folds included), so it needs --enable-lora --max-lora-rank {_room(rank)}"
            )
        raise EngineError(f"{self._name}: cannot load an adapter (status {reply.status}: {told}); {hint}")

    def _unload(self, *, quietly: bool = False) -> None:
        """Take away the adapters that nothing samples from any more."""
        used = {self._adapter, *(batch.adapter for batch in self._batches)}
        for name in [name for name in self._written if name not in used]:
            try:
                reply = self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
                if reply.status not in (200, 404):
                    raise EngineError(
                        f"{self._name}: cannot unload an adapter (status {reply.status}: {_message(reply)})"
                    )
            except EngineError:
                if not quietly:
                    raise
            # Until now the server could have had to read it again.
            shutil.rmtree(self.adapters / name, ignore_errors=True)
            self._written.remove(name)

    def _complete(self, prompt: list[int], seed: int, request: Request, adapter: str) -> tuple[list[int], list[float]]:
        """(tokens, log-probs) of one completion; the end-of-sequence token is one of them."""
        ends = [] if request.eos_token_id is None else [request.eos_token_id]
        body = {
            "model": adapter,
            "prompt": prompt,
            "max_tokens": request.max_new_tokens,
            "min_tokens": request.min_new_tokens,
            "temperature": request.temperature,
            "seed": seed,
            # What ends a completion is said here alone, not by the model's files.
            "ignore_eos": True,
            "stop_token_ids": ends,
            "logprobs": 0,
            "return_token_ids": True,
            # The model's generation_config.json may hold other defaults.
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        limit = BYTES_PER_REPLY + 16 * len(prompt) + BYTES_PER_TOKEN * request.max_new_tokens
        reply = self._ask("POST", "/v1/completions", body, limit=limit)
        if reply.status != 200:
            raise EngineError(f"{self._name}: a completion failed (status {reply.status}: {_message(reply)})")
        answer = self._json(reply, "/v1/completions")
        try:
            (choice,) = answer["choices"]
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            fine = (
                1 <= len(tokens) == len(logprobs) <= request.max_new_tokens
                and all(type(token) is int and token >= 0 for token in tokens)
                and all(type(x) in (int, float) and math.isfinite(x) for x in logprobs)
                and (tokens[-1] in ends or len(tokens) == request.max_new_tokens)
                and not any(token in ends for token in tokens[:-1])
            )
        except (KeyError, TypeError, ValueError):
            fine = False
        if not fine:
            got = " ".join(reply.content[:300].decode(errors="replace").split())
            raise EngineError(f"{self._name}: a completion got {got!r}, expected token ids with a log-prob each")
        return tokens, logprobs

    def _ask(self, method: str, target: str, body: Mapping[str, object] | None = None, **options: Any) -> Reply:
        assert self._client is not None
        content = None if body is None else json.dumps(body).encode()
        try:
            return self._client.ask(
                method, target, content, hopeless=self._gone, **{"limit": BYTES_PER_REPLY, **options}
            )
        except (OSError, http.client.HTTPException) as error:
            # A connection breaks a moment before the process that held it has ended.
            deadline = time.monotonic() + 1.0
            while self._program is not None and not self._gone() and time.monotonic() < deadline:
                time.sleep(0.01)
            if self._program is not None and self._gone():
                raise EngineError(f"{self._name}: it has ended; {self._program.last_words()}") from None
            raise EngineError(f"{self._name}: no answer to {target} ({one_line(error)})") from None

    def _gone(self) -> bool:
        return self._program is not None and self._program.ended

    def _json(self, reply: Reply, target: str) -> Any:
        try:
            return json.loads(reply.content)
        except (ValueError, RecursionError):
            raise EngineError(f"{self._name}: the answer to {target} (status {reply.status}) is no JSON") from None

    def _client_of(self, url: str, token: str | None) -> Client:
        return Client("VLLMEngine", url, timeout=self.settings.timeout, retries=self.settings.retries, token=token)

    @property
    def _name(self) -> str:
        return "the vLLM server" if self._program is not None else f"the vLLM server {self.settings.server}"

    @property
    def _expected(self) -> str:
        return f"it has to serve {self.path} without folds"


def server_command(
    settings: VLLMConfig, path: str, *, dtype: str, context: int, rank: int, host: str, port: int
) -> list[str]:
    """What starts a server of the base in `path` that rollouts can be asked of.

    context: tokens of the longest prompt and completion together. rank: of the policy's adapter, folds included. The arguments of the
    settings come last, and win. Raises ValueError for settings without a Python, and for a rank that vLLM has no room for.
    """
    if settings.python is None:
        raise _check.error(ValueError, "server_command", "settings.python", None, "a Python that vLLM is installed for")
    options = {
        "--model": os.path.abspath(path),
        "--host": host,
        "--port": str(port),
        "--dtype": dtype,
        "--max-model-len": str(context),
        "--max-lora-rank": str(_room(rank)),
        "--max-loras": "2",  # the newest, and the one before it that is still sampled from
        "--logprobs-mode": "processed_logprobs",
        "--uvicorn-log-level": "warning",
    }
    words = [word for pair in options.items() for word in pair]
    module = "vllm.entrypoints.openai.api_server"
    return [settings.python, "-m", module, *words, "--enable-lora", *settings.arguments]


def server_environment(key: str) -> dict[str, str]:
    """Variables of a server that the process starts: its own without those that are for it alone. key: what requests have to bear."""
    own = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
    own |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": key}
    return own | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def await_server(name: str, program: Guarded, url: str, key: str, seconds: float) -> None:
    """Return when the server at `url`, which is `program`, answers. Raises EngineError if it ends before, or takes too long."""
    deadline = time.monotonic() + seconds
    probe = Client("VLLMEngine", url, timeout=5.0, retries=0, token=key)
    while True:
        if program.ended:
            raise EngineError(f"{name}: it ended before it answered; {program.last_words()}")
        try:
            if probe.ask("GET", "/health", None, limit=BYTES_PER_REPLY).status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        if time.monotonic() > deadline:
            took = f"no answer within rollout.vllm.start_timeout = {seconds:g} s"
            raise EngineError(f"{name}: {took}; {program.last_words()}")
        time.sleep(0.1)


def _room(rank: int) -> int:
    """Least --max-lora-rank for adapters of a rank."""
    if rank > MAX_LORA_RANKS[-1]:
        expected = f"at most {MAX_LORA_RANKS[-1]}, that of the folds and the policy together"
        raise _check.error(ValueError, "VLLMEngine", "model", f"an adapter of rank {rank}", expected)
    return next(size for size in MAX_LORA_RANKS if size >= rank)


def _message(reply: Reply) -> str:
    """What an error reply says."""
    try:
        answer = json.loads(reply.content)
        text = answer["error"]["message"] if "error" in answer else answer["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = reply.content.decode(errors="replace")
    return " ".join(str(text).split())[:500]


def _rollout(request: Request, found: list[tuple[list[int], list[float]]]) -> Rollout:
    prompts, prompt_mask = (x.repeat_interleave(request.num_samples, 0) for x in pad(request.prompts, left=True))
    responses, mask = pad([tokens for tokens, _ in found])
    logprobs = torch.zeros(mask.shape)
    logprobs[mask] = torch.tensor([x for _, row in found for x in row])
    last = torch.tensor([tokens[-1] for tokens, _ in found])
    end = -1 if request.eos_token_id is None else request.eos_token_id
    return Rollout(
        input_ids=torch.cat([prompts, responses], 1),
        attention_mask=torch.cat([prompt_mask, mask], 1),
        response_mask=mask,
        finished=last == end,
        logprobs=logprobs,
    )
