"""What the tests of token_logprobs share: results with a gradient, three times over."""

from __future__ import annotations

import tolerances
import torch
from parity import assert_parity, double

import rlhf_fast
from rlhf_fast._types import TokenStats

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = TokenStats._fields


def stats(kwargs, **options):
    """The results, and the gradient towards the logits of their sum under weights drawn once."""
    kwargs = {**kwargs, "logits": kwargs["logits"].detach().clone().requires_grad_()}
    out = rlhf_fast.token_logprobs(**kwargs, **options)
    g = torch.Generator().manual_seed(5)
    total = 0
    for x in out:
        if x is not None:
            total = total + (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum()
    (grad,) = torch.autograd.grad(total, kwargs["logits"])
    return [*(x.detach() for x in out if x is not None), grad]


def three(kwargs, **options):
    """stats of the kernels, of the reference in fp64 and of the reference in the dtype at hand."""
    got = stats(kwargs, **options)
    with rlhf_fast.use_backend("reference"):
        wide = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()
        }
        return got, stats(double(kwargs), **wide), stats(kwargs, **options)


def assert_all_parity(got, truth, plain):
    if got[0].dtype is torch.float64:
        for results in ((got[:-1], truth[:-1]), (got[-1:], truth[-1:])):
            g, t = (torch.cat([x.flatten() for x in part]) for part in results)
            assert (g - t).abs().max() <= tolerances.DOUBLE * t.abs().max()
        return
    for g, t, p, name in zip(got, truth, plain, (*NAMES, "gradient"), strict=True):
        assert_parity(g, t, p, name)
