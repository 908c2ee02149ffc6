"""Calls of the two log-prob ops that test_vocab_parallel.py makes on the whole vocabulary and vocab_rank.py on slices of it."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast._types import TokenStats
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
