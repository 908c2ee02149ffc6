from __future__ import annotations

import pytest
import tolerances
import torch

from rlhf_fast import advantages, gae, ppo_loss
from rlhf_fast.dialects import DIALECTS

# What the public loops gave on the inputs of tests/ops/test_advantages.py (gamma 1, lambda 0.95, before whitening; the other rows are
# there). ROLL's scan has no mask: the critic's outputs on gaps and pads, chosen here to give the published figures, leak in.
LEAK = [0.9, -0.4147]


@pytest.mark.parametrize(
    ("values", "mask", "score", "expected"),
    [
        (
            [0.0925, 0.1925, 0.3075, 0.41, 0.5, *LEAK],
            [1, 1, 1, 1, 1, 0, 0],
            1.0,
            [0.7841, 0.7254, 0.6478, 0.5793, 0.5203],
        ),
        ([0.085, 0.185, 0.3495, 0.3495, 0.5, *LEAK], [1, 1, 0, 0, 1, 1, 0], 0.97, [0.7315, 0.6700, 0.4370, 0.0443]),
    ],
)
def test_the_measured_example_of_roll(values, mask, score, expected):
    values, mask = torch.tensor([values]), torch.tensor([mask]) == 1
    cost = torch.full_like(values, 0.05)  # k1 of .05 nats a token at coefficient .1
    settings = {"logprobs": cost, "ref_logprobs": 0 * cost, "kl_coef": 0.1, "gamma": 1.0, "lam": 0.95, "whiten": False}
    found = advantages(torch.tensor([score]), values, mask, **settings, dialect="roll")
    torch.testing.assert_close(found.advantages[mask], torch.tensor(expected), rtol=0.0, atol=tolerances.WORKED4)
    assert not found.advantages[~mask].any() and not found.returns[~mask].any()
    own = advantages(torch.tensor([score]), values.where(mask, torch.nan), mask, **settings)
    assert own.advantages.isfinite().all() and not torch.allclose(
        own.advantages[mask], found.advantages[mask], atol=1e-3
    )


def plain_loop(rewards, values, gamma, lam):
    """slime/utils/ppo_utils.py vanilla_gae and roll/utils/functionals.py compute_gae_advantage_return, written again: every slot is
    real."""
    running, found = 0.0, []
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        found.append(running)
    return torch.stack(found[::-1], dim=1)


def areal_loop(rewards, values, mask, after, gamma, lam):
    """areal/trainer/ppo/actor.py, written again: tokens outside of the loss mask are skipped, and so are their values; after (B,) is
    the value of the state after the window."""
    running, following, found = 0.0, after, []
    for t in reversed(range(values.shape[1])):
        real = mask[:, t].float()
        step = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        following = following * (1 - real) + values[:, t] * real
        running = running * (1 - real) + step * real
        found.append(running)
    return torch.stack(found[::-1], dim=1)


def whitened(x, mask):
    """slime's distributed_masked_whiten and ROLL's masked_whiten on one process."""
    real = x[mask]
    return (x - real.mean()) * torch.rsqrt(real.var() + 1e-8)


def areal_normalised(x, mask, eps=1e-5):
    """Normalization of areal/utils/data.py with its defaults, on one process: in fp64, eps outside of the root."""
    real = x.double()[mask]
    return ((x.double() - real.mean()) / (real.std() + eps)).float()


@pytest.mark.parametrize("dialect", ["slime", "areal", "areal_mask_no_eos_with_zero", "roll", "roll_dual_clip_loss"])
def test_kl_scores_scan_and_whitening_against_the_loops(dialect):
    g = torch.Generator().manual_seed(3)
    values, new, ref = (torch.randn(4, 9, generator=g) for _ in range(3))
    new[0, :2], ref[0, :2] = torch.tensor([20.0, -4.0]), torch.tensor([-20.0, 4.0])  # beyond the bounds of k1 and k3
    mask = torch.ones(4, 9, dtype=torch.bool)
    scores = torch.tensor([30.0, -1.0, 2.0, -25.0])
    areal, roll = dialect.startswith("areal"), dialect.startswith("roll")
    truncated, after = torch.tensor([False, True, False, True]), torch.randn(4, generator=g)
    if not dialect.startswith("slime"):
        mask[1, 3:5], mask[0, 6:], mask[2, 8:] = False, False, False  # a gap and two ends
    extra = {"bootstrap": after, "truncated": truncated} if areal else {}
    for kind in ("k1", "k2", "k3"):
        d = new - ref
        kl = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[kind]
        if areal or (roll and kind == "k3"):
            kl = kl.clamp(-10, 10)
        rewards = torch.where(mask, -0.1 * kl, 0.0)
        last = (torch.arange(9) * mask).amax(1)
        placed = scores.clamp(-20, 20) if areal else scores
        if dialect == "areal_mask_no_eos_with_zero":
            placed = torch.where(truncated, 0.0, placed)
        rewards[torch.arange(4), last] += placed
        expected = (
            areal_loop(rewards, values, mask, after * truncated, 0.97, 0.9)
            if areal
            else plain_loop(rewards, values, 0.97, 0.9)
        )
        for whiten in (False, True):
            found = advantages(
                scores, values, mask, logprobs=new, ref_logprobs=ref, kl_coef=0.1, kl_kind=kind, gamma=0.97, lam=0.9,
                whiten=whiten, dialect=dialect, **extra,
            )  # fmt: skip
            wanted = (areal_normalised if areal else whitened)(expected, mask) if whiten else expected
            torch.testing.assert_close(
                found.advantages[mask], wanted[mask], rtol=1e-6, atol=1e-6 * expected.abs().max()
            )
            torch.testing.assert_close(
                found.returns[mask], (expected + values)[mask], rtol=1e-6, atol=1e-6 * expected.abs().max()
            )
            assert not found.advantages[~mask].any() and not found.returns[~mask].any()


