"""A run that was planned and not run: memory and traffic of PPO on a 70B model with 64 GPUs, as Markdown.

`python bench/layouts.py > bench/layouts/70b_64_gpus.md`. Memory is `rlhf-fast plan`; bytes on wires and operations follow from
shapes; the times are those bytes and operations at the limits of data sheets, so that no run can be faster, and this one was not run.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

GIB = 2**30
SHEETS = """- H100 SXM5 80 GB: 989 TFLOP/s in bf16 without sparsity, 3.35 TB/s of memory, NVLink 900 GB/s in both directions together
  (NVIDIA H100 Tensor Core GPU data sheet).
- Between hosts: one 400 Gb/s port a GPU, eight a host (NVIDIA DGX H100 data sheet)."""
FLOPS, MEMORY, NVLINK, PORT = 989e12, 3.35e12, 450e9, 50e9
"""Per GPU: operations and bytes a second; links in one direction."""
GPUS_PER_HOST = 8
WIRE = 30
"""Bytes of JSON for a sampled token: its id and its log-prob with the digits of a double."""

TRAINERS, TENSOR_PARALLEL = 32, 4
BATCH, PROMPT, RESPONSE = 512, 512, 1024
MODEL = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
"""The shapes of Llama 3.1 70B (Grattafiori et al. 2024, arXiv:2407.21783, table 3)."""


def gather(size: float, ranks: int, gpus_per_host: int = GPUS_PER_HOST) -> tuple[float, float]:
    """Bytes that a GPU receives in an all-gather of `size` bytes: in all, and through its port to other hosts.

    The second at best: what a host lacks comes in once, an equal part through each of its ports.
    """
    hosts = -(-ranks // gpus_per_host)
    return size * (ranks - 1) / ranks, size * (hosts - 1) / hosts / gpus_per_host


def passes(micro_batches: int, trained: int, epochs: int = 1) -> int:
    """Times that every layer is gathered in a step: once a micro-batch for scoring, twice (forward, backward) for each update."""
    return micro_batches * (1 + 2 * trained * epochs)


def operations(parameters: float, tokens: float, roles: int, trained: int) -> tuple[float, float]:
    """Of scoring and of updates, without attention's: 2 a parameter and token in a forward; an update with gradient checkpointing has
    two forwards and a backward towards the inputs alone, since the base is frozen."""
    return 2 * parameters * tokens * roles, 6 * parameters * tokens * trained


def main() -> int:
    from transformers import LlamaConfig

    from rlhf_fast.config import LoraConfig, PlanConfig
    from rlhf_fast.plan import FREE, GPUS, Planner, budget, largest

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(dtype="bfloat16", **MODEL).save_pretrained(folder)
        config = PlanConfig(
            folder, trainer="ppo", gpu="h100", dtype="bfloat16", lora=LoraConfig(r=16), gradient_checkpointing=True,
            batch_size=BATCH, prompt_tokens=PROMPT, response_tokens=RESPONSE, ranks=TRAINERS, shard=True, engine="vllm",
        )  # fmt: skip
        planner = Planner(config)
        room = budget(config)
        assert room is not None
        rows = BATCH // TRAINERS
        found = largest(planner, room, rows)
        layers = sum(planner._layers())
        adapters = found.always["gradients"]
        base: Any = planner.model.base
        parameters = float(sum(p.numel() for p in base.parameters()))
        weights = sum(p.nbytes for p in base.parameters())
        policy = sum(p.nbytes for p in planner.model.parameters_of("policy").values())
    micro = -(-rows // found.micro_batch_size)
    roles, trained, tokens = 4, 2, BATCH * (PROMPT + RESPONSE)
    engines = (64 - TRAINERS) // TENSOR_PARALLEL
    inside, outside = gather(layers, TRAINERS)
    times = passes(micro, trained)
    scoring, updates = operations(parameters, tokens, roles, trained)
    compute = (scoring + updates) / TRAINERS / FLOPS
    wires = times * max(inside / NVLINK, outside / PORT)
    per_token = 2 * MODEL["num_hidden_layers"] * MODEL["num_key_value_heads"] * 128 * 2  # type: ignore[operator]
    cache = engines and TENSOR_PARALLEL * FREE * GPUS["h100"] * GIB - weights
    each = BATCH // engines
    decode = (weights / TENSOR_PARALLEL + each * (PROMPT + RESPONSE / 2) * per_token / TENSOR_PARALLEL) / MEMORY
    reduce = 2 * adapters * (TRAINERS - 1) / TRAINERS
    table = "\n".join(found.lines("h100"))
    print(
        f"""# PPO on a 70B model with 64 GPUs: planned, not run

