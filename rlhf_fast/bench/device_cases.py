"""Rows of `rlhf-fast bench --device cuda`: shapes of a GPU, peers with their GPU kernels, aims in milliseconds on one card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases import (
    advantages,
    dpo_loss,
    gae,
    group_advantages,
    kl_estimate,
    ppo_loss,
    reward_loss,
    whiten,
)
from rlhf_fast.bench.cases import cached_attention as attention
from rlhf_fast.bench.cases import linear_ppo_loss as head_loss
from rlhf_fast.bench.cases import linear_token_logprobs as heads
from rlhf_fast.bench.cases import lora_linear as adapters
from rlhf_fast.bench.cases import sample_tokens as draws
from rlhf_fast.bench.cases import token_logprobs as tokens
from rlhf_fast.bench.cases.common import backward, compiled, leaf, no_grad, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Prepared, Results
from rlhf_fast.bench.machine import Machine
from rlhf_fast.reference.whiten import sample as whitened

Formulation = tokens.Formulation


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    logits: tuple[tuple[int, int], ...] = ((8192, 151936), (4096, 128256), (8192, 50257))
    """(tokens, vocabulary); the last vocabulary is odd, so that rows begin at any address."""
    steps: tuple[tuple[int, int], ...] = ((256, 151936), (8, 151936))
    """(sequences, vocabulary) of a step of a rollout."""
    keys: tuple[tuple[int, int], ...] = ((512, 512), (4096, 1024))
    """Of a prompt and of what follows it, which the tokens of a step attend over."""
    rollout: tuple[int, int] = (512, 2048)
    head: tuple[int, int, int] = (8192, 4096, 131072)
    """(tokens, width, vocabulary)."""
    layer: tuple[int, int, int] = (16384, 4096, 4096)
    """(rows, in, out) under adapters."""
    groups: tuple[int, int] = (1024, 16)
    pairs: int = 65536


CARD = "H100"
"""The card of the aims in milliseconds."""
FORWARD_MS, BACKWARD_MS, ADVANTAGES_MS, HEAD_MS, HEAD_BYTES = 0.85, 1.7, 0.034, 55.0, 2**30


def cases(device: torch.device, sizes: Sizes | None = None) -> Iterator[Case]:
    """Of every op."""
    aims = sizes is None
    sizes = Sizes() if sizes is None else sizes
    for i, (rows, vocab) in enumerate(sizes.logits):
        yield from _logits(device, rows, vocab, aims and i == 0)
    for rows, vocab in sizes.steps:
        yield _step(device, rows, vocab)
    for prompt, room in sizes.keys:
        yield _attention(device, prompt, room)
    yield from _tokens(device, *sizes.rollout, aims)
    yield from _small(device, sizes)
    yield from _heads(device, *sizes.head, aims)
    yield from _layers(device, *sizes.layer)


def made_on(device: torch.device, make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """`make`, moved."""
    return lambda: {k: v.to(device) if isinstance(v, Tensor) else v for k, v in make().items()}


def normal(device: torch.device, *shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Drawn on the device in slices, so that a large tensor in bf16 needs no fp32 twin."""
    out = torch.empty(shape, dtype=dtype, device=device)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    for part in out.split(1024):
        part.copy_(torch.randn(part.shape, device=device, generator=generator).mul_(scale))
    return out


def ids_below(device: torch.device, vocab: int, rows: int) -> Tensor:
    return torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(device)


def make_logits(device: torch.device, rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "logits": normal(device, rows, vocab, dtype=dtype, scale=3.0),
        "ids": ids_below(device, vocab, rows),
        "g_logprobs": normal(device, rows, dtype=torch.float32, seed=1),
        "g_entropy": normal(device, rows, dtype=torch.float32, seed=2),
    }


def of_trl(utils: Any) -> Formulation:
    """Both in one pass, as its trainers ask for them."""
    return utils.selective_log_softmax_and_entropy


def of_liger(module: Any) -> Formulation:
    """It wants one row more than tokens: the last row of the logits serves as that one."""

    def run(logits: Tensor, ids: Tensor) -> Any:
        return module.fused_selective_log_softmax(logits[None], ids[None, :-1], 1.0)[0], None

    return run


def of_flash(module: Any) -> Formulation:
    """Its cross-entropy is a negative log-prob."""
    return lambda logits, ids: (-module.cross_entropy_loss(logits, ids)[0], None)  # type: ignore[return-value]


def pass_of(formulation: Formulation) -> Call:
    """Forward alone; a formulation may leave out the entropy."""
    return no_grad(lambda x: formulation(x["logits"], x["ids"]))


