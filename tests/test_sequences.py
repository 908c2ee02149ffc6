from __future__ import annotations

import pytest
import tolerances
import torch

from rlhf_fast import batch, linear_token_logprobs, preference_loss, sequence_logprobs, token_logprobs


def sample(B=6, T=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    mask &= torch.rand(B, T, generator=g) > 0.2
    mask[1] = False
    return -torch.rand(B, T, generator=g, dtype=torch.float64), mask


def test_sums_means_and_lengths():
    x, mask = sample()
    got = sequence_logprobs(x, mask)
    assert got.lengths.tolist() == mask.sum(1).tolist() and got.logprobs[1] == 0
    for i in range(6):
        assert got.logprobs[i].item() == pytest.approx(x[i][mask[i]].sum().item())
    mean = sequence_logprobs(x, mask, average=True)
    torch.testing.assert_close(mean.logprobs * got.lengths, got.logprobs)
    assert mean.logprobs[1] == 0 and sequence_logprobs(x).lengths.tolist() == [9] * 6


def test_worked_values_of_the_tail_weight():
    # The tail counts real tokens, not slots: the third real token of the first row is at slot 3.
    x = torch.tensor([[1.0, 2.0, 9.0, 3.0, 4.0], [5.0, 6.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    common = torch.tensor([2, 2])
    assert sequence_logprobs(x, mask, common_lengths=common, tail_weight=0.5).logprobs.tolist() == [6.5, 11.0]
    assert sequence_logprobs(x, mask, common_lengths=common, tail_weight=0.0).logprobs.tolist() == [3.0, 11.0]
    assert sequence_logprobs(x, mask, common_lengths=common).logprobs.tolist() == [10.0, 11.0]


@pytest.mark.parametrize("options", [{}, {"average": True}, {"tail_weight": 0.3}], ids=str)
def test_packed_equals_padded_and_masked_tokens_are_never_read(options):
    x, mask = sample()
    if "tail_weight" in options:
        options = {**options, "common_lengths": torch.tensor([2, 0, 1, 3, 0, 9])}
    padded = sequence_logprobs(x, mask, **options)
    inside = torch.ones_like(mask)
    inside[:, 7:] = False  # slots that no mask has to hide once they are packed away
    mask = mask & inside
    padded = sequence_logprobs(x, mask, **options)
    packed, cu_seqlens = batch.pack(x.where(mask, float("nan")), inside)
    got = sequence_logprobs(packed, mask[inside], cu_seqlens=cu_seqlens, **options)
    torch.testing.assert_close(got.logprobs, padded.logprobs)
    assert torch.equal(got.lengths, padded.lengths)
    dirty = x.where(mask, float("nan")).requires_grad_()
    out = sequence_logprobs(dirty, mask, **options)
    assert torch.equal(out.logprobs.detach(), padded.logprobs)
    out.logprobs.sum().backward()
    assert dirty.grad.isfinite().all() and not dirty.grad[~mask].any()


def test_a_row_has_the_same_bits_in_any_batch_and_layout():
    x, mask = -torch.rand(5, 700, generator=torch.Generator().manual_seed(0)), torch.ones(5, 700, dtype=torch.bool)
    x, mask = torch.nn.functional.pad(x, (0, 61)), torch.nn.functional.pad(mask, (0, 61))
    got = sequence_logprobs(x, mask).logprobs
    packed, cu_seqlens = batch.pack(x, mask)
    assert torch.equal(sequence_logprobs(packed, cu_seqlens=cu_seqlens).logprobs, got)
    for i in range(5):
        assert torch.equal(sequence_logprobs(x[i : i + 1, :700]).logprobs[0], got[i])
    torch.testing.assert_close(got.double(), x.double().sum(1), atol=0, rtol=2.0**-24)


def test_empty_inputs():
    assert sequence_logprobs(torch.zeros(0, 4)).logprobs.shape == (0,)
    assert sequence_logprobs(torch.zeros(3, 0)).logprobs.tolist() == [0.0] * 3
    nothing = sequence_logprobs(torch.zeros(0), cu_seqlens=torch.tensor([0]))
    assert nothing.logprobs.shape == nothing.lengths.shape == (0,)
    assert sequence_logprobs(torch.zeros(0), cu_seqlens=torch.tensor([0, 0, 0])).logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    x, mask = sample(3, 4)
    common = torch.tensor([1, 0, 2])
    options = {"common_lengths": common, "tail_weight": 0.3, "average": True}
    if packed:
        x, mask, options["cu_seqlens"] = x.reshape(-1), mask.reshape(-1), torch.tensor([0, 4, 8, 12])
    call = lambda y: sequence_logprobs(y, mask, **options).logprobs
    assert torch.autograd.gradcheck(call, x.requires_grad_(), **tolerances.GRADCHECK)


@pytest.mark.parametrize("kind", ["dpo", "sigmoid_norm", "ld-dpo"])
def test_dpo_from_logits_from_hidden_states_and_from_log_probs_agree(kind):
    """Chosen answers first, then rejected ones, in one batch; the reference too."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    B, T, H, V = 4, 7, 5, 11
    hidden, ref_hidden, weight = draw(2 * B, T, H), draw(2 * B, T, H), draw(V, H)
    ids = torch.randint(0, V, (2 * B, T), generator=g)
    mask = torch.rand(2 * B, T, generator=g) > 0.3

    def loss(policy, reference):
        lengths = mask.sum(1)
        options = {}
        if kind == "ld-dpo":
            options = {"common_lengths": torch.minimum(*lengths.chunk(2)).repeat(2), "tail_weight": 0.4}
        policy, reference = (sequence_logprobs(x, mask, **options).logprobs.chunk(2) for x in (policy, reference))
        if kind == "sigmoid_norm":
            extra = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
            return preference_loss(*policy, *reference, kind=kind, **extra).loss
        return preference_loss(*policy, *reference).loss

    def from_hidden(h):
        reference = linear_token_logprobs(ref_hidden, weight, ids, mask=mask).logprobs
        return loss(linear_token_logprobs(h, weight, ids, mask=mask).logprobs, reference)

    def from_logits(h):
        reference = token_logprobs(ref_hidden @ weight.T, ids, mask=mask).logprobs
        return loss(token_logprobs(h @ weight.T, ids, mask=mask).logprobs, reference)

    def from_logprobs(h):
        plain = lambda y: torch.log_softmax(y @ weight.T, -1).gather(-1, ids[..., None])[..., 0]
        return loss(plain(h), plain(ref_hidden))

    results = []
    for path in (from_hidden, from_logits, from_logprobs):
        leaf = hidden.clone().requires_grad_()
        out = path(leaf)
        results.append((out.detach(), torch.autograd.grad(out, leaf)[0]))
    for value, grad in results[1:]:
        torch.testing.assert_close(value, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


def test_length_desensitised_dpo_does_not_see_the_tail_at_weight_zero():
    x, _ = sample(2, 9)
    mask = torch.arange(9) < torch.tensor([[5], [8]])
    common = torch.tensor([5, 5])
    cut = sequence_logprobs(x, mask, common_lengths=common, tail_weight=0.0).logprobs
    torch.testing.assert_close(cut, x[:, :5].sum(1))
    whole = sequence_logprobs(x, mask, common_lengths=common, tail_weight=1.0).logprobs
    torch.testing.assert_close(whole, sequence_logprobs(x, mask).logprobs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(2, 3).long()}, "'logprobs' got torch.int64"),
        ({"logprobs": torch.zeros(3)}, r"'mask' got shape|'logprobs' got shape"),
        ({"mask": torch.zeros(2, 3)}, "'mask' got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"'logprobs' got shape \(2, 3\), expected \(N,\)"),
        ({"tail_weight": 1.5}, "'tail_weight' got 1.5"),
        ({"tail_weight": 0.5}, "'common_lengths' got None, expected a tensor with tail_weight=0.5"),
        ({"common_lengths": torch.ones(2)}, "'common_lengths' got torch.float32"),
        ({"common_lengths": torch.tensor([1])}, r"'common_lengths' got shape \(1,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kwargs = {"logprobs": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool), **change}
    with pytest.raises((ValueError, TypeError), match="sequence_logprobs: argument " + message):
        sequence_logprobs(**kwargs)
