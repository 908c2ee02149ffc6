"""Every op against its reference in fp64, on shapes, masks, layouts and dtypes drawn at random (formulas are in the references)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, double
from torch import Tensor

import rlhf_fast

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Draw:
    """Random inputs of one example; the layouts are those that trainers produce."""

    def __init__(self, data: st.DataObject) -> None:
        self.pick = lambda *options: data.draw(st.sampled_from(options))
        self.rows, self.length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 70))
        self.dtype = self.pick(*DTYPES)
        self.density = self.pick(0.0, 0.1, 0.6, 0.95, 1.0)
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Contiguous, transposed, or every second column of something wider."""
        layout = self.pick("plain", "plain", "transposed", "strided") if len(shape) == 2 else "plain"
        stored = {"plain": shape, "transposed": shape[::-1], "strided": (*shape[:-1], 2 * shape[-1])}[layout]
        x = (scale * torch.randn(stored, generator=self.generator, dtype=torch.float64)).to(self.dtype)
        return {"plain": x, "transposed": x.t() if len(shape) == 2 else x, "strided": x[..., ::2]}[layout]

    def tokens(self, scale: float = 1.0) -> Tensor:
        return self.normal(self.rows, self.length, scale=scale)

    def mask(self) -> Tensor:
        return torch.rand(self.rows, self.length, generator=self.generator) < self.density

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)


def token_logprobs(d: Draw) -> dict[str, Any]:
    vocab = d.pick(1, 2, 17, 64, 1001)
    d.length = min(d.length, 9)
    logits = d.normal(d.rows * d.length, vocab, scale=4.0).contiguous().view(d.rows, d.length, vocab)
    ref = d.pick(None, logits.flip(0) * 0.9)
    return {
        "logits": logits,
        "token_ids": d.integers(vocab, d.rows, d.length),
        "mask": d.pick(None, d.mask()),
        "temperature": d.pick(1.0, 0.7, 3.0),
        "softcap": d.pick(None, 5.0),
        "ref_logits": ref,
    }


def sample_tokens(d: Draw) -> dict[str, Any]:
    """With numbers in the middle of what a class of some probability has, so that rounding decides nothing."""
    vocab = d.pick(1, 2, 17, 64, 1001, 1025)
    d.length = min(d.length, 9)
    logits = d.normal(d.rows * d.length, vocab, scale=4.0).contiguous().view(d.rows, d.length, vocab)
    temperature, softcap = d.pick(1.0, 0.7, 3.0), d.pick(None, 5.0)
    banned_ids = d.pick(None, torch.tensor([0])) if vocab > 1 else None
    y = logits.double()
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    y = y if banned_ids is None else y.index_fill(-1, banned_ids, -torch.inf)
    p = (y / temperature).softmax(-1)
    token = torch.multinomial((p.clamp_min(1e-3) - 1e-3).flatten(0, 1) + 1e-30, 1, generator=d.generator)
    token = token.view(d.rows, d.length, 1)
    own = p.gather(-1, token)
    return {
        "logits": logits,
        "uniform": (p.cumsum(-1).gather(-1, token) - 0.5 * own).squeeze(-1).clamp(0.0, 1.0 - 1e-9),
        "temperature": d.pick(temperature, torch.full((d.rows, d.length), temperature, dtype=torch.float64)),
        "softcap": softcap,
        "banned_ids": banned_ids,
        "mask": d.pick(None, d.mask()),
    }


def linear_token_logprobs(d: Draw) -> dict[str, Any]:
    vocab, width = d.pick(3, 17, 130), d.pick(1, 8, 33)
    d.length = min(d.length, 9)
    return {
        "hidden": d.normal(d.rows * d.length, width).contiguous().view(d.rows, d.length, width),
        "weight": d.normal(vocab, width),
        "token_ids": d.integers(vocab, d.rows, d.length),
        "bias": d.pick(None, d.normal(vocab)),
        "mask": d.pick(None, d.mask()),
        "temperature": d.pick(1.0, 0.7),
        "softcap": d.pick(None, 5.0),
        "chunk_bytes": d.pick(None, 1, 5000),
    }


