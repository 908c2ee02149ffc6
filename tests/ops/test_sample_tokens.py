from __future__ import annotations

import math

import pytest
import tolerances
import torch
from parity import assert_parity
from torch.library import opcheck

import rlhf_fast
from rlhf_fast import _op
from rlhf_fast.ops import sample_tokens
from rlhf_fast.ops.token_logprobs import token_logprobs
from rlhf_fast.reference.sample_tokens import sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = ({}, {"softcap": 4.0}, {"temperature": 0.3}, {"temperature": 2.5, "banned_ids": (0, 3)}, {"temperature": 0.0})


def prepared(options: dict, vocab: int) -> dict:
    bans = options.get("banned_ids")
    if bans is None:
        return options
    return {**options, "banned_ids": torch.tensor([i for i in bans if i < vocab - 1], dtype=torch.int64)}


def distribution(logits: torch.Tensor, options: dict) -> torch.Tensor:
    """Probabilities in fp64, written out."""
    y = logits.double()
    if "softcap" in options:
        y = options["softcap"] * torch.tanh(y / options["softcap"])
    if "banned_ids" in options:
        y = y.index_fill(-1, options["banned_ids"], -torch.inf)
    return (y / (options.get("temperature", 1.0) or 1.0)).softmax(-1)


# One class; less than a vector; odd tails; several blocks; more blocks than marks of the search in fp32.
@pytest.mark.parametrize("vocab", [1, 7, 127, 5003, 49152, 600_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(vocab, dtype):
    x = sample((3,) if vocab > 100_000 else (2, 9), vocab, dtype=dtype)
    for each in OPTIONS:
        options = prepared(each, vocab)
        got = sample_tokens(**x, **options)
        p = distribution(x["logits"], options)
        # The number lies between the cumulative probabilities before and at the token, up to their rounding.
        if options.get("temperature") != 0:
            cumulative = p.cumsum(-1).gather(-1, got.token_ids[..., None]).squeeze(-1)
            own = p.gather(-1, got.token_ids[..., None]).squeeze(-1)
            slack = tolerances.FLOOR[got.logprobs.dtype]
            assert (x["uniform"] <= cumulative + slack).all() and (x["uniform"] >= cumulative - own - slack).all()
            assert (own > 0).all()
        else:
            assert torch.equal(got.token_ids, x["logits"].argmax(-1))
        with rlhf_fast.use_backend("reference"):
            plain = sample_tokens(**x, **options)
            truth = sample_tokens(x["logits"].double(), x["uniform"], **options)
        if dtype is torch.float64:  # the truth is no better
            limit = tolerances.DOUBLE * (math.log(vocab) + 1)
            torch.testing.assert_close(got.entropy, truth.entropy, rtol=0, atol=limit)
        else:
            assert_parity(got.entropy, truth.entropy, plain.entropy, "entropy", math.log(vocab) + 1)
        same = got.token_ids == truth.token_ids
        assert same.float().mean() > 0.95  # what differs lies on a border
        true_logprobs = p.gather(-1, got.token_ids[..., None]).squeeze(-1).log()
        if dtype is torch.float64:
            torch.testing.assert_close(got.logprobs, true_logprobs, rtol=tolerances.DOUBLE, atol=limit)
        else:
            plain_logprobs = torch.where(same, plain.logprobs.double(), true_logprobs)
            assert_parity(got.logprobs, true_logprobs, plain_logprobs, "logprobs")
        assert got.token_ids.dtype == torch.int64
        assert got.logprobs.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


def test_statistics_are_those_of_token_logprobs():
    x = sample((50,), 5003, dtype=torch.bfloat16)
    got = sample_tokens(**x, temperature=0.7)
    expected = token_logprobs(x["logits"], got.token_ids, temperature=0.7)
    assert torch.equal(got.logprobs, expected.logprobs) and torch.equal(got.entropy, expected.entropy)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_tokens_come_as_often_as_their_probability_says(backend):
    n, logits = 20_000, 1.5 * torch.randn(40)
    u = torch.rand(n, dtype=torch.float64)
    with rlhf_fast.use_backend(backend):
        found = sample_tokens(logits.expand(n, 40), u, temperature=1.3).token_ids
    expected = n * (logits / 1.3).softmax(-1)
    chi = ((torch.bincount(found, minlength=40) - expected) ** 2 / expected).sum()
    assert chi < 39 + 5 * (2 * 39) ** 0.5  # five standard deviations of a chi-squared number with 39 degrees of freedom


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_equal_logits_cut_the_interval_evenly_to_the_last_class(backend):
    """At 262,144 classes an fp32 running sum is coarser than a probability."""
    V = 262_144
    u = torch.cat([torch.rand(200, dtype=torch.float64), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)])
    with rlhf_fast.use_backend(backend):
        found = sample_tokens(torch.zeros(1, V).expand(202, V), u).token_ids
    assert ((found - (u * V).floor()).abs() <= 1).all()
    assert found[-2] == 0 and found[-1] == V - 1


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_class_without_probability_is_never_taken(backend):
    logits = torch.full((6, 9000), -torch.inf)
    logits[:, 4000], logits[:, 8000] = 1.0, 1.0
    u = torch.tensor([0.0, 0.49, 0.51, 1 - 2.0**-53, 0.0, 1 - 2.0**-53], dtype=torch.float64)
    with rlhf_fast.use_backend(backend):
        assert sample_tokens(logits, u).token_ids.tolist() == [4000, 4000, 8000, 8000, 4000, 8000]
        only = sample_tokens(logits, u, banned_ids=torch.tensor([4000]))
    assert only.token_ids.tolist() == [8000] * 6
    assert (only.logprobs == 0).all() and (only.entropy == 0).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_banned_classes_leave_a_renormalised_distribution_even_when_they_held_nearly_all_of_it(backend, softcap):
    logits = torch.randn(5, 700)
    logits[:, 11] = 60.0
    u = torch.rand(5, dtype=torch.float64)
    without = torch.cat([logits[:, :11], logits[:, 12:]], -1)
    with rlhf_fast.use_backend(backend):
        got = sample_tokens(logits, u, banned_ids=torch.tensor([11]), softcap=softcap)
        expected = sample_tokens(without, u, softcap=softcap)
    assert torch.equal(got.token_ids - (got.token_ids > 11).long(), expected.token_ids)
    torch.testing.assert_close(got.logprobs, expected.logprobs)
    torch.testing.assert_close(got.entropy, expected.entropy)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_temperature_zero_takes_the_first_of_the_largest_with_the_log_prob_of_temperature_one(backend):
    logits = torch.randn(4, 5000).to(torch.bfloat16)
    logits[0, [700, 4100]] = 9.0
    logits[1, 4999] = 9.0
    with rlhf_fast.use_backend(backend):
        got = sample_tokens(logits, temperature=0.0)
        per_row = sample_tokens(
            logits, torch.full((4,), 0.5, dtype=torch.float64), temperature=torch.tensor([0.0, 0.0, 1.0, 0.0])
        )
        banned = sample_tokens(logits, temperature=0, banned_ids=torch.tensor([700]))
    assert got.token_ids[:2].tolist() == [700, 4999]
    assert per_row.token_ids[[0, 1, 3]].tolist() == got.token_ids[[0, 1, 3]].tolist()
    assert banned.token_ids[0] == 4100
    torch.testing.assert_close(got.logprobs, token_logprobs(logits, got.token_ids).logprobs)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_row_without_a_distribution_gives_minus_one_in_that_row_alone(backend, bad):
    x = sample((3,), 5000)
    logits = x["logits"].clone()
    if bad is None:
        logits[1] = -torch.inf
    else:
        logits[1, 4500] = bad
    for options in ({}, {"temperature": 0.0}):
        with rlhf_fast.use_backend(backend):
            got, clean = sample_tokens(logits, x["uniform"], **options), sample_tokens(**x, **options)
        assert got.token_ids[1] == -1 and got.logprobs[1].isnan() and got.entropy[1].isnan()
        assert torch.equal(got.token_ids[[0, 2]], clean.token_ids[[0, 2]])
        assert torch.equal(got.logprobs[[0, 2]], clean.logprobs[[0, 2]])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_masked_rows_give_zero_whatever_they_hold(backend):
    x = sample((4, 6), 300)
    mask = torch.rand(4, 6) > 0.4
    poisoned = x["logits"].masked_fill(~mask[..., None], torch.nan)
    u = x["uniform"].masked_fill(~mask, 7.0)  # out of range, where nobody looks
    with rlhf_fast.use_backend(backend):
        got, clean = sample_tokens(poisoned, u, mask=mask), sample_tokens(**x)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[mask], b[mask]) and (a[~mask] == 0).all()


