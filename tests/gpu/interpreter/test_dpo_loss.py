from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, evaluate, in_every_order, same, sanitized
from gpu.tools.cases import packed_answers
from gpu.tools.on_cpu import on_cpu
from rlhf_fast.kernels import dpo_loss as kernels

import rlhf_fast
from rlhf_fast.preference_kinds import KINDS
from rlhf_fast.reference import dpo_loss as reference

LEAVES = ("chosen_logprobs", "rejected_logprobs")
REFS = ("ref_chosen_logprobs", "ref_rejected_logprobs")
FUSED = [name for name, kind in KINDS.items() if kind.fused]


def call(**kwargs):
    return rlhf_fast.dpo_loss(**kwargs)._asdict()


def of_kind(**kwargs):
    return rlhf_fast.preference_loss(**kwargs, fused=True)._asdict()


def without(kwargs, *names):
    return {k: v for k, v in kwargs.items() if k not in names}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "MAX_PARTS", 4)


# No pairs; no tokens; one pair of one token; odd rows; a block and its neighbours, and three of them.
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 33), (2, 2047), (2, 2048), (1, 5000)], ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_parity(shape, average):
    kwargs = reference.sample(shape)
    if shape == (5, 33):
        kwargs["chosen_mask"][1] = False  # an answer without a token is a pair nevertheless
        kwargs["mask"][1] = True
    for options in ({"label_smoothing": 0.1, "beta": 0.3}, {"normalizer": torch.tensor(3.0)}):
        run = check(lambda **k: call(**k, average=average, **options), kwargs, LEAVES)  # noqa: B023
        assert len(run.launches) == (1 if shape[0] else 0)


@pytest.mark.parametrize("pairs", [4, 5, 8, 11])
def test_parts_of_several_pairs_and_a_shorter_last_one(pairs, small_blocks):
    check(call, reference.sample((pairs, 20)), LEAVES, order="reverse")