Made by `python bench/layouts.py`, as a dry run: **no command of it has run on a GPU yet.** Memory is the plan of the code that would
run; bytes follow from shapes; every time is a bound from a data sheet, which no run reaches, and nothing here was measured on such machines. Attention's products are left out of the
operations (1 to 2 % at this length), vLLM's activations out of its memory.

The model has the shapes of Llama 3.1 70B ({parameters / 1e9:.1f} billion parameters, bf16), adapters of rank 16 on every linear layer,
policy, reference, value and reward on the one base. A step is {BATCH} completions of {PROMPT} + {RESPONSE} tokens, one epoch.

## Placement
| GPUs | what | started by |
| --- | --- | --- |
| {TRAINERS} (hosts 1 to {TRAINERS // GPUS_PER_HOST}) | the trainer, base spread by FSDP2 (`model.shard`), {rows} completions a rank | `torchrun --nnodes {TRAINERS // GPUS_PER_HOST} --nproc-per-node {GPUS_PER_HOST} -m rlhf_fast.cli ppo --config ...` |
| {64 - TRAINERS} (hosts {TRAINERS // GPUS_PER_HOST + 1} to 8) | {engines} vLLM servers with tensor parallelism {TENSOR_PARALLEL}, {each} completions each | `vllm serve ... --tensor-parallel-size {TENSOR_PARALLEL} --enable-lora`, behind one address (`rollout.vllm.server` is one; adapters have to reach every server) |

## Memory of a GPU that trains
The largest micro-batch that fits {FREE:.0%} of it: {found.micro_batch_size} of {rows}.
```
{table}
```

## Memory of a GPU that samples
| part | GiB |
| --- | --- |
| weights, a {TENSOR_PARALLEL}th | {weights / TENSOR_PARALLEL / GIB:.1f} |
| keys and values of {each} completions, a {TENSOR_PARALLEL}th | {each * (PROMPT + RESPONSE) * per_token / TENSOR_PARALLEL / GIB:.1f} |
| room for them at {FREE:.0%} of the memory | {cache / TENSOR_PARALLEL / GIB:.1f} |

## Traffic of a step
| what | bytes | where |
| --- | --- | --- |
| layers gathered, {times} times ({micro} micro-batch{"es" if micro > 1 else ""}: scoring once, policy and value twice each) | {times * inside / 1e9:,.0f} GB into every GPU, {times * outside / 1e9:,.0f} GB through its port | NVLink, network |
| gradients of the base | 0: it is frozen | |
| gradients of adapters and heads, all-reduced once an update | {reduce / 1e9:.2f} GB in and out of every GPU | NVLink, network |
| the policy's adapter to {engines} servers | {policy * engines / 1e9:.2f} GB from the first rank | network or shared folder |
| completions as text, {WIRE} bytes a token | {BATCH * RESPONSE * WIRE / 1e6:.1f} MB | HTTP |

## What bounds a step
| part | at best | by |
| --- | --- | --- |
| sampling | {decode * RESPONSE:.1f} s | {RESPONSE} tokens, each a read of the weights and the cache from memory |
| scoring, {roles} roles in one pass | {scoring / TRAINERS / FLOPS:.1f} s | operations |
| updates of policy and value | {updates / TRAINERS / FLOPS:.1f} s | operations |
| layers gathered, beside the operations | {wires:.1f} s | {"NVLink" if inside / NVLINK > outside / PORT else "the ports"} |
| adapter's gradients | {reduce / GPUS_PER_HOST / PORT:.2f} s | ports, eight rings |

{"Operations bound the trainer" if compute > wires else "The wires bound the trainer"}: {compute:.1f} s against {wires:.1f} s of gathering, which runs beside them. With `rollout.staleness 1` sampling hides behind
training ({"it is shorter" if decode * RESPONSE < compute else "it is longer, and bounds the step"}); without, a step takes the sum, {compute + decode * RESPONSE:.0f} s. A gather pays when a rank's micro-batch has at least
{FLOPS * max(inside / NVLINK, outside / PORT) / (2 * parameters):,.0f} tokens over all roles: below that the wires bound it.

## Data sheets
{SHEETS}"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
