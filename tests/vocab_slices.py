"""Calls that test_vocab_parallel.py makes on the whole vocabulary and vocab_rank.py on slices of it: of the two log-prob ops, and of
the PPO loss on a head."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast._types import TokenStats
from rlhf_fast.reference import linear_ppo_loss as of_loss
from rlhf_fast.reference import linear_token_logprobs as of_head
from rlhf_fast.reference import token_logprobs as of_logits

V = 127
SIZES = {2: (60, 67), 4: (31, 1, 64, 31)}
"""World: classes per rank."""
LAST_DIMENSION = ("logits", "ref_logits")
FIRST_DIMENSION = ("weight", "bias", "ref_weight", "ref_bias")
INF = float("inf")


def temperatures(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(9), dtype=dtype)


def excluded() -> dict[str, Tensor]:
    """One row for everything that -inf, NaN and +inf can do to a slice, under both of SIZES."""
    kwargs = {k: v for k, v in of_logits.sample((12,), V, dtype=torch.float64).items() if k != "mask"}
    z, q, ids = kwargs["logits"], kwargs["ref_logits"], kwargs["token_ids"].clamp_(0)
    z[0, :60] = q[0, :60] = -INF  # the first slices exclude everything, with the token in the last
    ids[0] = 120
    z[1, :60] = q[1, :60] = -INF  # and with the token itself excluded
    ids[1] = 5
    z[2, 1:] = q[2, 1:] = -INF  # one class is left
    z[3, 60:] = -INF  # only the policy excludes a slice
    q[4, 60:] = -INF  # only the reference does
    q[5, 3] = -INF
    z[6, 31] = q[6, 31] = -INF
    z[7, 100] = float("nan")
    z[8, 2] = INF
    q[9, 126] = float("nan")
    z[10, :60] += 800.0  # the other slices underflow
    q[10, :60] += 790.0
    kwargs["mask"] = torch.ones(12, dtype=torch.bool)
    kwargs["mask"][11] = False
    z[11] = float("nan")
    ids[11] = -100
    return kwargs


def head(dtype: torch.dtype, **options: bool) -> dict[str, Tensor]:
    return of_head.sample((3, 11), V, 24, dtype=dtype, **options)


def without_classes() -> dict[str, Tensor]:
    kwargs = head(torch.float64)
    kwargs["bias"][:60] = -INF  # padding of the vocabulary that is a whole slice
    kwargs["token_ids"] = kwargs["token_ids"].clamp(min=60).where(kwargs["mask"], -100)
    return kwargs


def cases() -> dict[str, tuple[dict, dict, tuple[str, ...]]]:
    """Name: (tensors, options, names of the trained ones)."""
    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    logits, ids = torch.randn(3, 2, 5, V, generator=torch.Generator().manual_seed(1)), torch.arange(30).view(3, 2, 5)
    both = ("hidden", "weight", "bias")
    return {
        "fp64": (of_logits.sample((4, 9), V, dtype=f64), {"temperature": 0.7}, ("logits",)),
        "fp64 temperatures": (
            {**of_logits.sample((4, 9), V, dtype=f64), "temperature": temperatures((4, 9), f64)}, {"softcap": 5.0}, ("logits",),
        ),
        "fp32": (of_logits.sample((4, 33), V), {}, ("logits",)),
        "bf16": (of_logits.sample((4, 33), V, dtype=bf16), {"softcap": 20.0}, ("logits",)),
        "no mask, no reference": ({"logits": logits.double(), "token_ids": (ids * 4).int()}, {}, ("logits",)),
        "no tokens": ({"logits": logits[:0], "token_ids": ids[:0]}, {}, ("logits",)),
        "excluded": (excluded(), {}, ("logits",)),
        "excluded, capped": (excluded(), {"softcap": 9.0}, ("logits",)),
        "head fp64": (head(f64), {"temperature": 1.3, "softcap": 8.0}, both),
        "head fp64, frozen": (head(f64), {"directions": ("logprobs", "entropy"), "chunk_bytes": 4096}, ("hidden",)),
        "head of both": (
            {**{k: v for k, v in head(f64).items() if k != "ref_weight"}, "temperature": temperatures((3, 11), f64)}, {}, both,
        ),
        "head without bias": (head(f64, ref=False, bias=False), {}, ("hidden", "weight")),
        "head without classes": (without_classes(), {}, ("hidden",)),
        "head fp32": (head(f32), {}, both),
        "head bf16": (head(bf16), {}, both),
    }  # fmt: skip


LOSS = ("hidden", "weight", "bias", "values")


def loss_cases() -> dict[str, tuple[dict, dict, tuple[str, ...]]]:
    """The same of linear_ppo_loss."""
    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    full = {"entropy_coef": 0.05, "kl_coef": 0.1}
    bare = {
        k: v for k, v in of_loss.sample(dtype=f64).items() if k in ("hidden", "weight", "token_ids", "mask", *TOKENS)
    }
    wide = {k: v.double() if k in TOKENS else v for k, v in of_loss.sample().items()}
    packed = {
        k: v if k in ("weight", "bias") else v.flatten(0, 1) for k, v in of_loss.sample(dtype=f64, seed=3).items()
    }
    bounds = {"cu_seqlens": torch.tensor([0, 4, 4, 20, 36])}
    return {
        "loss fp64": (of_loss.sample(dtype=f64), {**full, "temperature": 1.3, "softcap": 8.0}, LOSS),
        "loss fp64, dialect": (of_loss.sample(dtype=f64, seed=1), {"dialect": "verl", "reduction": "seq-mean-token-mean"}, LOSS),
        "loss fp64, frozen": (of_loss.sample(dtype=f64), {**full, "chunk_bytes": 4096, "normalizer": 11.0}, ("hidden",)),
        "loss alone": (bare, {"clip": (0.1, 0.3), "dual_clip": 1.2}, ("hidden", "weight")),
        "loss of fp64 advantages": (wide, full, LOSS),
        "loss packed": (packed, {**full, **bounds, "reduction": "seq-mean-token-sum"}, LOSS),
        "loss fp32": (of_loss.sample(dtype=f32), full, LOSS),
        "loss bf16": (of_loss.sample(dtype=bf16), full, LOSS),
    }  # fmt: skip


TOKENS = ("old_logprobs", "advantages")


def loss_results(kwargs: dict, options: dict, trained: tuple[str, ...], group: object = None) -> dict[str, Tensor]:
    """Loss, statistics and the gradients of 1.7 losses; explained_variance as the share it is 1 minus."""
    kwargs = {k: v.detach().clone().requires_grad_() if k in trained else v for k, v in kwargs.items()}
    out = rlhf_fast.linear_ppo_loss(**kwargs, **options, process_group=group)
    grads = torch.autograd.grad(1.7 * out.loss, [kwargs[k] for k in trained])
    found = {"loss": out.loss.detach(), **out.stats, **{f"d {k}": g for k, g in zip(trained, grads, strict=True)}}
    return {**found, "explained_variance": 1 - found["explained_variance"]}


def cut(kwargs: dict, rank: int, world: int) -> dict:
    """The arguments of one rank; world 1: the whole."""
    if world == 1:
        return kwargs
    start = sum(SIZES[world][:rank])
    classes = slice(start, start + SIZES[world][rank])
    return {
        k: v[..., classes] if k in LAST_DIMENSION else v[classes] if k in FIRST_DIMENSION else v
        for k, v in kwargs.items()
    }


def results(kwargs: dict, options: dict, trained: tuple[str, ...], group: object = None) -> dict[str, Tensor]:
    """The statistics, and the gradients of their sum under weights drawn once; those that are not finite are left out of it."""
    kwargs = {k: v.detach().clone().requires_grad_() if k in trained else v for k, v in kwargs.items()}
    op = rlhf_fast.token_logprobs if "logits" in kwargs else rlhf_fast.linear_token_logprobs
    out = op(**kwargs, **options, process_group=group)
    g = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=out.logprobs.dtype)
    found = {}
    for name, x in zip(TokenStats._fields, out, strict=True):
        if x is not None:
            found[name] = x.detach()
            weights = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)
            if bool(x.isfinite().all()):
                total = total + (x * weights).sum()
            elif name != "kl":
                rows = x.isfinite()
                total = total + (x[rows] * weights[rows]).sum()
    grads = torch.autograd.grad(total, [kwargs[k] for k in trained])
    return {**found, **{f"d {k}": g for k, g in zip(trained, grads, strict=True)}}
