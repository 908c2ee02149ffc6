"""Any split of a batch gives the loss and the gradient of the whole: rows, trimming, packing, order, ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
import torch
from loss_batches import LENGTHS, OPTIONS, B, T, batch, packed, run

from rlhf_fast import Denominators, covariance_mask, ppo_loss, rollout_correction, top_entropy_mask
from rlhf_fast.denominators import DIVISORS
from rlhf_fast.losses import RECIPES
from rlhf_fast.reference._reduce import REDUCTIONS

SPLITS = {
    "two": [[0, 1, 2], [3, 4, 5, 6]],
    "one row each": [[row] for row in range(B)],
    "uneven, in another order": [[4, 2], [6, 0, 3, 5], [1]],
    "an empty part": [[2], [], [0, 1, 3, 4, 5, 6]],
}
GLOBAL = [name for name, recipe in RECIPES.items() if not recipe.local]


def close(got, expected):
    """Equal but for the order of summation in fp64."""
    assert (got - expected).abs().max() <= tolerances.SPLIT * expected.abs().max().clamp(min=1e-3)


def check(recipe, parts, whole, pieces):
    """Losses add up; `pieces` are (rows, length or None for packed) of the parts."""
    close(sum(p[0] for p in parts), whole[0])
    close(sum(p[2]["policy_loss"] for p in parts), whole[2]["policy_loss"])
    for name, expected in whole[1].items():
        got = torch.zeros_like(expected)
        for part, (rows, length) in zip(parts, pieces, strict=True):
            if length is None:
                inside = torch.arange(T) < torch.tensor([LENGTHS[r] for r in rows], dtype=torch.int64)[:, None]
                block = torch.zeros(len(rows), T, dtype=expected.dtype)
                block[inside] = part[1][name]
                got[rows] = block
            else:
                got[rows, :length] = part[1][name]
        close(got, expected)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("recipe", GLOBAL)
def test_micro_batches_add_up(recipe, split, fused):
    tensors = batch(recipe)
    options = {**OPTIONS, "fused": fused}
    counts = Denominators.of(tensors["mask"])
    whole = run(recipe, tensors, **options)
    pieces = [(rows, T) for rows in SPLITS[split]]
    parts = [run(recipe, {k: v[r] for k, v in tensors.items()}, denominators=counts, **options) for r, _ in pieces]
    check(recipe, parts, whole, pieces)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("recipe", GLOBAL)
def test_micro_batches_that_are_trimmed_or_packed_add_up(recipe, split):
    tensors = batch(recipe)
    counts = Denominators.of(tensors["mask"], horizon=T + 5)
    whole = run(recipe, tensors, denominators=counts, **OPTIONS)
    pieces = [(rows, max((LENGTHS[r] for r in rows), default=0)) for rows in SPLITS[split]]
    cut = [run(recipe, {k: v[r, :n] for k, v in tensors.items()}, denominators=counts, **OPTIONS) for r, n in pieces]
    check(recipe, cut, whole, pieces)
    parts = []
    for rows in SPLITS[split]:
        flat, cu_seqlens = packed(tensors, rows)
        parts.append(run(recipe, flat, denominators=counts, cu_seqlens=cu_seqlens, **OPTIONS))
    check(recipe, parts, whole, [(rows, None) for rows in SPLITS[split]])


@pytest.mark.parametrize("recipe", RECIPES)
def test_packing_and_order_change_nothing(recipe):
    tensors = batch(recipe)
    whole = run(recipe, tensors, **OPTIONS)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    moved = run(recipe, {k: v[order] for k, v in tensors.items()}, **OPTIONS)
    check(recipe, [moved], whole, [(order, T)])
    flat, cu_seqlens = packed(tensors, list(range(B)))
    if RECIPES[recipe].local:
        again = run(recipe, flat, cu_seqlens=cu_seqlens, **OPTIONS)
    else:
        counts = Denominators.of(flat["mask"], cu_seqlens, horizon=T)
        again = run(recipe, flat, cu_seqlens=cu_seqlens, denominators=counts, **OPTIONS)
    check(recipe, [again], whole, [(list(range(B)), None)])


def test_bnpo_divides_by_the_tokens_of_the_part_and_is_therefore_no_sum():
    tensors = batch("bnpo")
    whole, mask = run("bnpo", tensors), tensors["mask"]
    parts = [[0, 1, 2], [3, 4, 5, 6]]
    losses = [run("bnpo", {k: v[rows] for k, v in tensors.items()})[0] for rows in parts]
    shares = [mask[rows].sum() / mask.sum().double() for rows in parts]
    close(sum(s * l for s, l in zip(shares, losses, strict=True)), whole[0])
    assert (sum(losses) / 2 - whole[0]).abs() > 1e-3  # what averaging the parts gives


@pytest.mark.parametrize("reduction", DIVISORS)
def test_every_reduction_splits_and_so_does_the_fused_loss(reduction):
    tensors = batch("ppo")
    fused = {k: v for k, v in tensors.items() if k in ("logprobs", "old_logprobs", "advantages", "mask", "entropy")}
    fused["values"], fused["returns"] = torch.randn(2, B, T, dtype=torch.float64)
    counts = Denominators.of(tensors["mask"])
    whole = run("ppo", tensors, reduction=reduction, **OPTIONS)
    for split in SPLITS.values():
        pieces = [(rows, T) for rows in split]
        parts = [
            run("ppo", {k: v[r] for k, v in tensors.items()}, reduction=reduction, denominators=counts, **OPTIONS)
            for r in split
        ]
        check("ppo", parts, whole, pieces)
        if reduction in REDUCTIONS:
            shared = {"reduction": reduction, "normalizer": counts.normalizer(reduction)}
            of_parts = [fused_loss({k: v[rows] for k, v in fused.items()}, **shared) for rows in split]
            loss, grad = fused_loss(fused, reduction=reduction)
            close(sum(p[0] for p in of_parts), loss)
            close(torch.cat([p[1] for p in of_parts]), grad[[r for rows in split for r in rows]])


def fused_loss(tensors, **options):
    leaf = tensors["logprobs"].clone().requires_grad_()
    loss = ppo_loss(**{**tensors, "logprobs": leaf}, entropy_coef=0.1, **options).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("reduction", DIVISORS)
def test_parts_that_are_averaged_afterwards(reduction):
    # DDP and FSDP average the gradients of their ranks; some trainers divide by their accumulation steps.
    tensors = batch("ppo")
    counts = Denominators.of(tensors["mask"]).averaged(2).averaged(2)
    whole = run("ppo", tensors, reduction=reduction, **OPTIONS)
    pieces = [[0, 1], [2], [3, 4], [5, 6]]
    parts = [
        run("ppo", {k: v[r] for k, v in tensors.items()}, reduction=reduction, denominators=counts, **OPTIONS)
        for r in pieces
    ]
    close(sum(p[0] for p in parts) / 4, whole[0])
    close(torch.cat([p[1]["logprobs"] for p in parts]) / 4, whole[1]["logprobs"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes under gloo found, each with its own rows."""
    folder = tmp_path_factory.mktemp("gloo")
    script = Path(__file__).parent / "gloo_rank.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def joined(ranks, pick, dtype=torch.float64):
    out = torch.zeros(B, T, dtype=dtype)
    for found in ranks:
        out[found["rows"]] = torch.tensor(pick(found), dtype=dtype)
    return out


