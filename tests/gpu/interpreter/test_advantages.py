from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, in_every_order, poisoned, same, sanitized
from rlhf_fast.kernels import advantages as kernels
from rlhf_fast.kernels import whiten
from rlhf_fast.kernels.common import scan

import rlhf_fast
from rlhf_fast.dialects import DIALECTS
from rlhf_fast.ops.kl_estimate import ALL_KINDS
from rlhf_fast.reference import advantages as reference

LEAVES = ("scores", "values", "logprobs", "ref_logprobs", "bootstrap")
SCALE = {"d bootstrap": "d values"}


def call(**kwargs):
    return rlhf_fast.advantages(**kwargs)._asdict()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(scan, "BLOCK", 16)
    monkeypatch.setattr(kernels, "MAX_PARTS", 4)
    monkeypatch.setattr(whiten, "BLOCK", 16)


def leaves_of(kwargs):
    return [k for k in LEAVES if k in kwargs]


# Empty; one token; short of a block; a block and its neighbours; three blocks.
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 7), (2, 512), (2, 513), (3, 1300)], ids=str)
@pytest.mark.parametrize("dialect", ["rlhf_fast", "trl"])
def test_parity(shape, dialect):
    kwargs = reference.sample(shape)
    options = {"kl_coef": 0.3, "kl_kind": "k3", "gamma": 0.97, "dialect": dialect}
    run = check(lambda **k: call(**k, **options), kwargs, leaves_of(kwargs), scale=SCALE)
    assert len(run.launches) == (2 + 4 if kwargs["values"].numel() else 0)


def options_at(seed):
    """A drawn combination of options, on rows of some blocks of 16, padded or packed."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda *of: of[int(torch.randint(len(of), (), generator=g))]
    kwargs = reference.sample(
        (pick(1, 3, 9), pick(1, 2, 15, 16, 17, 40)), seed=seed, dtype=pick(torch.float32, torch.bfloat16),
        gaps=pick(True, False), token_scores=pick(True, False),
    )  # fmt: skip
    B, T = kwargs["values"].shape
    kwargs["scores"] = kwargs["scores"] * pick(1, 12)  # beyond the clip of a dialect
    kwargs["mask"] = pick(kwargs["mask"], kwargs["mask"], torch.zeros(B, T).bool(), torch.ones(B, T).bool())
    options = {
        "gamma": pick(1.0, 0.9), "lam": pick(1.0, 0.95, 0.0), "gap": pick(None, "carry", "decay"),
        "dialect": pick(*DIALECTS), "whiten": pick(True, False), "kl_kind": pick(*ALL_KINDS), "kl_coef": pick(0.0, 0.3),
    }  # fmt: skip
    if pick(True, False, False):
        del kwargs["logprobs"], kwargs["ref_logprobs"]
        options["kl_coef"] = 0.0
    if pick(True, False):
        del kwargs["bootstrap"]
    if pick(True, False):
        ends = torch.randint(0, B * T + 1, (B - 1,), generator=g).sort().values.tolist()
        kwargs = {k: v.reshape(-1) for k, v in kwargs.items()}
        options["cu_seqlens"] = torch.tensor([0, *ends, B * T], dtype=torch.int32)
    return kwargs, options


@pytest.mark.parametrize("seed", range(40))
def test_drawn_options_on_small_blocks(seed, small_blocks):
    kwargs, options = options_at(seed)
    check(lambda **k: call(**k, **options), kwargs, leaves_of(kwargs), order="shuffle", scale=SCALE)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("last", [14, 15, 16, 31, 39])
def test_the_score_goes_to_its_slot_at_the_border_of_a_block(dialect, last, small_blocks):
    kwargs = reference.sample((3, 40), gaps=False)
    kwargs["mask"][:] = torch.arange(40) <= last
    kwargs["mask"][1] = False
    check(lambda **k: call(**k, kl_coef=0.1, dialect=dialect, whiten=False), kwargs, leaves_of(kwargs), scale=SCALE)


@pytest.mark.parametrize("dialect", ["rlhf_fast", "trl"])
def test_packed_equals_padded_to_the_bit(dialect, small_blocks):
    kwargs = reference.sample((5, 40))
    lengths = torch.tensor([40, 0, 17, 1, 33])
    inside = torch.arange(40)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    for i, length in enumerate(lengths):
        if length and dialect == "trl":  # the slot after the last token is inside, or there is none
            kwargs["mask"][i, length - 1] = True
    kwargs["mask"][:, -1] &= lengths == 40
    options = {"kl_coef": 0.1, "whiten": False, "dialect": "rlhf_fast", "gap": "decay" if dialect == "trl" else "carry"}
    padded = in_every_order(lambda **k: call(**k, **options), kwargs, leaves_of(kwargs))
    packed = {k: v[inside] if v.dim() == 2 else v for k, v in kwargs.items()}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    got = sanitized(lambda **k: call(**k, **options), packed)
    assert all(torch.equal(padded.results[k][inside], x) for k, x in got.results.items())


def test_a_row_does_not_depend_on_the_batch():
    kwargs = reference.sample((3, 1100))
    whole = sanitized(lambda **k: call(**k, kl_coef=0.1, whiten=False), kwargs)
    for i in range(3):
        alone = sanitized(
            lambda **k: call(**k, kl_coef=0.1, whiten=False), {k: v[i : i + 1] for k, v in kwargs.items()}
        )
        assert all(torch.equal(whole.results[k][i : i + 1], x) for k, x in alone.results.items())


@pytest.mark.parametrize("dialect", ["rlhf_fast", "trl"])
def test_masked_slots_are_never_read(dialect):
    kwargs = reference.sample((4, 1200), token_scores=True)
    kwargs["mask"][1] = False
    options = {"kl_coef": 0.1, "kl_kind": "k3", "dialect": dialect}
    clean = sanitized(lambda **k: call(**k, **options), kwargs, LEAVES)
    counted = reference.with_slot_after(kwargs["mask"], None) if dialect == "trl" else kwargs["mask"]
    for poison in (math.nan, math.inf):
        dirty = poisoned(poisoned(kwargs, counted, poison), kwargs["mask"], poison, keep=("values", "scores"))
        assert same(clean, sanitized(lambda **k: call(**k, **options), dirty, LEAVES))
    for name in ("advantages", "kl", "d logprobs", "d ref_logprobs"):
        assert not clean.results[name][~kwargs["mask"]].any()
    for name in ("returns", "rewards", "d values", "d scores"):
        assert not clean.results[name][~counted].any()


def test_every_byte_moves_once_and_the_whitening_adds_one_pass():
    kwargs = reference.sample((6, 1500), gaps=False)
    del kwargs["bootstrap"]
    run = in_every_order(lambda **k: call(**k, kl_coef=0.1, kl_kind="k3"), kwargs)
    real, n = int(kwargs["mask"].sum()), kwargs["mask"].numel()
    scan_launch, whitening = run.launches
    assert (scan_launch.load_first, scan_launch.store_bytes) == (n + 12 * real + 4 * 6, 16 * n + 16 * 6)
    assert (whitening.load_first, whitening.store_bytes) == (n + 4 * real + 16 * 6, 4 * n)
    assert run.moved <= 1.1 * (22 * n + 16 * real)
    plain = sanitized(lambda **k: call(**k, kl_coef=0.1, kl_kind="k3", whiten=False), kwargs)
    assert len(plain.launches) == 1 and plain.moved == 17 * n + 12 * real + 4 * 6
