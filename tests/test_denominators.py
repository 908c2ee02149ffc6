from __future__ import annotations

import pytest
import torch

from rlhf_fast import Denominators
from rlhf_fast.denominators import COUNTS, DIVISORS
from rlhf_fast.reference._reduce import spread, sums

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)


def counts(d):
    return dict(zip(COUNTS, d.counts.tolist(), strict=True))


def test_counts_of_a_padded_and_of_a_packed_batch():
    assert counts(Denominators.of(MASK)) == {"tokens": 5, "sequences": 2, "slots": 12, "sequence_slots": 8}
    assert counts(Denominators.of(MASK, horizon=10)) == {"tokens": 5, "sequences": 2, "slots": 30, "sequence_slots": 20}
    flat, cu_seqlens = torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool), torch.tensor([0, 2, 3, 7])
    assert counts(Denominators.of(flat, cu_seqlens, horizon=10)) == counts(Denominators.of(MASK, horizon=10))
    assert Denominators.of(MASK).counts.dtype is torch.int64
    assert Denominators.of(MASK.long()).counts.tolist() == Denominators.of(MASK).counts.tolist()


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0, 0)])
def test_batches_without_rows_or_columns(shape):
    d = Denominators.of(torch.zeros(shape, dtype=torch.bool), horizon=10)
    assert counts(d) == {"tokens": 0, "sequences": 0, "slots": 10 * shape[0], "sequence_slots": 0}
    assert sums(torch.zeros(shape), None).tolist() == [0.0] * shape[0]
    assert spread(torch.ones(shape[0]), torch.zeros(shape), None).shape == shape


def test_sums_of_parts_are_the_whole():
    whole = Denominators.of(MASK, horizon=10)
    parts = [Denominators.of(MASK[:1], horizon=10), Denominators.of(MASK[1:, :4], horizon=10)]
    assert torch.equal((parts[0] + parts[1]).counts, whole.counts) and torch.equal(sum(parts).counts, whole.counts)


def test_the_device_is_that_of_the_counts():
    assert Denominators.of(MASK).averaged(2).to("meta").normalizer("token-mean").device.type == "meta"


def test_normalizers():
    d = Denominators.of(MASK, horizon=10)
    expected = {
        "token-mean": 5, "token-sum": 1, "seq-mean-token-mean": 2, "seq-mean-token-sum": 2, "seq-mean-token-sum-norm": 20,
        "constant": 30,
    }  # fmt: skip
    assert set(expected) == set(DIVISORS)
    for reduction, value in expected.items():
        assert d.normalizer(reduction).item() == value and d.normalizer(reduction).dtype is torch.float64
        assert d.averaged(4).normalizer(reduction, torch.float32).item() == value / 4
    empty = Denominators.of(MASK[:0])
    assert all(empty.normalizer(r) == 0 for r in DIVISORS if r != "token-sum")


def test_slots_of_packed_sequences_are_not_guessed():
    flat = Denominators.of(torch.ones(5, dtype=torch.bool), torch.tensor([0, 2, 5]))
    assert flat.normalizer("token-mean") == 5 and flat.normalizer("seq-mean-token-sum") == 2
    for d in (flat, flat + Denominators.of(MASK), flat.averaged(2)):
        for reduction in ("constant", "seq-mean-token-sum-norm"):
            with pytest.raises(
                ValueError, match=rf"'reduction' got '{reduction}', expected one without slots, or .*horizon"
            ):
                d.normalizer(reduction)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Denominators.of(MASK.float()), "Denominators.of: argument 'mask' got torch.float32"),
        (lambda: Denominators.of(None), "'mask' got NoneType"),
        (lambda: Denominators.of(MASK[0]), r"'mask' got shape \(4,\), expected \(B, T\), or cu_seqlens"),
        (lambda: Denominators.of(MASK, torch.tensor([0, 12])), r"'mask' got shape \(3, 4\), expected \(N,\)"),
        (lambda: Denominators.of(MASK[0], torch.tensor([0, 3])), r"'cu_seqlens' got \[0, 3\]"),
        (lambda: Denominators.of(MASK, horizon=0), "'horizon' got 0"),
        (lambda: Denominators.of(MASK, horizon=2.5), "'horizon' got 2.5 of type float, expected a whole number"),
        (lambda: Denominators.of(MASK).averaged(0), "Denominators.averaged: argument 'parts' got 0"),
        (lambda: Denominators.of(MASK).normalizer("mean"), "'reduction' got 'mean', expected one of 'token-mean'"),
        (lambda: Denominators.of(MASK) + Denominators.of(MASK).averaged(2), "'parts' got 2, expected 1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
