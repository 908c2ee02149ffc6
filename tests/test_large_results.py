"""Results too large for the caches are written past them (csrc/cpu/output.h): the same bits as in small calls, every slot filled."""

from __future__ import annotations

import pytest
import torch

import rlhf_fast
from rlhf_fast.reference import advantages as advantages_reference
from rlhf_fast.reference import gae as gae_reference
from rlhf_fast.reference.ppo_loss import sample as ppo_sample

ROWS = 4


def unaligned(kwargs):
    """The same numbers where no row begins a line of memory."""
    moved = {}
    for name, x in kwargs.items():
        moved[name] = x
        if x.is_floating_point():
            flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
            moved[name] = flat.copy_(x.reshape(-1)).view(x.shape)
    return moved


def row(kwargs, i):
    return {k: v[i : i + 1] for k, v in kwargs.items()}


def assert_rows_alone(function, kwargs):
    """`function` of all rows, streamed, against each row in a call of its own, a quarter of the size."""
    whole = function(**kwargs)
    for i in range(ROWS):
        alone = function(**row(kwargs, i))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("length", [262_144, 262_139])
@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_gae(each_isa, length, gap):
    kwargs = unaligned(gae_reference.sample((ROWS, length)))
    each_isa(lambda: assert_rows_alone(lambda **x: rlhf_fast.gae(**x, gap=gap), kwargs))
    kwargs["mask"] = torch.arange(length)[None] < torch.tensor([length, length // 2, 5, 0])[:, None]
    assert_rows_alone(lambda **x: rlhf_fast.gae(**x, gap=gap), kwargs)


@pytest.mark.parametrize("dialect", ["rlhf_fast", "trl"])
def test_advantages(each_isa, dialect):
    kwargs = unaligned(advantages_reference.sample((ROWS, 150_011)))
    kwargs["mask"][1, 70_000:] = False
    raw = lambda **x: rlhf_fast.advantages(**x, kl_coef=0.1, whiten=False, dialect=dialect)
    each_isa(lambda: assert_rows_alone(raw, kwargs))
    white = rlhf_fast.advantages(**kwargs, kl_coef=0.1, dialect=dialect)
    whole = raw(**kwargs)
    assert all(torch.equal(a, b) for a, b in zip(white[1:], whole[1:], strict=True))


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("masked", [False, True])
def test_kl_estimate(each_isa, kind, masked):
    x, ref = (-torch.randn(ROWS, 300_001).abs() for _ in range(2))
    kwargs = {"logprobs": x, "ref_logprobs": ref} | ({"mask": torch.rand(x.shape) > 0.2} if masked else {})
    one = lambda **x: (rlhf_fast.kl_estimate(**x, kind=kind),)
    each_isa(lambda: assert_rows_alone(one, kwargs))


@pytest.mark.parametrize("masked", [False, True])
def test_whiten(each_isa, masked):
    x = torch.randn(1_600_003)
    mask = torch.rand(len(x)) > 0.2 if masked else torch.ones(len(x), dtype=torch.bool)
    mask[500_000:600_000] = not masked
    real = x[mask].double()
    expected = ((x.double() - real.mean()) / (real.var() + 1e-8).sqrt()).where(mask, 0.0)
    results = [r for _, r in each_isa(lambda: rlhf_fast.whiten(x, mask))]
    assert all(torch.equal(results[0], r) for r in results)
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_ppo_loss(each_isa):
    kwargs = ppo_sample((ROWS, 110_001))

    def gradients(**x):
        leaves = [x[k].requires_grad_() for k in ("logprobs", "entropy", "values")]
        out = rlhf_fast.ppo_loss(**x, normalizer=100.0, entropy_coef=0.01, kl_coef=0.1)
        return torch.autograd.grad(out.loss, leaves)

    detached = lambda **x: gradients(**{k: v.detach() for k, v in x.items()})
    each_isa(lambda: assert_rows_alone(detached, kwargs))
