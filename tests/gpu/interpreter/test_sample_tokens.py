from __future__ import annotations

import math

import pytest
import tolerances
import torch
from gpu.interpreter.per_token import ORDERS
from gpu.tools.on_cpu import on_cpu
from gpu.tools.sanitizer import Sanitizer
from parity import assert_parity
from rlhf_fast.kernels import sample_tokens as kernels

import rlhf_fast
from rlhf_fast.reference.sample_tokens import sample

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(logits, uniform=None, order="shuffle", **options):
    """(the tokens by the Triton kernels, with nothing found and nothing left unwritten; their launches)."""
    with Sanitizer(order=order, seed=1) as s, on_cpu("triton"):
        found = rlhf_fast.sample_tokens(logits, uniform, **options)
        assert not any(s.unwritten(x) for x in found)
    s.check()
    return found, s.launches


def equal(a, b):
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


def padded(x, front=3, gap=5):
    """x as a view of rows with NaN before, between and after them."""
    room = torch.full((*x.shape[:-1], front + x.shape[-1] + gap), NAN, dtype=x.dtype)
    room[..., front : front + x.shape[-1]] = x
    return room[..., front : front + x.shape[-1]]


def probabilities(logits, temperature=1.0, softcap=None, banned_ids=None):
    y = logits.double()
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    y = y if banned_ids is None else y.index_fill(-1, banned_ids, -INF)
    return (y / temperature).softmax(-1)


# One class; parts of 1024 and of 4096 classes, whole ones, with a rest, at odd addresses.
@pytest.mark.parametrize("vocab", [1, 2, 127, 1024, 1025, 4096, 4097, 50257, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(vocab, dtype):
    x = sample((5,) if vocab < 5000 else (2,), vocab, dtype=dtype)
    for options in ({}, {"temperature": 0.3, "softcap": 4.0}):
        got, launches = drawn(**x, **options)
        assert [launch.kernel for launch in launches] == ["_sum_parts", "_choose"]
        p = probabilities(x["logits"], **options)
        upto = p.cumsum(-1).gather(-1, got.token_ids[:, None])[:, 0]
        own = p.gather(-1, got.token_ids[:, None])[:, 0]
        slack = tolerances.FLOOR[torch.float32]  # a number on a border may fall on either side
        assert (own > 0).all() and (x["uniform"] <= upto + slack).all() and (x["uniform"] >= upto - own - slack).all()
        with rlhf_fast.use_backend("reference"):
            plain = rlhf_fast.sample_tokens(**x, **options)
            truth = rlhf_fast.sample_tokens(x["logits"].double(), x["uniform"], **options)
        assert_parity(got.entropy, truth.entropy, plain.entropy, "entropy", math.log(vocab) + 1)
        same = plain.token_ids == got.token_ids
        plain_logprobs = torch.where(same, plain.logprobs.double(), own.log())
        assert_parity(got.logprobs, own.log(), plain_logprobs, "logprobs")
        greedy, _ = drawn(x["logits"], temperature=0.0)
        assert torch.equal(greedy.token_ids, x["logits"].argmax(-1))


def test_equal_logits_cut_the_interval_evenly_to_the_last_class():
    vocab = 262_144
    u = torch.tensor([0.0, 1 - 2.0**-53, 0.3, 4095.5 / vocab, 4096 / vocab, 0.77], dtype=torch.float64)
    got, _ = drawn(torch.zeros(1, vocab).expand(6, vocab), u)
    assert torch.equal(got.token_ids, (u * vocab).floor().long())
    torch.testing.assert_close(got.logprobs, torch.full((6,), -math.log(vocab)))


def test_a_class_without_probability_is_never_taken():
    logits = torch.full((6, 9000), -INF)
    logits[:, 4000], logits[:, 8000] = 1.0, 1.0
    logits[:, 8500] = -200.0  # a probability of 0 in fp32, and the largest of its part
    u = torch.tensor([0.0, 0.49, 0.51, 1 - 2.0**-53, 0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert drawn(logits, u)[0].token_ids.tolist() == [4000, 4000, 8000, 8000, 4000, 8000]
    only, _ = drawn(logits, u, banned_ids=torch.tensor([4000]))
    assert only.token_ids.tolist() == [8000] * 6 and (only.logprobs == 0).all() and (only.entropy == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_banned_classes_leave_a_renormalised_distribution(softcap):
    logits = torch.randn(5, 2300, generator=torch.Generator().manual_seed(1))
    logits[:, 11] = 60.0
    u = torch.linspace(0.05, 0.95, 5, dtype=torch.float64)
    got, _ = drawn(logits, u, banned_ids=torch.tensor([11, 2299, 11]), softcap=softcap)
    expected, _ = drawn(torch.cat([logits[:, :11], logits[:, 12:2299]], -1), u, softcap=softcap)
    assert torch.equal(got.token_ids - (got.token_ids > 11).long(), expected.token_ids)
    torch.testing.assert_close(got[1:], expected[1:])
    assert equal(drawn(logits, u, banned_ids=torch.empty(0, dtype=torch.int64))[0], drawn(logits, u)[0])


def test_temperature_zero_takes_the_first_of_the_largest_with_the_log_prob_of_temperature_one():
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    logits[0, [700, 4100]], logits[1, 4999] = 9.0, 9.0
    got, _ = drawn(logits, temperature=0.0)
    assert got.token_ids[:2].tolist() == [700, 4999]
    u, temperature = torch.full((4,), 0.5, dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0, 0.0])
    per_row, _ = drawn(logits, u, temperature=temperature)
    assert all(torch.equal(a[[0, 1, 3]], b[[0, 1, 3]]) for a, b in zip(per_row, got, strict=True))
    assert drawn(logits, temperature=0, banned_ids=torch.tensor([700]))[0].token_ids[0] == 4100
    truth = rlhf_fast.token_logprobs(logits, got.token_ids)
    torch.testing.assert_close(got[1:], (truth.logprobs, truth.entropy))


@pytest.mark.parametrize("bad", [NAN, INF, None])
def test_a_row_without_a_distribution_gives_minus_one_in_that_row_alone(bad):
    x = sample((3,), 5000)
    logits = x["logits"].clone()
    if bad is None:
        logits[1] = -INF
    else:
        logits[1, 4500] = bad
    for options in ({}, {"temperature": 0.0}):
        got, clean = drawn(logits, x["uniform"], **options)[0], drawn(**x, **options)[0]
        assert got.token_ids[1] == -1 and got.logprobs[1].isnan() and got.entropy[1].isnan()
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(got, clean, strict=True))


def test_numbers_and_temperatures_out_of_range_give_minus_one_where_nobody_has_looked_at_them():
    """As on a device, where looking would stop the queue; a row that takes the most likely class needs no number."""
    x = sample((9,), 300)
    u = torch.tensor([0.5, 1.0, -1e-9, NAN, 0.5, 0.5, 0.5, 0.5, NAN], dtype=torch.float64)
    t = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, NAN, INF, 2.0, 0.0])
    with Sanitizer() as s:
        got = kernels.forward(x["logits"], u, None, t, None, 1.0, 0.0)
    s.check()
    assert (got[0] >= 0).tolist() == got[1].isfinite().tolist() == [i in (0, 7, 8) for i in range(9)]
    assert (got[0][1:7] == -1).all() and got[2][1:7].isnan().all()


def test_masked_rows_are_never_read_and_gaps_are_not_either():
    x = sample((4, 6), 1300)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    temperature = torch.linspace(0.5, 2.0, 24).view(4, 6)
    clean, _ = drawn(**x, temperature=temperature)
    poisoned = padded(x["logits"].masked_fill(~mask[..., None], NAN))
    u, t = x["uniform"].masked_fill(~mask, 7.0), temperature.masked_fill(~mask, NAN)
    with Sanitizer(order="shuffle", seed=2) as s, on_cpu("triton"):
        for hidden in (poisoned, u, t):
            s.hide(hidden, ~mask)
        got = rlhf_fast.sample_tokens(poisoned, u, temperature=t, mask=mask)
    s.check()
    assert all(torch.equal(a[mask], b[mask]) and not a[~mask].any() for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2003, 2048, 9001])