def options_at(seed):
    """A drawn kind with its options and inputs, on rows of some blocks of 16, padded or packed."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda *of: of[int(torch.randint(len(of), (), generator=g))]
    B, T, other = pick(1, 3, 9), pick(1, 15, 16, 17, 40), pick(1, 7, 32, 60)
    dtype = pick(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    kwargs = reference.sample((B, T), seed=seed, dtype=dtype, rejected_length=other)
    options = {"kind": FUSED[seed % len(FUSED)], "beta": pick(0.1, 0.5, 2.0)}
    kind = KINDS[options["kind"]]
    if not kind.reference:
        kwargs = without(kwargs, *REFS)
    if "label_smoothing" in kind.options:
        options["label_smoothing"] = pick(0.0, 0.1, 0.4)
    if "gamma" in kind.options:
        options["gamma"] = 0.7
    options["normalizer"] = pick(None, None, 7.0, torch.tensor(5.0))
    kwargs["mask"] = pick(kwargs["mask"], kwargs["mask"], torch.zeros(B).bool())
    kwargs = without(
        kwargs, *pick((), ("mask",)), *pick((), ("weights",)), *pick((), ("chosen_mask",), ("rejected_mask",))
    )
    if not kind.per_token and kind.reference and pick(True, False):
        lengths = [torch.randint(0, n + 1, (B,), generator=g).tolist() for n in (T, other)]
        kwargs = packed_answers(kwargs, *lengths)
    elif pick(True, False):  # rows that are not contiguous
        kwargs = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in kwargs.items()}
    return kwargs, options


@pytest.mark.parametrize("seed", range(48))
def test_drawn_kinds_on_small_blocks(seed, small_blocks):
    kwargs, options = options_at(seed)
    check(lambda **k: of_kind(**k, **options), kwargs, LEAVES, order="shuffle")


@pytest.mark.parametrize("average", [False, True])
def test_packed_padded_and_alone_are_the_same_bits(average, small_blocks):
    lengths = {"chosen": [70, 0, 17, 1, 64], "rejected": [5, 9, 0, 74, 33]}
    kwargs = without(reference.sample((5, 70)), "mask", "chosen_mask", "rejected_mask")
    for side, n in lengths.items():
        width = kwargs[f"{side}_logprobs"].shape[1]
        kwargs[f"{side}_mask"] = torch.arange(width) < torch.tensor(n)[:, None]
    function = lambda **k: call(**k, average=average, normalizer=9.0)
    padded = sanitized(function, kwargs, LEAVES).results
    packed = sanitized(function, packed_answers(kwargs, *lengths.values()), LEAVES).results
    alone = sanitized(function, {k: v[3:4] for k, v in kwargs.items()}, LEAVES).results
    assert all(torch.equal(padded[k], packed[k]) for k in ("loss", "chosen_rewards", "rejected_rewards"))
    for side in lengths:
        name = f"d {side}_logprobs"
        assert torch.equal(padded[name][kwargs[f"{side}_mask"]], packed[name])
        assert torch.equal(padded[name][3:4], alone[name])
        assert torch.equal(padded[f"{side}_rewards"][3:4], alone[f"{side}_rewards"])


def test_the_order_of_programs_does_not_matter_and_what_masks_hide_is_never_read(small_blocks):
    kwargs = reference.sample((11, 37))
    clean = in_every_order(call, kwargs, LEAVES)
    for poison in (math.nan, math.inf):
        dirty = {k: v.clone() for k, v in kwargs.items()}
        for side in ("chosen", "rejected"):
            hidden = ~(kwargs[f"{side}_mask"] & kwargs["mask"][:, None])
            for name in (f"{side}_logprobs", f"ref_{side}_logprobs"):
                dirty[name][hidden] = poison
            assert not clean.results[f"d {side}_logprobs"][hidden].any()
        dirty["weights"][~kwargs["mask"]] = poison
        assert same(clean, sanitized(call, dirty, LEAVES))


def test_the_gap_of_long_answers_is_what_is_left_of_thousands_of_nats():
    g = torch.Generator().manual_seed(3)
    policy = -2 - torch.rand(2, 1, 4096, generator=g)
    ref = policy + 1e-3 * torch.randn(2, 1, 4096, generator=g)
    kwargs = {**dict(zip(LEAVES, policy, strict=True)), **dict(zip(REFS, ref, strict=True))}
    check(lambda **k: call(**k, beta=1.0), kwargs, LEAVES)
    gap = (policy.double() - ref.double()).sum((1, 2))
    with on_cpu("triton"):
        out = rlhf_fast.dpo_loss(**kwargs, beta=1.0)
    torch.testing.assert_close(out.chosen_rewards.double(), gap[:1], rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", FUSED)
def test_extreme_gaps(kind):
    rows = torch.tensor([[1e4], [-1e4], [80.0], [-80.0], [1e18], [-1e18]])
    kwargs = dict(zip(LEAVES, (rows, -rows), strict=True))
    if KINDS[kind].reference:
        kwargs |= dict(zip(REFS, (torch.zeros(6, 1), torch.zeros(6, 1)), strict=True))
    for i in range(6):  # a pair alone: its loss and gradient are not beside larger ones
        alone = {k: v[i : i + 1] for k, v in kwargs.items()}
        check(lambda **k: of_kind(**k, kind=kind, beta=0.3), alone, LEAVES)


@pytest.mark.parametrize("kind", FUSED)
def test_a_nan_on_a_real_token_stays_in_its_pair(kind, small_blocks):
    kwargs = without(reference.sample((3, 40)), "mask", *(() if KINDS[kind].reference else REFS))
    kwargs["chosen_mask"][1, 5] = True
    function = lambda **k: of_kind(**k, kind=kind)
    clean = sanitized(function, kwargs, LEAVES).results
    kwargs["chosen_logprobs"][1, 5] = math.nan
    got = sanitized(function, kwargs, LEAVES).results
    assert got["loss"].isnan() and got["chosen_rewards"][1].isnan()
    assert got["d chosen_logprobs"][1][kwargs["chosen_mask"][1]].isnan().all()
    assert not got["d chosen_logprobs"][1][~kwargs["chosen_mask"][1]].any()
    others = torch.tensor([0, 2])
    assert all(torch.equal(got[k][others], clean[k][others]) for k in clean if k != "loss")


def test_a_batch_without_pairs_or_with_a_normalizer_of_0_has_a_loss_of_0():
    kwargs = reference.sample((3, 9))
    kwargs["mask"][:] = False
    for normalizer in (None, torch.tensor(0.0)):
        run = sanitized(lambda **k: call(**k, normalizer=normalizer), kwargs, LEAVES)  # noqa: B023
        assert not any(x.any() for x in run.results.values())


def test_micro_batches_that_share_a_normalizer_have_the_gradients_of_the_whole_batch():
    kwargs = reference.sample((8, 29))
    whole = sanitized(call, kwargs, LEAVES).results
    normalizer = kwargs["mask"].sum().float()
    losses = []
    for rows in (slice(3), slice(3, 8)):
        part = {k: v[rows] for k, v in kwargs.items()}
        got = sanitized(lambda **k: call(**k, normalizer=normalizer), part, LEAVES).results
        losses.append(got.pop("loss").double())
        assert all(torch.equal(x, whole[k][rows]) for k, x in got.items())
    assert sum(losses).item() == pytest.approx(whole["loss"].item(), rel=1e-6)


def test_only_the_sides_that_ask_for_a_gradient_are_written():
    kwargs = without(reference.sample((3, 50)), "mask", "weights")
    none = sanitized(call, kwargs)
    for leaf in LEAVES:
        one = sanitized(call, kwargs, [leaf])
        written = one.launches[0].store_bytes - none.launches[0].store_bytes
        assert written == 4 * kwargs[leaf].numel()
        assert all(torch.equal(one.results[k], x) for k, x in none.results.items())


def test_every_byte_moves_once_in_one_launch(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    kwargs = reference.sample((6, 150))
    kwargs["mask"][:4], kwargs["mask"][4:] = True, False
    run = in_every_order(call, kwargs, LEAVES)
    (launch,) = run.launches
    masks = [kwargs[f"{side}_mask"][:4] for side in ("chosen", "rejected")]
    slots, tokens, real = 6 * 150 + 6 * 154, sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
    parts = 8 * 6
    assert launch.load_first == 2 * 4 * real + tokens + 6 + 4 * 4 + parts  # log-probs, masks, pairs, weights
    assert launch.store_bytes == 4 * slots + 4 * (1 + 2 * 6) + parts + 32  # the counters go back to zero
    # The masks of tokens are read again for the gradients, that of the pairs by the programs that count.
    assert launch.load_bytes == launch.load_first + tokens + 6


def test_doubles_are_declined_with_a_reason():
    kwargs = reference.sample((2, 5), dtype=torch.float64)
    with on_cpu("triton"), pytest.raises(RuntimeError, match="fp64 is left to the reference"):
        evaluate(call, kwargs)