@pytest.mark.parametrize("recipe", GLOBAL)
def test_two_ranks_add_up_to_one(ranks, recipe):
    loss, grads, _ = run(recipe, batch(recipe), **OPTIONS)
    for found in ranks:  # the all-reduced loss is the same number everywhere
        close(torch.tensor(found["recipes"][recipe]["loss"], dtype=torch.float64), loss)
    for name, expected in grads.items():
        close(joined(ranks, lambda found, name=name: found["recipes"][recipe][name]), expected)


def test_what_looks_across_the_batch_looks_across_the_ranks(ranks):
    tensors = batch("decoupled_ppo")
    of_policy = (tensors["logprobs"], tensors["advantages"], tensors["mask"])
    top = top_entropy_mask(tensors["entropy"], tensors["mask"], fraction=0.3)
    assert torch.equal(joined(ranks, lambda found: found["top_entropy"], torch.bool), top) and top.any()
    covariant = covariance_mask(*of_policy, kind="kl_cov", fraction=0.2)
    assert torch.equal(joined(ranks, lambda found: found["kl_cov"], torch.bool), covariant) and covariant.any()
    drawn, n = joined(ranks, lambda found: found["clip_cov"], torch.bool), int(0.1 * tensors["mask"].sum())
    assert drawn.sum() == n and not (drawn & ~tensors["mask"]).any()  # together, not each
    weights = rollout_correction(
        tensors["old_logprobs"], tensors["rollout_logprobs"], tensors["mask"], normalize=True
    ).weights
    close(joined(ranks, lambda found: found["weights"]), weights)