def back_of(formulation: Formulation) -> Call:
    """The backward alone, of all the outputs that the formulation has."""

    def before(x: dict[str, Any]) -> Any:
        logits = leaf(x["logits"])
        return logits, formulation(logits, x["ids"]), (x["g_logprobs"], x["g_entropy"])

    def after(ready: Any) -> Results:
        logits, outputs, upstream = ready
        pairs = [(o, g[: len(o)]) for o, g in zip(outputs, upstream, strict=True) if o is not None]
        backward([o for o, _ in pairs], [g for _, g in pairs])
        return (logits.grad if len(pairs) == len(outputs) else None,)

    return Prepared(before, after)


def _logits(device: torch.device, rows: int, vocab: int, aims: bool) -> Iterator[Case]:
    dtype = torch.bfloat16
    size = rows * vocab * dtype.itemsize
    shape = f"[{rows}, {vocab}] bf16"

    def read(m: Machine) -> float:
        return m.seconds(read=size)

    def read_write(m: Machine) -> float:
        return m.seconds(read=size, written=size)

    for label, of, limit, aim in (
        ("forward with entropy", pass_of, read, FORWARD_MS),
        ("backward with entropy", back_of, read_write, BACKWARD_MS),
    ):
        found: dict[str, Call | str] = {
            OURS: of(tokens.ours),
            "eager": of(tokens.log_softmax),
            "torch.compile": of(compiled(tokens.upcast(tokens.log_softmax))),
            "torch.compile, logsumexp": of(compiled(tokens.upcast(tokens.logsumexp))),
            "TRL": peer(peers.trl_utils, partial(tokens.through, of, of_trl)),
            "verl": peer(peers.verl_functional, partial(tokens.through, of, tokens.of_verl)),
            "flash-attn, log-prob alone": peer(peers.flash_cross_entropy, partial(tokens.through, of, of_flash)),
        }
        if of is pass_of:  # it has no backward of its own
            found["Liger, log-prob alone"] = peer(peers.liger_grpo, partial(tokens.through, of, of_liger))
        yield Case(
            "token_logprobs",
            f"{shape}, {label}",
            partial(make_logits, device, rows, vocab, dtype),
            found,
            tokens.truth(of(tokens.log_softmax)),
            limit,
            bars={"TRL": 1.0},
            aims_ms={"device": aim} if aims else {},
            card=CARD,
        )


def make_step(device: torch.device, rows: int, vocab: int) -> dict[str, Any]:
    """Logits as a rollout sums them, in fp32 whatever the dtype of the model."""
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"logits": normal(device, rows, vocab, dtype=torch.float32, scale=3.0), "uniform": uniform.to(device)}


def _step(device: torch.device, rows: int, vocab: int) -> Case:
    fused = compiled(draws.by_inversion)
    return Case(
        "sample_tokens",
        f"[{rows}, {vocab}] fp32, token, log-prob and entropy",
        partial(make_step, device, rows, vocab),
        {
            OURS: draws.ours,
            "eager, the same token": no_grad(draws.by_inversion),
            "eager, multinomial": no_grad(draws.by_multinomial),
            "torch.compile, the same token": no_grad(fused),
        },
        draws.truth,
        lambda m: m.seconds(read=4 * rows * vocab),
        memory=False,
    )


