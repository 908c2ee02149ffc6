"""Loss, statistics and gradients of ppo_loss under one backend, and their comparison, for its tests."""

from __future__ import annotations

import torch
from parity import assert_parity

import rlhf_fast
from rlhf_fast.ops import ppo_loss

LEAVES = ("logprobs", "entropy", "values")
GRADIENTS = ("d logprobs", "d entropy", "d values")
FULL = {"entropy_coef": 0.01, "kl_coef": 0.1}


def run(kwargs, backend="cpp", **options):
    """loss, stats and, as "d <leaf>", the gradients of the leaves that are there, for an upstream gradient of 1.7.

    explained_variance becomes the share it is 1 minus: the subtraction would be compared as an error of its result.
    """
    inputs = {k: v.clone().requires_grad_() if k in LEAVES else v for k, v in kwargs.items()}
    with rlhf_fast.use_backend(backend):
        out = ppo_loss(**inputs, **options)
        leaves = [k for k in LEAVES if k in inputs]
        grads = torch.autograd.grad(1.7 * out.loss, [inputs[k] for k in leaves])
    gradients = {f"d {k}": g for k, g in zip(leaves, grads, strict=True)}
    return {"loss": out.loss.detach(), **out.stats, "unexplained": 1 - out.stats["explained_variance"], **gradients}


def check_parity(got, truth, plain):
    for name, value in got.items():
        if name != "explained_variance":
            # Sums of terms of both signs are compared at the size of a term, 1, not at the size of what is left of them.
            shift = 1.0 if name in ("loss", "policy_loss", "kl") else 0.0
            assert_parity(value + shift, truth[name] + shift, plain[name] + shift, name)


def core(kwargs):
    return {k: kwargs[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")}