def test_areals_eps_stands_outside_of_the_root():
    """Nearly equal advantages, where it decides: sigma 1e-5, so that AReaL's are half of ours."""
    scores, values = torch.tensor([1.0, 1.0 + 2e-5, 1.0, 1.0 + 2e-5]), torch.zeros(4, 1)
    mask = torch.ones(4, 1, dtype=torch.bool)
    ours, theirs = (advantages(scores, values, mask, dialect=name).advantages for name in ("rlhf_fast", "areal"))
    torch.testing.assert_close(theirs, areal_normalised(scores[:, None], mask), rtol=1e-6, atol=0.0)
    sigma = scores.double().std().item()
    ratio = (sigma**2 + 1e-8) ** 0.5 / (sigma + 1e-5)
    torch.testing.assert_close(theirs / ours, torch.full_like(ours, ratio), rtol=1e-5, atol=0.0)
    equal = torch.ones(4, requires_grad=True)  # no deviation: nothing, and no NaN on the way back
    found = advantages(equal, values, mask, dialect="areal").advantages
    assert not found.any() and torch.autograd.grad(found.sum(), equal)[0].isfinite().all()


def test_a_truncated_sequence_takes_its_bootstrap_and_the_others_do_not():
    values, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    scores, after = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, torch.nan, 0.25])  # what is not taken is not read
    truncated = torch.tensor([True, False, True])
    for dialect in DIALECTS:
        found = advantages(scores, values, mask, bootstrap=after, truncated=truncated, dialect=dialect, whiten=False)
        kept = scores * ~truncated if DIALECTS[dialect].drop_truncated else scores
        expected = advantages(
            kept, values, mask, bootstrap=torch.tensor([0.5, 0.0, 0.25]), dialect=dialect, whiten=False
        )
        assert all(map(torch.equal, found, expected)), dialect
    leaf = after.nan_to_num(1.0).requires_grad_()
    out = advantages(scores, values, mask, bootstrap=leaf, truncated=truncated, whiten=False)
    assert torch.autograd.grad(out.returns.sum(), leaf)[0].ne(0).tolist() == truncated.tolist()
    with pytest.raises(ValueError, match=r"advantages: argument 'truncated' got shape \(2,\), expected \(3,\)"):
        advantages(scores, values, mask, truncated=truncated[:2])
    with pytest.raises(TypeError, match=r"'truncated' got torch\.float32"):
        advantages(scores, values, mask, truncated=after)