def _attention(device: torch.device, prompt: int, room: int) -> Case:
    """The prompt's keys have to be read once for its samples, those of the slots once each."""
    rows, kv_heads = attention.TOKENS, attention.KV_HEADS
    numbers = (rows // attention.SAMPLES * prompt + rows * room) * kv_heads * attention.WIDTH
    return Case(
        "cached_attention",
        f"{rows} rows of {attention.HEADS} heads over {prompt} + {room} keys, bf16",
        made_on(device, partial(attention.make, prompt, room, torch.bfloat16)),
        {OURS: attention.ours, "PyTorch, keys side by side": no_grad(attention.side_by_side)},
        attention.truth,
        lambda m: m.seconds(read=2 * 2 * numbers),
        memory=False,
    )


def _tokens(device: torch.device, rows: int, length: int, aims: bool) -> Iterator[Case]:
    n = rows * length
    shape = f"[{rows}, {length}] fp32"
    compiled_stages = compiled(advantages.chunked)

    yield Case(
        "advantages",
        shape,
        made_on(device, partial(advantages.make, rows, length)),
        {
            OURS: advantages.ours,
            "gae alone": advantages.gae_alone,
            "eager, chunked scan": advantages.of_tensors(advantages.chunked),
            "torch.compile, chunked scan": advantages.of_tensors(compiled_stages),
            "verl": peer(peers.verl, advantages.of_verl),
        },
        advantages.truth,
        lambda m: m.seconds(read=13 * n, written=16 * n),
        memory=False,
        aims_ms={"call": ADVANTAGES_MS} if aims else {},
        card=CARD,
    )
    yield Case(
        "gae",
        shape,
        made_on(device, partial(gae.make, rows, length)),
        {
            OURS: gae.ours,
            "chunked scan": no_grad(gae.chunked),
            "torch.compile, chunked scan": no_grad(compiled(gae.chunked)),
            "verl": peer(peers.verl, gae.of_verl),
        },
        gae.truth,
        lambda m: m.seconds(read=9 * n, written=8 * n),
        memory=False,
    )
    yield Case(
        "ppo_loss",
        f"{shape}, forward + backward, policy and value",
        made_on(device, partial(ppo_loss.make, rows, length)),
        {
            OURS: ppo_loss.with_gradients(ppo_loss.ours),
            "eager": ppo_loss.with_gradients(ppo_loss.with_statistics),
            "eager, loss alone": ppo_loss.with_gradients(ppo_loss.fed(ppo_loss.bare)),
            "torch.compile, loss alone": ppo_loss.with_gradients(ppo_loss.fed(compiled(ppo_loss.bare))),
            "verl": peer(peers.verl, ppo_loss.of_verl),
        },
        ppo_loss.truth,
        lambda m: m.seconds(read=25 * n, written=8 * n),
        memory=False,
    )


def _small(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    rows, length = sizes.rollout
    n = rows * length
    fused = compiled(kl_estimate.k3)
    yield Case(
        "kl_estimate",
        f"k3, [{rows}, {length}] fp32",
        made_on(device, partial(kl_estimate.make, rows, length)),
        {
            OURS: kl_estimate.ours,
            "eager": no_grad(lambda x: (kl_estimate.k3(x["logprobs"], x["ref_logprobs"]),)),
            "torch.compile": no_grad(lambda x: (fused(x["logprobs"], x["ref_logprobs"]),)),
            "verl": peer(peers.verl, lambda m: lambda x: (m.kl_penalty(x["logprobs"], x["ref_logprobs"], "k3"),)),
        },
        kl_estimate.truth,
        lambda m: m.seconds(read=8 * n, written=4 * n),
        memory=False,
    )
    yield Case(
        "whiten",
        f"[{rows}, {length}] fp32",
        made_on(device, partial(whitened, (rows, length))),
        {OURS: whiten.ours, "eager": whiten.eager, "verl": peer(peers.verl_functional, whiten.of_verl)},
        lambda x: whiten.eager({"x": x["x"].double(), "mask": x["mask"]}),
        lambda m: m.seconds(read=5 * n, written=4 * n),
        memory=False,
    )
    yield Case(
        "dpo_loss",
        f"[{rows}, {length}] chosen and rejected, fp32, forward + backward",
        made_on(device, partial(dpo_loss.make, rows, length)),
        {
            OURS: dpo_loss.with_gradients(dpo_loss.ours),
            "eager, loss alone": dpo_loss.with_gradients(dpo_loss.fed(dpo_loss.bare)),
            "torch.compile, loss alone": dpo_loss.with_gradients(dpo_loss.fed(compiled(dpo_loss.bare))),
        },
        dpo_loss.truth,
        lambda m: m.seconds(read=18 * n, written=8 * n),
        memory=False,
    )
    groups, size = sizes.groups
    yield Case(
        "group_advantages",
        f"grpo, {groups} groups of {size}",
        made_on(device, partial(group_advantages.make, groups, size)),
        {OURS: group_advantages.ours, "eager": group_advantages.eager},
        lambda x: group_advantages.eager(x | {"scores": x["scores"].double()}),
        memory=False,
        seconds=4,
    )
    yield Case(
        "reward_loss",
        f"{sizes.pairs} pairs, forward + backward",
        made_on(device, partial(reward_loss.make, sizes.pairs)),
        {
            OURS: reward_loss.with_gradients(reward_loss.ours),
            "eager, loss alone": reward_loss.with_gradients(reward_loss.eager),
            "torch.compile, loss alone": reward_loss.with_gradients(compiled(reward_loss.eager)),
        },
        lambda x: reward_loss.with_gradients(reward_loss.eager)({k: v.double() for k, v in x.items()}),
        memory=False,
        seconds=4,
    )


def make_head(device: torch.device, rows: int, width: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden": normal(device, rows, width, dtype=torch.bfloat16),
        "weight": normal(device, vocab, width, dtype=torch.bfloat16, scale=2 / width**0.5, seed=1),
        "ids": ids_below(device, vocab, rows),
        "upstream": normal(device, rows, dtype=torch.float32, seed=2),
    }


def make_head_loss(device: torch.device, rows: int, width: int, vocab: int) -> dict[str, Any]:
    x = make_head(device, rows, width, vocab)
    with torch.no_grad():
        now = rlhf_fast.linear_token_logprobs(x["hidden"], x["weight"], x["ids"]).logprobs
    return {
        **x,
        "old_logprobs": now + normal(device, rows, dtype=torch.float32, scale=0.05, seed=3),
        "advantages": x.pop("upstream"),
        "mask": torch.ones(rows, dtype=torch.bool, device=device),
    }


def loss_truth(x: dict[str, Any]) -> Results:
    """Loss and gradient of the first rows in fp64, of the mean over all rows."""
    few = heads.TRUTH_ROWS
    hidden = leaf(x["hidden"][:few].double())
    wide = {k: x[k][:few].double() if x[k].is_floating_point() else x[k][:few] for k in x if k != "weight"}
    logprobs, entropy = head_loss.materialised(0.0, hidden, x["weight"].double(), wide["ids"])
    loss = head_loss.eager_loss(logprobs, entropy, 0.0, wide, len(x["hidden"]))
    (gradient,) = torch.autograd.grad(loss, hidden)
    return None, gradient, None


def _heads(device: torch.device, rows: int, width: int, vocab: int, aims: bool) -> Iterator[Case]:
    shape = f"H {width}, [{rows}, {vocab}] bf16"
    for trained in (False, True):
        label = f"{shape}, {'trained' if trained else 'frozen'} head, forward + backward"
        products = 2 * rows * width * vocab * (3 if trained else 2)

        def limit(m: Machine, products: int = products) -> float:
            return products / m.gemm["bfloat16"]

        found: dict[str, Call | str] = {
            OURS: heads.both_of(heads.ours, trained),
            "chunked, as without an argument": heads.both_of(heads.ours, trained),
            "materialised": heads.both_of(heads.materialised, trained),
            "torch.compile, materialised": heads.both_of(compiled(heads.materialised), trained),
            "TRL": peer(peers.trl_chunked_head, partial(heads.trl_contender, trained)),
            "Liger (loss)": peer(peers.liger, partial(heads.of_liger, trained=trained)),
        }
        yield Case(
            "linear_token_logprobs",
            label,
            partial(make_head, device, rows, width, vocab),
            found,
            heads.truth,
            limit,
            memory_bar=HEAD_BYTES if aims and not trained else None,
            aims_ms={"device": HEAD_MS} if aims and not trained else {},
            card=CARD,
            seconds=30,
        )
    yield Case(
        "linear_ppo_loss",
        f"{shape}, frozen head, forward + backward",
        partial(make_head_loss, device, rows, width, vocab),
        {
            OURS: head_loss.both_of(partial(head_loss.ours, 0.0), False),
            "in two steps": head_loss.both_of(partial(head_loss.two_steps, 0.0), False),
            "materialised": head_loss.both_of(
                head_loss.with_eager_loss(partial(head_loss.materialised, 0.0), 0.0, rows), False
            ),
            "TRL": peer(peers.trl_chunked_head, partial(head_loss.of_trl, 0.0, False, rows=rows)),
        },
        loss_truth,
        seconds=30,
    )


def make_layer(device: torch.device, rows: int, inner: int, outer: int) -> dict[str, Any]:
    """The rows of policy, reference (no adapter), value and reward."""
    part = rows // 4
    total = sum(adapters.RANKS)
    return {
        "x": normal(device, rows, inner, dtype=torch.bfloat16),
        "weight": normal(device, outer, inner, dtype=torch.bfloat16, scale=inner**-0.5, seed=1),
        "lora_a": normal(device, total, inner, dtype=torch.float32, scale=inner**-0.5, seed=2),
        "lora_b": normal(device, outer, total, dtype=torch.float32, scale=0.3, seed=3),
        "scale": [2.0, 1.5, 1.0],
        "segments": [(0, part), (2 * part, 3 * part), (3 * part, rows)],
        "ranks": list(adapters.RANKS),
    }


def _layers(device: torch.device, rows: int, inner: int, outer: int) -> Iterator[Case]:
    for call, what, products in ((adapters.ours, "forward", 1), (adapters.both, "forward + backward", 2)):

        def limit(m: Machine, products: int = products) -> float:
            return 2 * rows * inner * outer * products / m.gemm["bfloat16"]

        yield Case(
            "lora_linear",
            f"[{rows}, {inner}] to {outer} bf16, {len(adapters.RANKS)} adapters of rank {adapters.RANKS[0]}, {what}",
            partial(make_layer, device, rows, inner, outer),
            {
                OURS: call,
                "eager": adapters.eager_of(call),
                "bare product": adapters.bare(call is adapters.both),
            },
            partial(adapters.truth, call=call),
            limit,
        )
