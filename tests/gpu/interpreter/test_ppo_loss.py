from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, in_every_order, poisoned, same, sanitized
from rlhf_fast.kernels import ppo_loss as kernels

import rlhf_fast
from rlhf_fast.dialects import DIALECTS
from rlhf_fast.ops.kl_estimate import ALL_KINDS
from rlhf_fast.reference import ppo_loss as reference
from rlhf_fast.reference._reduce import REDUCTIONS

LEAVES = ("logprobs", "entropy", "values")
PARTS = 5  # of 2100 tokens
FULL = {"entropy_coef": 0.01, "kl_coef": 0.1}
SCALE = {"loss": 1.0, "policy_loss": 1.0, "kl": 1.0}  # of one token


def call(**kwargs):
    """explained_variance becomes the share it is 1 minus: the subtraction would be compared as an error of its result."""
    out = rlhf_fast.ppo_loss(**kwargs)
    stats = dict(out.stats)
    return {"loss": out.loss, "unexplained": 1 - stats.pop("explained_variance"), **stats}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "MAX_PARTS", 4)


# Empty; one token; short of a block; a block and its neighbours; many short rows; several parts.
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 7), (2, 256), (3, 171), (40, 5), (3, 1100)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parity(shape, reduction):
    kwargs = reference.sample(shape)
    if shape == (5, 7):
        kwargs["mask"][2] = False
    options = {**FULL, "reduction": reduction, "dual_clip": 1.5}
    run = check(lambda **k: call(**k, **options), kwargs, LEAVES, scale=SCALE)
    assert len(run.launches) == (1 if kwargs["logprobs"].numel() else 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_sequence_of_no_token_has_a_loss_of_0(reduction):
    kwargs = reference.sample((0,)) | {"cu_seqlens": torch.tensor([0])}
    run = check(lambda **k: call(**k, **FULL, reduction=reduction), kwargs, LEAVES)
    assert run.results["loss"] == 0 and not run.launches


def options_at(seed):
    """A drawn combination of options and inputs, on parts of some blocks of 16, padded or packed."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda *of: of[int(torch.randint(len(of), (), generator=g))]
    B, T = pick(1, 3, 9), pick(1, 2, 15, 16, 17, 40)
    kwargs = reference.sample((B, T), seed=seed, dtype=pick(torch.float32, torch.bfloat16))
    kwargs["mask"] = pick(kwargs["mask"], kwargs["mask"], torch.zeros(B, T).bool(), torch.ones(B, T).bool())
    kwargs["logprobs"][0, :3] -= pick(0, 30)  # beyond the clamps
    for names in (
        ["entropy"],
        ["ref_logprobs"],
        ["values", "returns", "old_values"],
        ["old_values"],
        ["importance_weights"],
    ):
        if pick(True, False, False):
            for name in names:
                kwargs.pop(name, None)
    options = {
        "clip": pick(0.2, (0.2, 0.28)), "dual_clip": pick(None, 3.0, 1.2), "kl_kind": pick(*ALL_KINDS),
        "value_clip": pick(0.2, None), "value_coef": pick(0.1, 1.0), "reduction": pick(*REDUCTIONS),
        "normalizer": pick(None, None, 7.0, torch.tensor(5.0)), "dialect": pick(*DIALECTS),
        "entropy_coef": 0.01 if "entropy" in kwargs else 0.0, "kl_coef": 0.1 if "ref_logprobs" in kwargs else 0.0,
    }  # fmt: skip
    if DIALECTS[options["dialect"]].dual_clip_slope and options["dual_clip"] is None:
        options["clip"] = 0.2  # the bound follows one number
    if pick(True, False):
        ends = torch.randint(0, B * T + 1, (B - 1,), generator=g).sort().values.tolist()
        kwargs = {k: v.reshape(-1) for k, v in kwargs.items()}
        options["cu_seqlens"] = torch.tensor([0, *ends, B * T])
    return kwargs, options


@pytest.mark.parametrize("seed", range(48))
def test_drawn_options_on_small_blocks(seed, small_blocks):
    kwargs, options = options_at(seed)
    leaves = [k for k in LEAVES if k in kwargs]
    check(lambda **k: call(**k, **options), kwargs, leaves, order="shuffle", scale=SCALE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_order_of_programs_does_not_matter_and_masked_tokens_are_never_read(reduction, small_blocks):
    kwargs = reference.sample((6, 37))
    kwargs["mask"][4] = False
    clean = in_every_order(lambda **k: call(**k, reduction=reduction, **FULL), kwargs, LEAVES)
    for poison in (math.nan, math.inf):
        dirty = poisoned(kwargs, kwargs["mask"], poison)
        assert same(clean, sanitized(lambda **k: call(**k, reduction=reduction, **FULL), dirty, LEAVES))
    assert not any(x[~kwargs["mask"]].any() for x in clean.results.values() if x.dim())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_that_share_a_normalizer_have_the_gradient_of_the_whole_batch(reduction, small_blocks):
    kwargs = reference.sample((8, 29))
    kwargs["mask"][3] = False
    normalizer = (kwargs["mask"].any(1) if reduction.startswith("seq") else kwargs["mask"]).sum()
    options = {**FULL, "reduction": reduction}
    whole = sanitized(lambda **k: call(**k, **options, normalizer=normalizer.item()), kwargs, LEAVES).results
    if reduction != "token-sum":
        counted = sanitized(lambda **k: call(**k, **options), kwargs, LEAVES).results
        assert all(torch.equal(whole[k], counted[k]) for k in whole)
    for begin, end in ((0, 3), (3, 8)):
        part = {k: v[begin:end] for k, v in kwargs.items()}
        got = sanitized(lambda **k: call(**k, **options, normalizer=normalizer.float()), part, LEAVES).results
        assert all(torch.equal(got[f"d {k}"], whole[f"d {k}"][begin:end]) for k in LEAVES)


def test_a_spread_far_from_zero_costs_no_digits(small_blocks):
    """Variances are of deviations from the mean, not differences of squares."""
    kwargs = reference.sample((4, 40))
    kwargs["logprobs"] = kwargs["old_logprobs"] + 2 + 1e-3 * torch.randn(4, 40)
    kwargs["returns"] = 1000 + torch.randn(4, 40)
    kwargs["values"] = kwargs["returns"] + 0.1 * torch.randn(4, 40)
    check(lambda **k: call(**k, **FULL), kwargs, LEAVES, scale=SCALE)


def test_without_gradients_only_loss_and_statistics_are_written():
    kwargs = reference.sample((3, 700))
    run = in_every_order(lambda **k: call(**k, **FULL), kwargs)
    (launch,) = run.launches
    sums = 4 * kernels.N_COLUMNS * PARTS
    assert launch.store_bytes == sums + 4 * 17 + 32  # the counters go back to zero


def test_every_byte_moves_once_in_one_launch():
    kwargs = reference.sample((3, 700))
    real, n, sums = int(kwargs["mask"].sum()), 2100, 4 * kernels.N_COLUMNS * PARTS
    for normalizer in (None, 100.0):
        run = sanitized(lambda **k: call(**k, **FULL, normalizer=normalizer), kwargs, LEAVES)  # noqa: B023
        (launch,) = run.launches
        assert launch.load_first == n + 9 * 4 * real + sums
        assert launch.store_bytes == 3 * 4 * n + sums + 4 * 17 + 32
        # Asked for twice: the mask by the programs that count, the tokens of the parts by each of three variances.
        assert launch.load_bytes == launch.load_first + (n if normalizer is None else 0) + 3 * 4 * PARTS


@pytest.mark.parametrize("spoilt", ["logprobs", "values", "advantages"])
def test_a_nan_in_a_real_token_shows_in_the_loss_and_in_its_statistics(spoilt, small_blocks):
    kwargs = reference.sample((3, 40))
    kwargs["mask"][1, 5] = True
    kwargs[spoilt][1, 5] = math.nan
    run = sanitized(lambda **k: call(**k, **FULL), kwargs, LEAVES)
    assert run.results["loss"].isnan()
    for name in ("ratio_min", "ratio_max", "ratio_mean", "ratio_var"):
        assert run.results[name].isnan() == (spoilt == "logprobs")