def cached_attention(d: Draw) -> dict[str, Any]:
    tokens, kv_heads, group, width, value_width = d.rows, d.pick(1, 3), d.pick(1, 2, 5), d.pick(1, 8, 33), d.pick(1, 24)
    room, prompt = d.length, d.pick(1, 20, 90)
    start = d.integers(prompt + 1, tokens)
    own = {
        "keys": d.normal(tokens + 1, kv_heads, room, width),
        "values": d.normal(tokens + 1, kv_heads, room, value_width),
        "rows": d.integers(tokens + 1, tokens),
        "lengths": d.integers(room + 1, tokens),
    }
    shared = {
        "prefix_keys": d.normal(2, kv_heads, prompt, width),
        "prefix_values": d.normal(2, kv_heads, prompt, value_width),
        "prefix_rows": d.integers(2, tokens),
        "prefix_start": start,
        "prefix_stop": (start + d.integers(prompt + 1, tokens)).clamp_max(prompt),
    }
    return {
        "query": d.normal(tokens, kv_heads * group, width),
        **d.pick(own, shared, own | shared),
        "scale": d.pick(None, 0.3),
        "softcap": d.pick(None, 2.0),
        "window": d.pick(None, 1, 17),
    }


def kl_estimate(d: Draw) -> dict[str, Any]:
    kind = d.pick("k1", "k2", "k3", "abs", "k1+", "k3+")
    return {
        "logprobs": d.tokens(),
        "ref_logprobs": d.tokens(),
        "kind": kind,
        "mask": d.pick(None, d.mask()),
        "clamp": d.pick(None, (20.0, 10.0), (None, 0.5)),
    }


def gae(d: Draw) -> dict[str, Any]:
    return {
        "rewards": d.tokens(),
        "values": d.tokens(),
        "mask": d.pick(None, d.mask()),
        "gamma": d.pick(1.0, 0.99, 0.0),
        "lam": d.pick(0.95, 1.0, 0.0),
        "bootstrap": d.pick(None, d.normal(d.rows)),
        "gap": d.pick("carry", "decay"),
    }


def whiten(d: Draw) -> dict[str, Any]:
    return {"x": d.tokens(3.0), "mask": d.pick(None, d.mask()), "shift_mean": d.pick(True, False)}


def advantages(d: Draw) -> dict[str, Any]:
    priced = d.pick(True, False)
    return {
        "scores": d.pick(d.normal(d.rows), d.tokens()),
        "values": d.tokens(),
        "mask": d.mask(),
        "logprobs": d.tokens() if priced else None,
        "ref_logprobs": d.tokens() if priced else None,
        "kl_coef": 0.1 if priced else 0.0,
        "kl_kind": d.pick("k1", "k2", "k3"),
        "gamma": d.pick(1.0, 0.9),
        "whiten": d.pick(True, False),
        "dialect": d.pick("rlhf_fast", "trl", "verl", "openrlhf", "nemo", "openai"),
    }