def test_a_row_has_the_same_bits_in_any_batch_at_any_stride_and_thread_count():
    x = sample((70,), 5003, dtype=torch.bfloat16)
    whole = sample_tokens(**x)
    wide = torch.nn.functional.pad(x["logits"], (3, 9))[:, 3:-9]
    torch.set_num_threads(1)
    alone = [sample_tokens(wide[i : i + 1], x["uniform"][i : i + 1]) for i in range(70)]
    for k in range(3):
        assert torch.equal(whole[k], torch.cat([a[k] for a in alone]))


def test_samples_of_one_row_need_no_copies_of_it():
    x = sample((5,), 999)
    u = torch.rand(5, 4, dtype=torch.float64)
    shared = sample_tokens(x["logits"][:, None].expand(5, 4, 999), u)
    repeated = sample_tokens(x["logits"].repeat_interleave(4, 0), u.flatten())
    assert all(torch.equal(a.flatten(), b) for a, b in zip(shared, repeated, strict=True))


def test_instruction_sets_agree(each_isa):
    x = sample((20,), 5003, spread=8.0)
    (_, first), *others = each_isa(lambda: sample_tokens(**x, temperature=0.8, banned_ids=torch.tensor([5])))
    for isa, other in others:
        assert torch.equal(first.token_ids, other.token_ids), isa
        torch.testing.assert_close(other.logprobs, first.logprobs, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(other.entropy, first.entropy, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_and_logits(temperature):
    x = sample((8,), 3000, spread=1e4)
    got = sample_tokens(**x, temperature=temperature)
    assert got.logprobs.isfinite().all() and got.entropy.isfinite().all()
    if temperature < 1:
        assert torch.equal(got.token_ids, x["logits"].argmax(-1))


def test_empty_rows_and_inputs_left_alone():
    assert sample_tokens(torch.zeros(0, 5), torch.zeros(0, dtype=torch.float64)).token_ids.shape == (0,)
    x = sample((3,), 600)
    logits = x["logits"].clone()
    sample_tokens(**x, banned_ids=torch.tensor([0]))
    assert torch.equal(logits, x["logits"])
    assert not sample_tokens(logits.requires_grad_(), x["uniform"]).logprobs.requires_grad


def test_opcheck():
    x = sample((3, 4), 50)
    op = torch.ops.rlhf_fast.sample_tokens
    for args in (
        (x["logits"], x["uniform"], None, None, None, 1.0, 0.0),
        (x["logits"], x["uniform"], torch.rand(3, 4) > 0.5, torch.ones(3, 4), torch.tensor([3]), 1.0, 5.0),
        (x["logits"], None, None, None, None, 0.0, 0.0),
    ):
        opcheck(op, args)
    assert "cpp" in {b.name for b in _op.OPS["sample_tokens"].backends}


X = sample((3,), 10)
U = X["uniform"]


@pytest.mark.parametrize(
    ("kind", "message", "change"),
    [
        (TypeError, "'logits' got torch.int64", {"logits": torch.zeros(3, 10, dtype=torch.int64)}),
        (ValueError, "'logits' got shape", {"logits": torch.zeros(3, 0)}),
        (ValueError, "'uniform' got shape", {"uniform": U[:2]}),
        (TypeError, "'uniform' got torch.float32", {"uniform": U.float()}),
        (TypeError, "'uniform' got None", {"uniform": None}),
        (ValueError, "'uniform' got 1.0 at row 1, expected a number in", {"uniform": torch.tensor([0.0, 1.0, 0.0]).double()}),
        (ValueError, "'uniform' got nan at row 2", {"uniform": torch.tensor([0.0, 0.5, torch.nan]).double()}),
        (ValueError, "'temperature' got -1", {"temperature": -1.0}),
        (ValueError, "'temperature' got -2.0 at row 0", {"temperature": torch.tensor([-2.0, 1.0, 1.0])}),
        (ValueError, "'temperature' got shape", {"temperature": torch.ones(2)}),
        (ValueError, "'softcap' got 0", {"softcap": 0.0}),
        (ValueError, "'banned_ids' got .10.", {"banned_ids": torch.tensor([10])}),
        (ValueError, "'banned_ids' got shape", {"banned_ids": torch.zeros(1, 1, dtype=torch.int64)}),
        (ValueError, "'mask' got shape", {"mask": torch.ones(2, dtype=torch.bool)}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_wrong_arguments_are_named(kind, message, change, backend):
    with rlhf_fast.use_backend(backend), pytest.raises(kind, match=f"sample_tokens: argument {message}"):
        sample_tokens(**{**X, **change})
