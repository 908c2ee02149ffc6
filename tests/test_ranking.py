from __future__ import annotations

import math
from itertools import pairwise

import pytest
import tolerances
import torch

from rlhf_fast import kto_loss, plackett_luce_loss, preference_loss, reward_loss, with_length_covariate


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def answers(n=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    draw = lambda k: (-9 * torch.rand(k, generator=g, dtype=torch.float64)).to(dtype)
    good = torch.tensor([True, False, True, True, False, True, False])[:n]
    return draw(n), draw(n), good, draw(4) + 5


def test_worked_values_of_kto():
    # r = 1, -1, 2; z0 = .5; beta .1
    x, ref = torch.tensor([-10.0, -12.0, -9.0]).double(), torch.full((3,), -11.0).double()
    good, kl = torch.tensor([True, False, True]), torch.tensor([0.75, 0.25]).double()
    out = kto_loss(x, ref, good, kl_logratios=kl)
    terms = [sigmoid(-0.05), sigmoid(-0.15), sigmoid(-0.15)]
    assert out.loss.item() == pytest.approx(sum(terms) / 3)
    assert out.stats.floats() == pytest.approx(
        {"kl": 0.5, "desirable_reward": 0.15, "undesirable_reward": -0.1, "desirable": 2.0, "undesirable": 1.0}
    )
    weighted = kto_loss(x, ref, good, kl_logratios=kl, desirable_weight=0.5, undesirable_weight=2.0).loss
    assert weighted.item() == pytest.approx((0.5 * terms[0] + 2 * terms[1] + 0.5 * terms[2]) / 3)
    assert kto_loss(x, ref, good, kl_logratios=-kl).stats["kl"] == 0


def test_kto_on_pairs_is_the_kind_of_preference_loss():
    x, ref, _, kl = answers(6)
    good = torch.arange(6) < 3
    options = {"kl_logratios": kl, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    pairs = preference_loss(x[:3], x[3:], ref[:3], ref[3:], kind="kto", **options)
    torch.testing.assert_close(pairs.loss, 2 * kto_loss(x, ref, good, **options).loss)


def test_kto_masks_splits_and_gradients():
    x, ref, good, kl = answers()
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    run = lambda rows, normalizer=None: kto_loss(
        x[rows], ref[rows], good[rows], kl_logratios=kl, mask=mask[rows], normalizer=normalizer
    )
    whole = run(slice(0, 7))
    dirty = x.where(mask, float("nan")).requires_grad_()
    got = kto_loss(dirty, ref.where(mask, float("nan")), good, kl_logratios=kl, mask=mask)
    assert torch.equal(got.loss.detach(), whole.loss) and torch.equal(got.stats.tensor, whole.stats.tensor)
    got.loss.backward()
    assert dirty.grad.isfinite().all() and not dirty.grad[~mask].any()
    for cuts in ((0, 2, 7), (0, 1, 2, 3, 4, 5, 6, 7)):
        parts = [run(slice(i, j), mask.sum()).loss for i, j in pairwise(cuts)]
        torch.testing.assert_close(sum(parts), whole.loss)
    call = lambda y: kto_loss(y, ref, good, kl_logratios=kl, mask=mask).loss
    assert torch.autograd.gradcheck(call, x.clone().requires_grad_(), **tolerances.GRADCHECK)
    for side in (good, ~good):  # one label alone
        assert kto_loss(x[side], ref[side], good[side], kl_logratios=kl).loss.isfinite()
    assert run(slice(0, 0)).loss == 0
    sure = torch.tensor([-1e-8, -1e4, -1e4, -1e-8], requires_grad=True)
    extreme = kto_loss(sure, torch.full((4,), -500.0), torch.arange(4) < 2, kl_logratios=torch.tensor([1e4])).loss
    extreme.backward()
    assert extreme.isfinite() and sure.grad.isfinite().all()


def test_worked_values_of_plackett_luce():
    s = torch.tensor([[2.0, 1.0, 0.0]]).double()
    first = math.log(1 + math.exp(-1) + math.exp(-2))
    out = plackett_luce_loss(s)
    assert out.loss.item() == pytest.approx(first + math.log(1 + math.exp(-1)))
    assert out.stats.floats() == {"accuracy": 1.0, "lists": 1.0}
    assert plackett_luce_loss(s.flip(1)).stats["accuracy"] == 0
    assert plackett_luce_loss(torch.zeros(1, 4)).loss.item() == pytest.approx(math.log(24))  # any of 4! rankings
    assert plackett_luce_loss(torch.zeros(1, 4)).stats["accuracy"] == 0.5


def test_two_answers_are_bradley_terry():
    g = torch.Generator().manual_seed(0)
    s = torch.randn(9, 2, generator=g, dtype=torch.float64)
    torch.testing.assert_close(plackett_luce_loss(s).loss, reward_loss(s[:, 0], s[:, 1]).loss)
    w, l, rw, rl = -9 * torch.rand(4, 9, generator=g, dtype=torch.float64)
    rewards = 0.1 * torch.stack([w - rw, l - rl], 1)
    torch.testing.assert_close(plackett_luce_loss(rewards).loss, preference_loss(w, l, rw, rl).loss)


def test_plackett_luce_masks_splits_and_gradients():
    g = torch.Generator().manual_seed(2)
    s = torch.randn(5, 4, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    whole = plackett_luce_loss(s, mask)
    lists = [row[m] for row, m in zip(s, mask, strict=True) if m.sum() > 1]
    alone = torch.stack([plackett_luce_loss(x[None]).loss for x in lists])
    torch.testing.assert_close(whole.loss, alone.mean())  # a single answer says nothing and does not count
    assert whole.stats["lists"] == 3
    dirty = s.where(mask, float("nan")).requires_grad_()
    got = plackett_luce_loss(dirty, mask)
    assert torch.equal(got.loss.detach(), whole.loss) and torch.equal(got.stats.tensor, whole.stats.tensor)
    got.loss.backward()
    assert dirty.grad.isfinite().all() and not dirty.grad[~mask].any()
    for cuts in ((0, 2, 5), (0, 1, 2, 3, 4, 5)):
        parts = [plackett_luce_loss(s[i:j], mask[i:j], normalizer=3.0).loss for i, j in pairwise(cuts)]
        torch.testing.assert_close(sum(parts), whole.loss)
    call = lambda x: plackett_luce_loss(x, mask).loss
    assert torch.autograd.gradcheck(call, s.clone().requires_grad_(), **tolerances.GRADCHECK)
    torch.testing.assert_close(plackett_luce_loss(s + 100, mask).loss, whole.loss)
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    loss = plackett_luce_loss(extreme).loss
    loss.backward()
    assert loss.isfinite() and extreme.grad.isfinite().all()
    assert plackett_luce_loss(s[:0]).loss == 0 and plackett_luce_loss(s[:, :0]).loss == 0
    assert plackett_luce_loss(s[:, :1]).loss == 0


def test_a_length_covariate_explains_its_share_of_the_logit():
    w, l = torch.tensor([1.2, 0.3]).double(), torch.tensor([0.4, 0.5]).double()
    nw, nl = torch.tensor([50, 10]), torch.tensor([30, 30])
    coef = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    chosen, rejected = with_length_covariate(w, l, nw, nl, coef, scale=40.0)
    torch.testing.assert_close(chosen - rejected, w - l + 0.7 * torch.tanh(torch.tensor([0.5, -0.5]).double()))
    torch.testing.assert_close(chosen + rejected, w + l)  # centring sees nothing of it
    reward_loss(chosen, rejected, center_coef=0.1).loss.backward()
    call = lambda c, x: reward_loss(*with_length_covariate(x, l, nw, nl, c, scale=40.0), center_coef=0.1).loss
    assert torch.autograd.gradcheck(call, (coef, w.clone().requires_grad_()), **tolerances.GRADCHECK)
    same = with_length_covariate(w, l, nw, nw, 0.7)
    assert torch.equal(same[0], w) and torch.equal(same[1], l)
    assert all(x.isfinite().all() for x in with_length_covariate(w, l, nw * 10**12, nl, 1e4, scale=1e-6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kto_loss(torch.zeros(2, 2), None, None, kl_logratios=None), r"kto_loss: argument 'logprobs' got shape \(2, 2\)"),
        (lambda: kto_loss(torch.zeros(2), torch.zeros(3), None, kl_logratios=None), "'ref_logprobs' got shape"),
        (lambda: kto_loss(*torch.zeros(3, 2), kl_logratios=None), "'desirable' got torch.float32"),
        (lambda: kto_loss(*torch.zeros(2, 2), torch.ones(2).bool(), kl_logratios=None), "'kl_logratios' got NoneType"),
        (lambda: kto_loss(*torch.zeros(2, 2), torch.ones(2).bool(), kl_logratios=torch.zeros(())), "'kl_logratios' got shape"),
        (lambda: kto_loss(*torch.zeros(2, 2), torch.ones(2).bool(), kl_logratios=torch.zeros(1), beta=0), "'beta' got 0"),
        (lambda: plackett_luce_loss(torch.zeros(2)), r"plackett_luce_loss: argument 'scores' got shape \(2,\)"),
        (lambda: plackett_luce_loss(torch.zeros(2, 2), torch.ones(2, 2)), "'mask' got torch.float32"),
        (lambda: plackett_luce_loss(torch.zeros(2, 2), normalizer=-1.0), "'normalizer' got -1.0"),
        (lambda: with_length_covariate(*torch.zeros(3, 2), torch.ones(2).long(), 1.0), "'chosen_lengths' got torch.float32"),
        (
            lambda: with_length_covariate(*torch.zeros(2, 2), *torch.ones(2, 2).long(), 1.0, scale=0.0),
            "with_length_covariate: argument 'scale' got 0.0",
        ),
        (lambda: with_length_covariate(*torch.zeros(2, 2), *torch.ones(2, 2).long(), torch.zeros(2)), "'coef' got shape"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
