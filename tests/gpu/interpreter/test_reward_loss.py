from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, in_every_order, poisoned, same, sanitized
from rlhf_fast.kernels import reward_loss as kernels

import rlhf_fast
from rlhf_fast.reference import reward_loss as reference

LEAVES = ("chosen_scores", "rejected_scores")
SCALE = {"margin": 3.0, "chosen_score": 3.0, "rejected_score": 3.0}  # of one pair


def call(**kwargs):
    out = rlhf_fast.reward_loss(**kwargs)
    return {"loss": out.loss, **out.stats}


# Empty; one pair; short of a block; a block and its neighbours; three blocks.
@pytest.mark.parametrize("n", [0, 1, 33, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("masked", ["some", "none", "all"])
def test_parity(n, masked):
    kwargs = reference.sample(n)
    kwargs["mask"] = {"some": kwargs["mask"], "none": None, "all": torch.zeros(n, dtype=torch.bool)}[masked]
    run = check(call, kwargs, LEAVES, scale=SCALE)
    assert len(run.launches) == (1 if n else 0)


@pytest.mark.parametrize("seed", range(12))
def test_drawn_options_on_small_blocks(seed, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "MAX_PARTS", 4)
    g = torch.Generator().manual_seed(seed)
    pick = lambda *of: of[int(torch.randint(len(of), (), generator=g))]
    kwargs = reference.sample(pick(15, 16, 17, 64, 65, 200), seed=seed, dtype=pick(torch.float32, torch.bfloat16))
    kwargs["margin"] = pick(kwargs["margin"], None, 0.7)
    options = {"center_coef": pick(0.0, 0.01), "label_smoothing": pick(0.0, 0.1)}
    check(lambda **k: call(**k, **options), kwargs, LEAVES, order="shuffle", scale=SCALE)


def test_large_gaps_and_ties():
    up = torch.tensor([100.0, -100.0, 0.0, 3.0, 1e4])
    check(call, {"chosen_scores": up, "rejected_scores": torch.zeros(5)}, LEAVES)


def test_masked_pairs_are_never_read_and_every_byte_moves_once():
    kwargs = reference.sample(3000)
    clean = in_every_order(lambda **k: call(**k, center_coef=0.01), kwargs, LEAVES)
    for poison in (math.nan, math.inf):
        dirty = poisoned(kwargs, kwargs["mask"], poison)
        assert same(clean, sanitized(lambda **k: call(**k, center_coef=0.01), dirty, LEAVES))
    real, parts = int(kwargs["mask"].sum()), 3
    (launch,) = clean.launches
    sums = 4 * kernels.N_COLUMNS * parts
    assert launch.load_first == 3000 + 12 * real + sums
    assert launch.store_bytes == 8 * 3000 + sums + 4 * (1 + 6) + 32  # the counters go back to zero
    # The mask is read by the programs that count and by those that need it.
    assert launch.load_bytes == launch.load_first + 3000
