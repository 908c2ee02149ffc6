"""ppo_loss at every level of the ratio with every surrogate, and its comparison, for the tests of its cells."""

from __future__ import annotations

import inspect

import torch
from parity import assert_parity, double
from ppo_parity import GRADIENTS, LEAVES

import rlhf_fast
from rlhf_fast.ops.ppo_loss import PPO, arguments, loss_output, ppo_loss
from rlhf_fast.reference.ppo_loss import LEVELS, SURROGATES

PAIRS = [(level, surrogate) for level in LEVELS for surrogate in SURROGATES if (level, surrogate) != PPO]
CARRIED = [("sequence", "clip"), ("product", "clip")]
"""Where the gradient goes through the ratio of the row, to each of its tokens alike."""


def loss_of(pair, **kwargs):
    bound = inspect.signature(ppo_loss).bind(**kwargs)
    bound.apply_defaults()
    return loss_output(arguments("ppo_loss", "logprobs", *bound.arguments.values()), *pair)


def run(pair, kwargs, backend="cpp", **options):
    """loss, stats and, as "d <leaf>", the gradients, for an upstream gradient of 1.7."""
    inputs = {k: v.clone().requires_grad_() if k in LEAVES else v for k, v in kwargs.items()}
    with rlhf_fast.use_backend(backend):
        out = loss_of(pair, **inputs, **options)
        leaves = [k for k in LEAVES if k in inputs]
        grads = torch.autograd.grad(1.7 * out.loss, [inputs[k] for k in leaves])
    return {"loss": out.loss.detach(), **out.stats, **{f"d {k}": g for k, g in zip(leaves, grads, strict=True)}}


def check_parity(got, pair, kwargs, **options):
    """Results of `run` against the reference in fp64, sums at the size of their terms before these cancel."""
    truth, plain = run(pair, double(kwargs), "reference", **options), run(pair, kwargs, "reference", **options)
    if not kwargs["mask"].any():
        assert not any(got[k].any() for k in ("loss", *GRADIENTS) if k in got)
        return
    signs = [{**double(kwargs), "advantages": s * double(kwargs)["advantages"].abs()} for s in (1, -1)]
    sizes = [truth, *(run(pair, x, "reference", **{**options, "kl_coef": 0.0}) for x in signs)]
    size = lambda name: max(x[name].abs().max().item() for x in sizes)
    bend = 20.0 if pair[0] == "product" else 1.0  # e^x multiplies a relative error of x by x
    most = bend * (1 + size("ratio_max"))
    scales = {
        "loss": bend * (1 + size("loss")),
        "policy_loss": bend * (1 + size("policy_loss")),
        "d logprobs": bend * size("d logprobs"),
        "ratio_mean": most,
        "ratio_var": most**2,
        "ratio_max": most,
        "explained_variance": 1.0,
    }
    for name, value in got.items():
        assert_parity(value, truth[name], plain[name], name, scales.get(name))