@pytest.mark.parametrize("packed", [False, True])
def test_a_scan_without_a_mask_is_gae_over_every_slot(packed):
    g = torch.Generator().manual_seed(5)
    rewards, values = torch.randn(3, 8, generator=g), torch.randn(3, 8, generator=g)
    mask, after = torch.rand(3, 8, generator=g) > 0.4, torch.randn(3, generator=g)
    kwargs = {"gamma": 0.9, "lam": 0.8, "bootstrap": after}
    if packed:
        rewards, values, mask = rewards.flatten(), values.flatten(), mask.flatten()
        kwargs["cu_seqlens"] = torch.tensor([0, 8, 16, 24])
    found = gae(rewards.where(mask, torch.nan), values, mask, gap="read", **kwargs)
    expected = gae(rewards.where(mask, 0.0), values, **kwargs)
    assert all(torch.equal(a, b.where(mask, 0.0)) for a, b in zip(found, expected, strict=True))
    assert all(map(torch.equal, gae(rewards, values, gap="read", **kwargs), gae(rewards, values, **kwargs)))
    for dialect in ("openrlhf", "trl", "areal"):  # the other rules stay those of the dialect
        scores = torch.tensor([1.0, -2.0, 3.0])
        some = {k: v for k, v in kwargs.items() if k != "bootstrap"}
        got = advantages(scores, values, mask, gap="read", dialect=dialect, **some)
        shaped = advantages(scores, values, mask, dialect=dialect, whiten=False, **some).rewards
        raw, _ = gae(shaped, values, **some)
        real = raw[mask].double()
        rules = DIALECTS[dialect]
        scale = {
            "openrlhf": real.var(unbiased=False).clamp(min=1e-8).sqrt(),
            "trl": (real.var() + 1e-8).sqrt(),
            "areal": real.std() + 1e-5,
        }[dialect]
        torch.testing.assert_close(got.advantages[mask], ((real - real.mean()) / scale).float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(got.rewards, shaped) and not got.advantages[~mask].any(), rules


def test_slimes_value_loss_lacks_the_half():
    x = {k: torch.randn(3, 5) for k in ("logprobs", "old_logprobs", "advantages", "old_values", "returns")}
    x["mask"] = torch.rand(3, 5) > 0.3
    grads, losses = [], []
    for dialect in ("rlhf_fast", "slime"):
        values = (x["old_values"] + 0.5).requires_grad_()
        found = ppo_loss(
            **{k: v * 0 if k in ("logprobs", "old_logprobs", "advantages") else v for k, v in x.items()},
            values=values,
            value_coef=1.0,
            dialect=dialect,
        )
        losses.append(found.loss.detach())
        grads.append(torch.autograd.grad(found.loss, values)[0])
        torch.testing.assert_close(found.stats["value_loss"], losses[0])
    moved = x["old_values"] + 0.2  # clipped
    squares = torch.maximum((moved - x["returns"]) ** 2, (x["old_values"] + 0.5 - x["returns"]) ** 2)
    torch.testing.assert_close(losses[1], squares[x["mask"]].mean())
    torch.testing.assert_close(grads[1], 2 * grads[0])


@pytest.mark.parametrize("low", [0.1, 0.25])
@pytest.mark.parametrize("dialect", ["roll", "roll_dual_clip_loss"])
def test_rolls_bound_of_the_dual_clip_follows_its_clip(dialect, low):
    """roll/pipeline/base_worker.py loss_func, written again."""
    g = torch.Generator().manual_seed(7)
    new, old, A = (torch.randn(6, 9, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(6, 9, generator=g) > 0.2
    leaf = new.clone().requires_grad_()
    ratio = (leaf - old).exp()
    loss = -torch.min(ratio * A, ratio.clamp(1 - low, 1 + low) * A)
    if dialect == "roll_dual_clip_loss":
        loss = torch.where(A < 0, -torch.max(-loss, (1 + low * 2) * A), loss)
    expected = loss[mask].mean()
    (slope,) = torch.autograd.grad(expected, leaf)
    found = ppo_loss(leaf, old, A, mask, clip=low, dialect=dialect)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaf)[0], slope)
    assert (found.loss == ppo_loss(new, old, A, mask, clip=low, dialect="trl").loss) == (dialect == "roll")


def test_a_bound_that_follows_the_clip_needs_one_clip():
    x = torch.zeros(1, 1)
    real = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"ppo_loss: argument 'clip' got \(0.2, 0.28\), expected one number: .* 1 \+ 2 clip"
    ):
        ppo_loss(x, x, x, real, clip=(0.2, 0.28), dialect="roll_dual_clip_loss")
    far = x + 3.0
    assert ppo_loss(far, x, x - 1, real, clip=(0.2, 0.28), dual_clip=1.5, dialect="roll_dual_clip_loss").loss == 1.5


@pytest.mark.parametrize("dialect", ["slime", "areal", "roll", "nemo", "trl"])
def test_the_ratio_is_bounded_where_the_framework_bounds_it(dialect):
    """verl, OpenRLHF and our default clamp the log-ratio to +-20, the others do not."""
    new, old, mask = torch.tensor([[-21.0, 0.5]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    ratios = {name: ppo_loss(new, old, old + 1, mask, dialect=name).stats["ratio_min"] for name in (dialect, "verl")}
    logs = torch.stack([ratios[dialect].log(), ratios["verl"].log()])
    torch.testing.assert_close(logs, torch.tensor([-21.0, -20.0]))


def test_our_own_default_is_the_corrected_form():
    """No leak from padding, gaps skipped, the score on the last real token, an unbiased variance, zeros where masked."""
    rules = DIALECTS["rlhf_fast"]
    assert (rules.gap, rules.score_slot, rules.unbiased, rules.value_scale) == ("carry", "last", True, 1.0)
    values, mask = torch.randn(1, 7), torch.tensor([[True] * 5 + [False] * 2])
    junk = values.where(mask, torch.nan)
    clean, dirty = (advantages(torch.ones(1), v, mask, dialect="rlhf_fast", whiten=False) for v in (values, junk))
    assert torch.equal(clean.advantages, dirty.advantages) and clean.advantages[~mask].abs().max() == 0
    expected, _ = gae(torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]), values[:, :5])
    torch.testing.assert_close(clean.advantages[:, :5], expected)
