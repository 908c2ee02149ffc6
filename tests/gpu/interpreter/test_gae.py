from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, in_every_order, poisoned, same, sanitized
from rlhf_fast.kernels.common import scan

import rlhf_fast
from rlhf_fast.reference import gae as reference

LEAVES = ("rewards", "values", "bootstrap")
SCALE = {"d bootstrap": "d rewards"}


def call(**kwargs):
    return dict(zip(("advantages", "returns"), rlhf_fast.gae(**kwargs), strict=True))


# Empty; one token; short of a block; a block and its neighbours; three blocks.
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 7), (2, 511), (2, 512), (2, 513), (3, 1300)], ids=str)
@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_parity(shape, gap):
    kwargs = reference.sample(shape)
    run = check(lambda **k: call(**k, gap=gap, gamma=0.97, lam=0.9), kwargs, LEAVES, scale=SCALE)
    assert len(run.launches) == (2 if kwargs["rewards"].numel() else 0)


def options_at(seed):
    """A drawn combination of options, on rows of some blocks of 16."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda *of: of[int(torch.randint(len(of), (), generator=g))]
    kwargs = reference.sample(
        (pick(1, 3, 6), pick(1, 2, 15, 16, 17, 40, 49)), seed=seed, dtype=pick(torch.float32, torch.float16)
    )
    if pick(True, False):
        kwargs["mask"] = pick(
            None, torch.zeros_like(kwargs["mask"]), torch.rand(kwargs["mask"].shape, generator=g) > 0.8
        )
    if pick(True, False, False):
        del kwargs["bootstrap"]
    return kwargs, {"gap": pick("carry", "decay"), "gamma": pick(1.0, 0.9, 0.0), "lam": pick(1.0, 0.95, 0.0)}


@pytest.mark.parametrize("seed", range(24))
def test_drawn_options_on_small_blocks(seed, monkeypatch):
    monkeypatch.setattr(scan, "BLOCK", 16)
    kwargs, options = options_at(seed)
    check(lambda **k: call(**k, **options), kwargs, [k for k in LEAVES if k in kwargs], order="shuffle", scale=SCALE)


def test_thousands_of_terms_keep_their_digits():
    kwargs = reference.sample((2, 5000), gaps=False)
    kwargs["mask"] = None
    check(lambda **k: call(**k, lam=1.0), kwargs, LEAVES, scale=SCALE)


@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_packed_equals_padded_to_the_bit(gap, monkeypatch):
    monkeypatch.setattr(scan, "BLOCK", 8)
    kwargs = reference.sample((5, 20))
    lengths = torch.tensor([20, 0, 9, 1, 16])
    inside = torch.arange(20)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    padded = in_every_order(lambda **k: call(**k, gap=gap), kwargs, LEAVES)
    packed = {k: v[inside] if v.dim() == 2 else v for k, v in kwargs.items()}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    forward = sanitized(lambda **k: call(**k, gap=gap), packed)
    assert all(torch.equal(padded.results[k][inside], x) for k, x in forward.results.items())
    check(lambda **k: call(**k, gap=gap), packed, LEAVES, scale=SCALE)


def test_a_row_does_not_depend_on_the_batch():
    kwargs = reference.sample((4, 1100))
    whole = sanitized(call, kwargs)
    for i in range(4):
        alone = sanitized(call, {k: v[i : i + 1] for k, v in kwargs.items()})
        assert all(torch.equal(whole.results[k][i : i + 1], x) for k, x in alone.results.items())


@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_masked_slots_are_never_read(gap):
    kwargs = reference.sample((3, 1300))
    kwargs["mask"][1] = False
    clean = sanitized(lambda **k: call(**k, gap=gap), kwargs, LEAVES)
    for poison in (math.nan, math.inf):
        dirty = poisoned(kwargs, kwargs["mask"], poison)
        assert same(clean, sanitized(lambda **k: call(**k, gap=gap), dirty, LEAVES))
    assert not any(x[~kwargs["mask"]].any() for k, x in clean.results.items() if k != "d bootstrap")


@pytest.mark.parametrize("place", ["rewards", "values"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_number_that_is_not_finite_goes_where_the_reference_takes_it(place, poison):
    kwargs = {"rewards": torch.randn(3, 40), "values": torch.randn(3, 40), "bootstrap": torch.randn(3)}
    kwargs[place][1, 25] = poison
    check(lambda **k: call(**k, gamma=0.9), kwargs)


def test_every_byte_moves_once():
    kwargs = reference.sample((4, 1500), gaps=False)
    run = in_every_order(call, kwargs, LEAVES)
    real, n = int(kwargs["mask"].sum()), kwargs["mask"].numel()
    rows = 4 * 4  # the bootstrap values
    forward, backward = run.launches
    assert (forward.load_first, forward.store_bytes) == (n + 8 * real + rows, 8 * n)
    assert (backward.load_first, backward.store_bytes) == (n + 8 * real, 8 * n + rows)
    # The last real token is looked for from the end: its block is read a second time, from the cache.
    assert forward.load_bytes <= 2 * n + 8 * real + rows
