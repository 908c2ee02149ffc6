from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, in_every_order, poisoned, same, sanitized
from rlhf_fast.kernels import group_advantages as kernels

import rlhf_fast
from rlhf_fast.reference import group_advantages as reference
from rlhf_fast.reference.group_advantages import KINDS

LAUNCHES = {"remax": 1, "reinforce++": 3}


def call(**kwargs):
    return {"advantages": rlhf_fast.group_advantages(**kwargs)}


@pytest.fixture
def small_blocks(monkeypatch):
    for name, size in {"SAMPLES": 8, "OTHERS": 16, "MEMBERS": 4, "BLOCK": 16}.items():
        monkeypatch.setattr(kernels, name, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 24, 130])
def test_parity(kind, n):
    kwargs = reference.sample(n)
    run = check(lambda **k: call(**k, kind=kind), kwargs, ["scores"])
    assert len(run.launches) == (2 * LAUNCHES.get(kind, 2) if n else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_drawn_options_on_small_blocks(kind, seed, small_blocks):
    g = torch.Generator().manual_seed(seed)
    pick = lambda *of: of[int(torch.randint(len(of), (), generator=g))]
    kwargs = reference.sample(pick(7, 8, 50), seed=seed, groups=pick(1, 2, 5), dtype=pick(torch.float32, torch.float16))
    kwargs["mask"] = pick(kwargs["mask"], None, torch.zeros_like(kwargs["mask"]))
    kwargs["lengths"] = kwargs["lengths"] * pick(0, 1)
    unbiased = pick(True, False)
    if kind == "pass@k":  # its kinks are ties
        kwargs["scores"] = torch.randn(kwargs["scores"].shape, generator=g)
    check(lambda **k: call(**k, kind=kind, unbiased=unbiased), kwargs, ["scores"], order="shuffle")


@pytest.mark.parametrize("kind", KINDS)
def test_masked_samples_belong_to_no_group_and_the_order_of_programs_does_not_matter(kind, small_blocks):
    kwargs = reference.sample(40)
    if kind == "pass@k":
        kwargs["scores"] = torch.randn(40)
    clean = in_every_order(lambda **k: call(**k, kind=kind), kwargs, ["scores"])
    kept = kwargs["mask"]
    alone = sanitized(lambda **k: call(**k, kind=kind), {k: v[kept] for k, v in kwargs.items()})
    if kind != "reinforce++":  # its sums over the batch follow the places of the samples
        assert torch.equal(clean.results["advantages"][kept], alone.results["advantages"])
    assert not any(x[~kept].any() for x in clean.results.values())
    for poison in (math.nan, math.inf):
        dirty = poisoned(kwargs, kept, poison)
        assert same(clean, sanitized(lambda **k: call(**k, kind=kind), dirty, ["scores"]))


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "opo", "pass@k"])
def test_a_group_does_not_depend_on_the_rest_of_the_batch(kind, small_blocks):
    kwargs = reference.sample(40)
    whole = sanitized(lambda **k: call(**k, kind=kind), kwargs).results["advantages"]
    for group in kwargs["group_ids"].unique():
        inside = kwargs["group_ids"] == group
        alone = sanitized(lambda **k: call(**k, kind=kind), {k: v[inside] for k, v in kwargs.items()})
        assert torch.equal(alone.results["advantages"], whole[inside])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "remax"])
def test_groups_of_one_and_equal_scores_give_zero(kind):
    scores = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.1, 0.1])
    ids, lengths = torch.tensor([1, 1, 1, 2, 1, 1]), torch.tensor([3, 1, 2, 9, 7, 1])
    run = sanitized(lambda **k: call(**k, kind=kind, group_ids=ids, lengths=lengths), {"scores": scores}, ["scores"])
    assert not run.results["advantages"].any() and run.results["d scores"].isfinite().all()


def test_ties_of_the_best_give_zero_and_the_lead_goes_to_the_only_best():
    ids = torch.zeros(6, dtype=torch.int64)
    for scores, expected in (([1, 3, 3, 0, 2, 1], 0.0), ([1, 3, 2, 2, 0, -1], 1.0), ([5, 3, 3, 0, 2, 1], 2.0)):
        run = sanitized(call, {"scores": torch.tensor(scores).float(), "group_ids": ids, "kind": "pass@k"}, ["scores"])
        assert run.results["advantages"].sum() == run.results["advantages"].max() == expected
