"""What the tests of the heads share: results with gradients, and their comparison with the reference."""

from __future__ import annotations

import torch
from parity import assert_parity, double

import rlhf_fast
from rlhf_fast._types import TokenStats

NAMES = TokenStats._fields


def leaves(kwargs, trained):
    return {k: v.detach().clone().requires_grad_() if k in trained else v for k, v in kwargs.items()}


def statistics(kwargs, trained=(), outputs=NAMES, **options):
    """The statistics, and the gradients of a random combination of `outputs` towards `trained`."""
    kwargs = leaves(kwargs, trained)
    out = rlhf_fast.linear_token_logprobs(**kwargs, **options)
    found = [x.detach() for x in out if x is not None]
    if trained:
        g = torch.Generator().manual_seed(3)
        total = 0
        for name in outputs:
            x = getattr(out, name)
            total = total + (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum()
        found += torch.autograd.grad(total, [kwargs[k] for k in trained])
    return found


def assert_statistics_parity(got, kwargs, trained=(), outputs=NAMES, **options):
    """got: of `statistics` with the same arguments."""
    options = {k: v for k, v in options.items() if k not in ("chunk_bytes", "directions")}
    with rlhf_fast.use_backend("reference"):
        truth, plain = (statistics(k, trained, outputs, **options) for k in (double(kwargs), kwargs))
    names = [n for n in NAMES if n != "kl" or "ref_hidden" in kwargs] + list(trained)
    for g, t, p, name in zip(got, truth, plain, names, strict=True):
        assert_parity(g, t, p, name)


def ppo(kwargs, trained, **options):
    """loss and statistics, and the gradients of the leaves for an upstream gradient of 1.7."""
    inputs = leaves(kwargs, trained)
    out = rlhf_fast.linear_ppo_loss(**inputs, **options)
    grads = torch.autograd.grad(1.7 * out.loss, [inputs[k] for k in trained])
    return {"loss": out.loss.detach(), **out.stats, **{f"d {k}": g for k, g in zip(trained, grads, strict=True)}}


def assert_ppo_parity(got, kwargs, trained, **options):
    """got: of `ppo` with the same arguments."""
    with rlhf_fast.use_backend("reference"):
        truth, plain = (ppo(k, trained, **options) for k in (double(kwargs), kwargs))
    for name, x in got.items():
        size = float(truth[name].abs().max())
        assert_parity(x, truth[name], plain[name], name, scale=size if x.dim() else max(1.0, size))