def test_a_row_has_the_same_bits_in_any_batch_at_any_stride_and_in_any_order_of_programs(vocab, dtype):
    x = sample((5,), vocab, dtype=dtype)
    whole, _ = drawn(**x, temperature=0.8)
    assert all(equal(drawn(**x, temperature=0.8, order=order)[0], whole) for order in ORDERS)
    moved = padded(x["logits"])
    assert equal(drawn(moved, x["uniform"], temperature=0.8)[0], whole)
    alone = [drawn(moved[i : i + 1], x["uniform"][i : i + 1], temperature=0.8)[0] for i in range(5)]
    assert equal([torch.cat(parts) for parts in zip(*alone, strict=True)], whole)
    per_row, _ = drawn(**x, temperature=torch.full((5,), 1.0))
    assert equal(per_row, drawn(**x)[0])


def test_samples_of_one_row_need_no_copies_of_it():
    x = sample((5,), 999)
    u = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shared, launches = drawn(x["logits"][:, None].expand(5, 4, 999), u)
    repeated, _ = drawn(x["logits"].repeat_interleave(4, 0), u.flatten())
    assert equal([a.flatten() for a in shared], repeated)
    assert launches[0].load_first == x["logits"].nbytes


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_and_logits(temperature):
    x = sample((4,), 3000, spread=1e4)
    got, _ = drawn(**x, temperature=temperature)
    assert got.logprobs.isfinite().all() and got.entropy.isfinite().all()
    if temperature < 1:
        assert torch.equal(got.token_ids, x["logits"].argmax(-1))


def test_every_logit_comes_from_memory_once_and_one_part_of_a_row_again():
    x = sample((3,), 10_000, dtype=torch.bfloat16)
    _, (parts, choice) = drawn(**x)
    sums = 3 * 3 * 3 * 4  # three rows of three parts of three numbers
    assert (parts.load_bytes, parts.store_bytes) == (x["logits"].nbytes, sums)
    assert choice.load_bytes <= sums + 3 * (2 * 4096 + 8) and choice.store_bytes == 3 * (8 + 4 + 4)


def test_doubles_are_declined():
    with on_cpu("triton"), pytest.raises(RuntimeError, match="fp64 is left to the reference"):
        rlhf_fast.sample_tokens(**sample((2,), 9, dtype=torch.float64))
