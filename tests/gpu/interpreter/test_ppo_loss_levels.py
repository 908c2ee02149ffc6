"""The Triton kernel of ppo_loss with the ratio of a whole row, and with a surrogate that is not the clip."""

from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import ORDERS, Run, poisoned, same
from gpu.interpreter.test_ppo_loss import options_at, small_blocks
from gpu.tools.on_cpu import on_cpu
from gpu.tools.sanitizer import Sanitizer
from level_parity import CARRIED, PAIRS, check_parity, run
from parity import assert_parity, double
from ppo_parity import FULL, GRADIENTS

import rlhf_fast
from rlhf_fast.losses import RECIPES
from rlhf_fast.reference import ppo_loss as reference
from rlhf_fast.reference._reduce import REDUCTIONS

__all__ = ["small_blocks"]  # a fixture

each_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
some_pairs = pytest.mark.parametrize(
    "pair", [*CARRIED, ("sequence-token", "clip"), ("product", "cispo"), ("token", "score")], ids="-".join
)


def sanitized(pair, kwargs, order="forward", **options):
    """`run` on the Triton kernel; nothing found, and no element of a result left unwritten."""
    with Sanitizer(order=order, seed=1) as s, on_cpu("triton"):
        results = run(pair, kwargs, None, **options)
        assert not any(s.unwritten(x) for x in results.values())
    s.check()
    return Run(results, s.launches)


def check(pair, kwargs, order="forward", **options):
    got = sanitized(pair, kwargs, order, **options)
    check_parity(got.results, pair, kwargs, **options)
    return got


# Empty; one token; rows short of a block, a masked one among them; several rows; rows of several blocks.
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 7), (3, 171), (2, 1100)], ids=str)
@each_pair
def test_parity_with_every_term(pair, shape):
    kwargs = reference.sample(shape)
    if shape == (5, 7):
        kwargs["mask"][2] = False
    for reduction in REDUCTIONS if kwargs["mask"].numel() < 100 else REDUCTIONS[::2]:
        got = check(pair, kwargs, **FULL, reduction=reduction, dual_clip=1.5)
        assert len(got.launches) == (1 if kwargs["mask"].numel() else 0)


@each_pair
def test_bounds_of_tokens_and_of_rows(pair, small_blocks):
    kwargs = reference.sample((6, 40))
    kwargs["logprobs"] = kwargs["old_logprobs"] + torch.tensor([0.0, 12.0, 30.0, -30.0, 0.4, 0.001])[:, None]
    kwargs["logprobs"][4, ::3] -= 25
    for clip in (0.2, (1.0, 4.0), (0.05, 9.0)):
        got = check(pair, kwargs, clip=clip)
    assert got.results["ratio_clamped"] == (kwargs["mask"][2:4].sum() + kwargs["mask"][4, ::3].sum())


@pytest.mark.parametrize("seed", range(44))
def test_drawn_options_on_small_blocks(seed, small_blocks):
    kwargs, options = options_at(seed)
    if seed % 2 and "importance_weights" in kwargs:  # a weight may have any sign
        kwargs["importance_weights"] *= torch.randn(kwargs["importance_weights"].shape).sign()
    check(PAIRS[seed % len(PAIRS)], kwargs, "shuffle", **options)


@some_pairs
def test_the_order_of_programs_does_not_matter_and_masked_tokens_are_never_read(pair, small_blocks):
    kwargs = reference.sample((6, 37))
    kwargs["mask"][4] = False
    clean, *others = (sanitized(pair, kwargs, order, **FULL) for order in ORDERS)
    for poison in (math.nan, math.inf):
        others.append(sanitized(pair, poisoned(kwargs, kwargs["mask"], poison), **FULL))
    assert all(same(clean, other) for other in others)
    assert not any(clean.results[k][~kwargs["mask"]].any() for k in GRADIENTS)


@each_pair
def test_a_nan_on_a_real_token_stays_in_its_row(pair, small_blocks):
    kwargs = reference.sample((3, 40))
    clean = sanitized(pair, kwargs, **FULL).results
    kwargs["mask"][1, 5] = True
    kwargs["old_logprobs"][1, 5] = math.nan
    got = sanitized(pair, kwargs, normalizer=clean["tokens"], **FULL).results
    other = torch.tensor([0, 2])
    assert torch.equal(got["d logprobs"][other], clean["d logprobs"][other])
    assert got["loss"].isnan() or pair[1] == "score"
    assert not got["d logprobs"][~kwargs["mask"]].any()
    if pair in CARRIED:
        assert got["d logprobs"][1][kwargs["mask"][1]].isnan().all()


@some_pairs
def test_a_row_is_the_same_packed_padded_and_alone(pair, small_blocks):
    lengths = torch.tensor([0, 50, 1, 0, 17, 16, *[2] * 5, 33, 0])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    kwargs = reference.sample((int(lengths.sum()),))
    for reduction in REDUCTIONS[::2]:
        check(pair, kwargs, **FULL, reduction=reduction, cu_seqlens=cu_seqlens)
    counts = {"normalizer": 7.0, "reduction": "seq-mean-token-mean"}
    whole = sanitized(pair, kwargs, **counts, cu_seqlens=cu_seqlens).results
    for row in (1, 2, 11):
        at = slice(cu_seqlens[row], cu_seqlens[row + 1])
        part = {k: v[None, at] for k, v in kwargs.items()}
        padded = {k: torch.nn.functional.pad(v, (0, 30)) for k, v in part.items()}
        for each in (part, padded):
            got = sanitized(pair, each, **counts).results
            assert all(torch.equal(got[k][0, : int(lengths[row])], whole[k][at]) for k in GRADIENTS)


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.fused])
def test_every_recipe_of_the_one_pass_is_one_launch(recipe):
    kwargs = {k: reference.sample((4, 50))[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")}
    if RECIPES[recipe].correction is not None:
        kwargs["rollout_logprobs"] = kwargs["old_logprobs"] - 0.1
    with Sanitizer() as s, on_cpu("triton"):
        got = rlhf_fast.policy_loss(recipe, **kwargs, fused=True)
    s.check()
    assert len(s.launches) == 1
    with rlhf_fast.use_backend("reference"):
        call = lambda **k: rlhf_fast.policy_loss(recipe, **k, fused=False).loss
        plain, truth = call(**kwargs), call(**double(kwargs))
    assert_parity(got.loss, truth, plain, "loss", 1.0 + got.stats["ratio_max"].item())


@pytest.mark.parametrize("pair", [*CARRIED, ("sequence-token", "clip"), ("token", "score")], ids="-".join)
def test_bytes_come_once_and_a_row_is_asked_for_again(pair):
    kwargs = reference.sample((3, 700))
    real, n = int(kwargs["mask"].sum()), 2100
    (once,) = sanitized(("token", "clip"), kwargs, reduction="seq-mean-token-sum", normalizer=3.0, **FULL).launches
    (launch,) = sanitized(pair, kwargs, reduction="seq-mean-token-sum", normalizer=3.0, **FULL).launches
    assert (launch.load_first, launch.store_bytes) == (once.load_first, once.store_bytes)
    again = 0 if pair[0] == "token" else n + 4 * real * (4 if pair in CARRIED else 2)
    assert launch.load_bytes == once.load_bytes + again