def group_advantages(d: Draw) -> dict[str, Any]:
    n = d.rows * d.length
    return {
        "scores": d.normal(n),
        "group_ids": d.integers(max(1, n // 4), n),
        "kind": d.pick("grpo", "dr_grpo", "rloo"),
    }


def ppo_loss(d: Draw) -> dict[str, Any]:
    base, wide = d.tokens(), d.pick(True, False)
    return {
        "logprobs": base,
        "old_logprobs": (base + 0.3 * d.tokens()).to(d.dtype),
        "advantages": d.pick(d.tokens(), d.normal(d.rows)),
        "mask": d.mask(),
        "clip": d.pick(0.2, (0.2, 0.28)),
        "dual_clip": d.pick(None, 3.0),
        "entropy": d.tokens() if wide else None,
        "entropy_coef": 0.01 if wide else 0.0,
        "ref_logprobs": d.tokens() if wide else None,
        "kl_coef": 0.1 if wide else 0.0,
        "values": d.tokens() if wide else None,
        "old_values": d.tokens() if wide else None,
        "returns": d.tokens() if wide else None,
        "importance_weights": d.pick(None, d.tokens().abs()),
        "reduction": d.pick("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"),
    }


def linear_ppo_loss(d: Draw) -> dict[str, Any]:
    head = linear_token_logprobs(d)
    loss = {k: v for k, v in ppo_loss(d).items() if k not in ("logprobs", "entropy")}
    now = rlhf_fast.linear_token_logprobs(**{**head, "mask": loss["mask"]}).logprobs
    near = ("old_logprobs", "ref_logprobs")  # gradients far from the ratio 1 are beyond fp16
    loss |= {k: (now + 0.3 * d.tokens()).to(d.dtype) for k in near if loss[k] is not None}
    return {**head, **loss, "entropy_coef": d.pick(0.0, 0.01)}


def reward_loss(d: Draw) -> dict[str, Any]:
    n = d.rows * d.length
    return {
        "chosen_scores": d.normal(n, scale=3.0),
        "rejected_scores": d.normal(n, scale=3.0),
        "margin": d.pick(None, d.normal(n)),
        "center_coef": d.pick(0.0, 0.01),
        "label_smoothing": d.pick(0.0, 0.1),
    }


def lora_linear(d: Draw) -> dict[str, Any]:
    rows, inner, outer = d.rows * d.length, d.pick(1, 8, 33), d.pick(1, 17, 70)
    ranks = d.pick((3,), (4, 1), (0, 17, 2))
    cuts = sorted(d.integers(rows + 1, 2 * len(ranks)).tolist())
    x = d.normal(rows, inner)
    a, b = d.normal(sum(ranks), inner, scale=inner**-0.5), d.normal(outer, sum(ranks))
    return {
        "x": x,
        "weight": d.normal(outer, inner, scale=inner**-0.5),
        "lora_a": a,
        "lora_b": b,
        "lora_input": d.pick(None, x.flip(0)),
        "bias": d.pick(None, d.normal(outer)),
        "scale": [0.5 + i for i in range(len(ranks))],
        "segments": list(zip(cuts[::2], cuts[1::2], strict=True)),
        "ranks": list(ranks),
    }


def rms_norm(d: Draw) -> dict[str, Any]:
    return {
        "x": d.tokens(d.pick(1e-3, 1.0, 30.0)),
        "weight": d.normal(d.length),
        "eps": d.pick(1e-6, 1e-5),
        "offset": d.pick(0.0, 1.0),
    }


def silu_mul(d: Draw) -> dict[str, Any]:
    return {"gate": d.tokens(d.pick(1.0, 40.0)), "up": d.tokens()}


def rotary(d: Draw) -> dict[str, Any]:
    width, heads, kv_heads = 2 * d.pick(1, 8, 20, 32), d.pick(1, 3), d.pick(1, 2)
    length = min(d.length, 7)
    query, key = (d.normal(d.rows * length, n * width).reshape(d.rows, length, n, width) for n in (heads, kv_heads))
    angles = d.normal(d.pick(1, d.rows) * length, width, scale=3.0).reshape(-1, length, width)
    return {
        "query": query.transpose(1, 2),
        "key": key.transpose(1, 2),
        "cosine": angles.cos(),
        "sine": angles.sin(),
    }


def varlen_attention(d: Draw) -> dict[str, Any]:
    width, value_width, kv_heads, group = d.pick(1, 8, 20, 32), d.pick(4, 17), d.pick(1, 2), d.pick(1, 3)
    bounds = torch.tensor([0, *(d.pick(0, 1, 3, 33, d.length) for _ in range(d.rows))]).cumsum(0)
    N = int(bounds[-1])
    return {
        "query": d.normal(N, kv_heads * group * width).view(N, kv_heads * group, width),
        "key": d.normal(N, kv_heads * width).view(N, kv_heads, width),
        "value": d.normal(N, kv_heads * value_width).view(N, kv_heads, value_width),
        "cu_seqlens": d.pick(bounds, bounds.int()),
        "scale": d.pick(None, 0.5, 2.0),
        "window": d.pick(None, 1, 9),
    }


def dpo_loss(d: Draw) -> dict[str, Any]:
    chosen, rejected, refs = d.tokens(), d.tokens(), d.pick(True, False)
    return {
        "chosen_logprobs": chosen,
        "rejected_logprobs": rejected,
        "ref_chosen_logprobs": (chosen + 0.3 * d.tokens()).to(d.dtype) if refs else None,
        "ref_rejected_logprobs": (rejected + 0.3 * d.tokens()).to(d.dtype) if refs else None,
        "chosen_mask": d.pick(None, d.mask()),
        "rejected_mask": d.pick(None, d.mask()),
        "beta": d.pick(0.1, 1.0),
        "label_smoothing": d.pick(0.0, 0.1),
        "average": d.pick(True, False),
        "weights": d.pick(None, d.normal(d.rows)),
        "normalizer": d.pick(None, 3.0),
    }


CONSTANT = {
    "ref_chosen_logprobs",
    "ref_rejected_logprobs",
    "weights",
    "old_logprobs",
    "advantages",
    "returns",
    "old_values",
    "importance_weights",
    "ref_logprobs",
    "ref_logits",
    "margin",
    "cosine",
    "sine",
}
"""Inputs without a gradient in some op; ref_logprobs has one in `advantages` and `kl_estimate`, tested there."""


def run(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients by name, for a fixed weighting of the results."""
    frozen = "lora_a" in kwargs or "eps" in kwargs  # under adapters, and in norms
    constant = CONSTANT | ({"weight", "bias"} if frozen else set())
    constant |= kwargs.keys() if "window" in kwargs else set()  # of generation
    kwargs = {
        k: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() and k not in constant else v
        for k, v in kwargs.items()
    }
    out = function(**kwargs)
    if isinstance(out, Tensor):
        out = (out,)
    found = {f"result {i}": x for i, x in enumerate(out) if isinstance(x, Tensor)}
    if hasattr(out, "stats"):
        found |= {f"stats {k}": v for k, v in out.stats.items()}
    # Weights that do not depend on the dtype.
    loss = sum(
        (x * torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype)).sum()
        for x in found.values()
        if x.requires_grad
    )
    leaves = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.requires_grad}
    if isinstance(loss, Tensor) and loss.requires_grad:
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found |= {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
    return {k: v.detach() for k, v in found.items()}


@pytest.mark.parametrize(
    "inputs",
    [
        token_logprobs,
        sample_tokens,
        linear_token_logprobs,
        kl_estimate,
        gae,
        whiten,
        advantages,
        group_advantages,
        ppo_loss,
        linear_ppo_loss,
        reward_loss,
        lora_linear,
        rms_norm,
        silu_mul,
        rotary,
        varlen_attention,
        cached_attention,
        dpo_loss,
    ],
    ids=lambda f: f.__name__,
)
def test_any_input_gives_what_the_reference_gives(inputs):
    function = getattr(rlhf_fast, inputs.__name__)

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        kwargs = inputs(Draw(data))
        before = {k: v.clone() for k, v in kwargs.items() if isinstance(v, Tensor)}
        got = run(function, kwargs)
        with rlhf_fast.use_backend("reference"):
            truth, plain = run(function, double(kwargs)), run(function, kwargs)
        assert got.keys() == truth.keys()
        largest = max((x.abs().max().item() for x in truth.values() if x.numel()), default=0.0)
        for name, x in got.items():
            assert x.dtype is plain[name].dtype, name
            if x.dtype is torch.float64:  # the truth is rounded like the result itself
                assert (x - truth[name]).abs().max().item() <= tolerances.DOUBLE * largest, name
            else:
                # Sums that cancel are as exact as their terms: the digits of small results are the business of each op's tests.
                assert_parity(x, truth[name], plain[name], name, scale=largest)
        for name, x in before.items():
            assert torch.equal(x, kwargs[name]), f"{name} was changed"

    check()
