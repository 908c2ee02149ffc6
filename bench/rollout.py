"""Rollouts in process against transformers' generate and vLLM: `python bench/rollout.py [--vllm PYTHON]`.

Tokens per second of whole calls (prompts, decoding, log-probs and entropy of every token; packing the weights included) on
SmolLM2-135M where the demo has put it, else on a random Llama of its shape: 8 prompt and 24 new tokens in bf16. The sides take
turns in one process, so that both meet the same machine; a ratio is the median over rounds of the two times of a round.

PYTHON, of an environment that has vLLM (RLHF_FAST_VLLM_PYTHON if left out; without either vLLM has no part), runs it three times: by
itself in a process without HTTP, the same with the adapter, and as rollout.engine = vllm, the server of a run. The first two draw
from one stream without seeds and return log-probs too. vLLM takes the processors that it takes by itself, all but one;
VLLM_CPU_OMP_THREADS_BIND says others.

First the gate: in fp32 greedy tokens must be generate's, and log-probs those of a teacher-forced pass. bf16 has ties, and generate
rounds logits to bf16, so there the share of tokens before the first difference of a row is reported, also of vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from shapes import llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import rlhf_fast
from rlhf_fast.config import ModelConfig, VLLMConfig
from rlhf_fast.demo.assets import default_cache
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout import PackedRollout, Request, attention_of, generate
from rlhf_fast.rollout.vllm import VLLMEngine

BAR, VLLM_BAR = 1.8, 1.4
"""Least ratio to generate with sampling, and to vLLM without an adapter."""
LOGPROBS = 2e-4
"""Largest difference of a log-prob from a teacher-forced pass of 30 layers in fp32, in nats."""
OURS, GENERATE, VLLM = "ours", "generate", "vLLM"
Ask = Callable[[Tensor, int, bool], Tensor]
"""New tokens (B, new) of prompts (B, P): sampled, or the most likely ones."""


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of the demo, or its shape with random weights."""
    if folder.is_dir():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    return llama(pad_token_id=0).to(dtype)


def by_generate(base: PreTrainedModel, ids: Tensor, new: int, sample: bool) -> Tensor:
    """New tokens (B, new) of generate from the whole distribution, or the most likely ones."""
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {"do_sample": False}
    mask = torch.ones_like(ids)
    out = base.generate(ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **options)
    return out[:, ids.shape[1] :]


def bare(base: PreTrainedModel) -> PreTrainedModel:
    """Without an end-of-sequence: every completion has all its tokens."""
    base.generation_config = transformers.GenerationConfig(eos_token_id=None)
    return base


def shared(base: PreTrainedModel) -> SharedModel:
    """Policy and reference with adapters of rank 16 on all linear layers, whose B is not 0."""
    model = SharedModel(base, roles=("policy", "reference"), lora=LoraConfig(r=16))
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if name.endswith("lora_B.weight"):
                p.normal_(0.0, 1e-3)
    return model


def prompts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 40_000, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def gate(folder: Path, length: int, new: int) -> dict[str, object]:
    """Checks of the outputs; raises SystemExit with the reason."""
    ids, mask = prompts(8, length)
    base = bare(load(folder, torch.float32))
    expected = by_generate(base, ids, new, sample=False)
    model = shared(base)
    attention = attention_of(model)
    found = generate(model, ids, mask, max_new_tokens=new, temperature=0.0, role="reference")
    if not torch.equal(found.responses, expected):
        raise SystemExit("gate: in fp32 greedy tokens differ from generate's")
    rollout = generate(model, ids, mask, max_new_tokens=new, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(rollout.input_ids, rollout.attention_mask, roles=("policy",)).policy.logits
    exact = rlhf_fast.token_logprobs(logits[:, length - 1 : -1], rollout.responses).logprobs
    assert rollout.logprobs is not None
    off = float((rollout.logprobs - exact).abs().max())
    if off > LOGPROBS:
        raise SystemExit(f"gate: log-probs are {off:.2g} off a teacher-forced pass, expected at most {LOGPROBS:g}")
    half = bare(load(folder, torch.bfloat16))
    expected = by_generate(half, ids, new, sample=False)
    found = generate(shared(half), ids, mask, max_new_tokens=new, temperature=0.0, role="reference")
    agreeing = (found.responses == expected).int().cumprod(1).float().mean()
    return {
        "attention": attention or "ours",
        "fp32 greedy tokens": "equal",
        "fp32 log-probs off by": off,
        "bf16 greedy tokens before the first difference": float(agreeing),
    }


def processor_seconds() -> float:
    """Of this process and those that it started, which still run."""
    seconds, parents = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # gone
            continue
        pid = int(file.parent.name)
        parents[pid], seconds[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return sum(spent for pid, spent in seconds.items() if ours(pid))


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of the processors, of every call in every round, after one round that does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for k in range(rounds + 1):
        for name, call in calls.items():
            start, used = time.perf_counter(), processor_seconds()
            call()
            if k:
                seconds[name].append((time.perf_counter() - start, processor_seconds() - used))
    return seconds


@contextmanager
def vllm_alone(python: str, folder: Path, adapter: Path | None) -> Iterator[Ask]:
    """vLLM in a process of its own, asked over a pipe."""
    command = [
        python,
        str(Path(__file__).with_name("vllm_peer.py")),
        str(folder),
        *([] if adapter is None else [str(adapter)]),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment) as peer,
    ):
        assert peer.stdin is not None and peer.stdout is not None

        def line() -> bytes:
            if found := peer.stdout.readline():  # type: ignore[union-attr]
                return found
            log.seek(0)
            raise SystemExit("vLLM has ended: " + log.read().decode(errors="replace")[-2000:])

        def ask(ids: Tensor, new: int, sample: bool) -> Tensor:
            body = {"prompts": ids.tolist(), "new": new, "sample": sample}
            peer.stdin.write(json.dumps(body).encode() + b"\n")  # type: ignore[union-attr]
            peer.stdin.flush()  # type: ignore[union-attr]
            return torch.tensor(json.loads(line())["tokens"])

        line()
        try:
            yield ask
        finally:
            peer.stdin.close()


@contextmanager
def vllm_sides(python: str, folder: Path, model: SharedModel, context: int) -> Iterator[dict[str, Ask]]:
    """vLLM by itself, with the adapter, and as the engine of a run."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB for each of three
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "policy"
        model.export_adapter("policy", adapter)
        settings = VLLMConfig(python=python)
        with (
            vllm_alone(python, folder, None) as alone,
            vllm_alone(python, folder, adapter) as adapted,
            VLLMEngine(
                settings, ModelConfig(str(folder), dtype="bfloat16"), context=context, folder=Path(scratch)
            ) as engine,
        ):
            engine.update(model, 0)

            def ask(ids: Tensor, new: int, sample: bool) -> Tensor:
                seeds = torch.randint(2**63 - 1, (len(ids),), generator=generator)
                engine.submit(Request(ids.tolist(), 1, seeds, new, 0, 1.0 if sample else 0.0, None))
                return engine.collect()[0].responses

            yield {VLLM: alone, "vLLM, with the adapter": adapted, "vLLM, rollout.engine": ask}


def compare(
    base: PreTrainedModel, model: SharedModel, others: dict[str, Ask], batch: int, length: int, new: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens per second (median and best) and the ratios to generate and vLLM, by side. others: further sides."""
    ids, mask = prompts(batch, length)
    kept = PackedRollout(model)
    generator = torch.Generator().manual_seed(0)

    def ours(**options: object) -> Callable[[], object]:
        return lambda: generate(model, ids, mask, max_new_tokens=new, generator=generator, **options)  # type: ignore[arg-type]

    calls: dict[str, Callable[[], object]] = {
        GENERATE: lambda: by_generate(base, ids, new, sample=True),
        OURS: ours(),
        "ours, without an adapter": ours(role="reference"),
        "ours, packed before": ours(packed=kept),
        "generate, greedy": lambda: by_generate(base, ids, new, sample=False),
        "ours, greedy": ours(temperature=0.0),
        **{name: lambda ask=ask: ask(ids, new, True) for name, ask in others.items()},  # type: ignore[misc]
    }
    seconds = timed(calls, rounds)

    def ratio(than: str, name: str, clock: int) -> float:
        return statistics.median(p[clock] / t[clock] for p, t in zip(seconds[than], seconds[name], strict=True))

    found = {}
    for name, took in seconds.items():
        than = "generate, greedy" if "greedy" in name else GENERATE
        found[name] = {
            "median tok/s": batch * new / statistics.median(t for t, _ in took),
            "best tok/s": batch * new / min(t for t, _ in took),
            "ratio": ratio(than, name, 0),
            "processor ratio": ratio(than, name, 1),
            **{f"ratio to {other}": ratio(other, name, 0) for other in others if name.startswith(OURS)},
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_cache() / "smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vllm", metavar="PYTHON", default=os.environ.get("RLHF_FAST_VLLM_PYTHON"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if options.vllm and not options.model.is_dir():
        parser.error("argument --vllm: needs a model with its tokenizer in --model")
    checked = gate(options.model, options.prompt, options.new)
    base, model = bare(load(options.model, torch.bfloat16)), shared(load(options.model, torch.bfloat16))
    with ExitStack() as stack:
        others: dict[str, Ask] = {}
        if options.vllm:
            context = options.prompt + options.new
            others = stack.enter_context(vllm_sides(options.vllm, options.model, model, context))
            ids, _ = prompts(8, options.prompt)
            expected = by_generate(base, ids, options.new, sample=False)
            same = others[VLLM](ids, options.new, False) == expected
            checked["vLLM's bf16 greedy tokens before the first difference"] = float(
                same.int().cumprod(1).float().mean()
            )
        sizes = options.prompt, options.new, options.rounds
        results = {b: compare(base, model, others, b, *sizes) for b in options.batch}
    if options.json:
        print(json.dumps({"gate": checked, "threads": torch.get_num_threads(), "batch": results}))
        return 0
    source = options.model if options.model.is_dir() else "a random Llama of SmolLM2-135M's shape"
    print(f"{source}, {options.prompt} + {options.new} tokens, bf16, {torch.get_num_threads()} threads")
    for name, value in checked.items():
        print(f"gate: {name}: {value if isinstance(value, str) else f'{value:.3g}'}")
    missed = False
    for batch, rows in results.items():
        for name, row in rows.items():
            text = f"batch {batch:>4}  {name:<26}{row['median tok/s']:>8.0f} tok/s (best {row['best tok/s']:.0f})"
            print(f"{text:<68}{row['ratio']:>6.2f} x generate{row['processor ratio']:>8.2f} x by processor time")
        for other in others:
            for name in (OURS, "ours, without an adapter"):
                print(f"batch {batch:>4}  {name}: {rows[name][f'ratio to {other}']:.2f} x {other}")
        missed |= rows[OURS]["ratio"] < BAR
    print(f"bar: {BAR} x generate: {'missed' if missed else 'met'}")
    if others:
        slow = any(rows[OURS][f"ratio to {VLLM}"] < VLLM_BAR for rows in results.values())
        print(f"bar: {VLLM_BAR} x vLLM: {'missed' if slow else 'met'}")
        missed |= slow
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
