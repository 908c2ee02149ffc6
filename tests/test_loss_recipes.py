"""Every recipe of the table: worked values, gradients, masks. A row of RECIPES without a row of WORKED fails."""

from __future__ import annotations

from math import exp, log

import pytest
import tolerances
import torch
from loss_batches import LEAVES, OPTIONS, B, T, batch, run

from rlhf_fast.losses import ADVANTAGES, PLACEMENTS, RECIPES, Recipe, policy_loss, table
from rlhf_fast.surrogates import LEVELS, SURROGATES, Surrogate

RATIOS, ADVANTAGE = [[1.5, 0.5], [1.5]], [1.0, -1.0]
"""The worked batch: two answers, of two tokens and of one, every log-prob -1."""
FAR = 7.0
"""The other one: a single token with this ratio, advantage -1."""


def sigmoid(x):
    return 1 / (1 + exp(-x))


ROOT = 0.75**0.5  # geometric mean of the first answer
CUT = exp(0.2) * 0.5**0.5  # exp((0.4 + log 0.5) / 2): the first ratio is clipped to e^0.4
GATE = 1.05 * 0.5
GOOD, BAD = 0.75**2 * exp(3 * 0.25), 1.5**3 * exp(2 * -0.5)  # w^k exp(lambda (1 - w)) of the two answers
PPO = ((-1.2 - 0.5 + 1.5) / 3, [0.0, -0.5 / 3, 0.5], 7.0, 7.0)
SCORE = ((2 - 1) / 2, [-0.5, -0.5, 0.5], -1.0, 1.0)
GSPO = ((-ROOT + 1.5) / 2, [-ROOT / 4, -ROOT / 4, 0.75], 7.0, 7.0)
CISPO = ((1.5 + 0.5 - 1.5) / 3, [-0.5, -0.5 / 3, 0.5], -5.0, 5.0)

WORKED = {
    # recipe: (loss, gradient of the three log-probs, loss and gradient of the far token)
    "ppo": PPO,
    "ppo_dual_clip": (*PPO[:2], 3.0, 0.0),
    "clip_higher": ((-1.28 - 0.5 + 1.5) / 3, [0.0, -0.5 / 3, 0.5], 7.0, 7.0),
    "two_sided_clip": (*PPO[:2], 4.0, 0.0),
    "decoupled_ppo": ((-1.2 * 2 - 0.5 * 0.5 + 1.5) / 3, [0.0, -0.25 / 3, 0.5], 7.0, 7.0),  # weights 2, 1/2, 1
    "grpo": (((-1.2 - 0.5) / 2 + 1.5) / 2, [0.0, -0.125, 0.75], 7.0, 7.0),
    "dapo": ((-1.28 - 0.5 + 1.5) / 3, [0.0, -0.5 / 3, 0.5], 7.0, 7.0),
    "bnpo": PPO,
    "dr_grpo": ((-1.2 - 0.5 + 1.5) / 4, [0.0, -0.125, 0.375], 7.0, 7.0),  # two rows of two slots
    "lite_ppo": PPO,
    "gspo": GSPO,
    "gspo_token": GSPO,
    "luspo": ((-2 * ROOT + 1.5) / 2, [-ROOT / 2, -ROOT / 2, 0.75], 7.0, 7.0),
    "gmpo": ((-CUT + 1.5) / 2, [0.0, -CUT / 4, 0.75], 7.0, 7.0),
    "cispo": CISPO,
    "cispo_cap": CISPO,
    "sapo": (
        (-(4 * sigmoid(0.5) + 4 * sigmoid(-0.5)) / 2 + 4 / 1.05 * sigmoid(GATE)) / 2,
        [
            -sigmoid(0.5) * sigmoid(-0.5) * 1.5,
            -sigmoid(0.5) * sigmoid(-0.5) * 0.5,
            2 * sigmoid(GATE) * sigmoid(-GATE) * 1.5,
        ],
        4 / 1.05 * sigmoid(1.05 * 6),
        4 * sigmoid(1.05 * 6) * sigmoid(-1.05 * 6) * 7,
    ),
    "vespo": ((2 * GOOD - BAD) / 3, [-GOOD / 3, -GOOD / 3, BAD / 3], -(7**3) * exp(-12), 7**3 * exp(-12)),
    "clip_cov": ((-1.2 + 1.5) / 3, [0.0, 0.0, 0.5], 7.0, 7.0),  # the second token is selected
    "kl_cov": ((-1.5 - 0.5 + log(2) + 1.5) / 3, [-0.5, (-0.5 - 1) / 3, 0.5], 7.0, 7.0),
    "reinforce": SCORE,
    "reinforce++": PPO,
    "reinforce++_baseline": PPO,
    "rloo": ((-0.75 + 1.5) / 2, [-0.375, -0.375, 0.75], 7.0, 7.0),
    "remax": SCORE,
    "opo": SCORE,
    "gpg": ((2 - 1) / 3, [-1 / 3, -1 / 3, 1 / 3], -1.0, 1.0),
}


def test_every_recipe_has_worked_values_and_every_axis_a_recipe():
    assert set(WORKED) == set(RECIPES)
    assert {r.level for r in RECIPES.values()} == set(LEVELS)
    assert {r.surrogate for r in RECIPES.values()} == set(SURROGATES)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_worked_values(recipe, fused):
    loss, grad, far_loss, far_grad = WORKED[recipe]
    mask = torch.tensor([[True, True], [True, False]])
    ratios = torch.tensor([[*r, 1.0][:2] for r in RATIOS], dtype=torch.float64)
    logprobs = torch.full((2, 2), -1.0, dtype=torch.float64)
    tensors = {"logprobs": logprobs, "old_logprobs": logprobs - ratios.log(), "mask": mask}
    tensors["advantages"] = torch.tensor(ADVANTAGE, dtype=torch.float64)
    extra = {
        "rollout_logprobs": tensors["old_logprobs"] - torch.tensor([[2.0, 0.5], [1.0, 1.0]], dtype=torch.float64).log(),
        "selected": torch.tensor([[False, True], [False, False]]),
    }
    tensors |= {k: v for k, v in extra.items() if k in RECIPES[recipe].needs}
    got = run(recipe, tensors, fused=fused)
    assert got[0].item() == pytest.approx(loss, abs=1e-12)
    assert got[1]["logprobs"][mask].tolist() == pytest.approx(grad, abs=1e-12)
    one = {k: v[:1, :1] for k, v in tensors.items() if k != "advantages"}
    one |= {"old_logprobs": one["logprobs"] - log(FAR), "advantages": torch.tensor([-1.0], dtype=torch.float64)}
    one |= {"rollout_logprobs": one["old_logprobs"]} if "rollout_logprobs" in one else {}
    got = run(recipe, one, fused=fused)
    assert got[0].item() == pytest.approx(far_loss, abs=1e-12)
    assert got[1]["logprobs"].item() == pytest.approx(far_grad, abs=1e-12)


CONSTANT_RATIO = ("cispo", "cispo-cap", "vespo")
"""Surrogates whose ratio is a weight without gradient."""


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradcheck_of_every_recipe(recipe, fused):
    tensors = batch(recipe)
    start = tensors["logprobs"]
    shift = start - tensors["old_logprobs"]
    # Finite differences move old_logprobs along where the ratio is a constant to the gradient.
    frozen = RECIPES[recipe].surrogate in CONSTANT_RATIO

    def call(logprobs, entropy):
        old = (logprobs - shift).detach() if frozen else tensors["old_logprobs"]
        given = {**tensors, "logprobs": logprobs, "entropy": entropy, "old_logprobs": old}
        return policy_loss(recipe, **given, **OPTIONS, fused=fused).loss

    leaves = [tensors[k].requires_grad_() for k in LEAVES]
    assert torch.autograd.gradcheck(call, leaves, **tolerances.GRADCHECK)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_masked_tokens_change_no_bit(recipe, dtype, fused):
    tensors = batch(recipe, dtype)
    loss, grads, stats = run(recipe, tensors, **OPTIONS, fused=fused)
    mask = tensors["mask"]
    dirty = {k: v.where(mask, float("nan")) if v.is_floating_point() else v.clone() for k, v in tensors.items()}
    if "selected" in dirty:
        dirty["selected"][~mask] = True
    before = {k: v.clone() for k, v in dirty.items()}
    again = run(recipe, dirty, **OPTIONS, fused=fused)
    assert torch.equal(again[0], loss) and torch.equal(again[2].tensor, stats.tensor)
    for name, grad in grads.items():
        assert torch.equal(again[1][name], grad) and not grad[~mask].any() and grad.any(), name
    assert all(torch.equal(before[k].nan_to_num(7), dirty[k].nan_to_num(7)) for k in dirty)


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_masked_gives_zero_loss_and_zero_gradient(recipe):
    tensors = batch(recipe)
    tensors["mask"][:] = False
    loss, grads, stats = run(recipe, tensors, **OPTIONS)
    assert loss == 0 and not grads["logprobs"].any() and not grads["entropy"].any() and not stats.tensor.any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_rows_and_no_columns_give_zero(recipe):
    for shape in ((0, T), (B, 0)):
        tensors = {k: v[: shape[0], : shape[1]] for k, v in batch(recipe).items()}
        loss, _, stats = run(recipe, tensors, **OPTIONS)
        assert loss == 0 and stats["tokens"] == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_policy_equal_to_reference_recovers_the_loss_without_kl(recipe):
    tensors = batch(recipe)
    tensors["ref_logprobs"] = tensors["logprobs"].clone()
    bare = {k: v for k, v in tensors.items() if k != "ref_logprobs"}
    kl, zero, none = run(recipe, tensors, kl_coef=0.5, kl_kind="k3"), run(recipe, tensors), run(recipe, bare)
    assert torch.equal(kl[0], none[0]) and torch.equal(zero[0], none[0]) and kl[2]["kl"] == 0
    assert torch.equal(kl[1]["logprobs"], none[1]["logprobs"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_on_policy_every_recipe_has_the_reinforce_gradient(recipe):
    tensors = {k: v for k, v in batch(recipe).items() if k not in ("ref_logprobs", "entropy")}
    tensors["advantages"] = torch.randn(B, dtype=torch.float64)  # one per sequence: where all ratio levels agree
    mask, A = tensors["mask"], tensors["advantages"][:, None]
    lengths, real = mask.sum(1, keepdim=True).double(), mask.any(1).sum().double()
    weight = {
        "token-mean": 1 / mask.sum(),
        "seq-mean-token-mean": 1 / (lengths * real),
        "seq-mean-token-sum": 1 / real,
        "constant": torch.tensor(1 / (B * T)),
    }[RECIPES[recipe].reduction]
    expected = -A * weight
    if RECIPES[recipe].level == "product" and RECIPES[recipe].surrogate == "clip":
        expected = expected * lengths  # the ratio of the whole answer moves with every token
    if RECIPES[recipe].correction is not None:
        tensors["rollout_logprobs"] = tensors["logprobs"]
    if RECIPES[recipe].surrogate == "clip-cov":
        expected = expected.where(~tensors["selected"], 0.0)  # kl-cov: the penalty has slope 0 at a log-ratio of 0
    got = run(recipe, {**tensors, "old_logprobs": None})[1]["logprobs"]
    torch.testing.assert_close(got, expected.where(mask, 0.0).double())
    again = run(recipe, {**tensors, "old_logprobs": tensors["logprobs"].clone()})[1]["logprobs"]
    assert torch.equal(got, again)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_has_the_same_bits_in_any_batch(recipe):
    tensors = batch(recipe, torch.float32)
    shared = {"normalizer": 7.0, **OPTIONS}
    whole = run(recipe, tensors, **shared)[1]
    for row in range(B):
        alone = run(recipe, {k: v[row : row + 1] for k, v in tensors.items()}, **shared)[1]
        for name, grad in alone.items():
            assert torch.equal(grad[0], whole[name][row]), (row, name)


@pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.level != "token"])
def test_long_rows_have_the_same_bits_alone_again_and_with_any_number_of_threads(recipe):
    T = 70_001  # past the length at which PyTorch would split a sum between threads
    g = torch.Generator().manual_seed(0)
    old, change, advantages = (
        -torch.rand(2, T, generator=g),
        torch.randn(2, T, generator=g) * 1e-2,
        torch.tensor([1.0, -1.0]),
    )
    tensors = {"logprobs": old + change, "old_logprobs": old, "mask": torch.ones(2, T, dtype=torch.bool)}
    flat = {k: v.reshape(-1) for k, v in tensors.items()}
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        grad = run(recipe, {**tensors, "advantages": advantages}, normalizer=7.0)[1]["logprobs"]
        alone = run(recipe, {k: v[1:] for k, v in {**tensors, "advantages": advantages}.items()}, normalizer=7.0)
        assert torch.equal(alone[1]["logprobs"][0], grad[1])
        cu_seqlens = torch.tensor([0, T, 2 * T])
        packed = run(recipe, {**flat, "advantages": advantages}, normalizer=7.0, cu_seqlens=cu_seqlens)
        assert torch.equal(packed[1]["logprobs"], grad.reshape(-1))
        found.append(grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2]) and grad.any()


def test_a_new_recipe_is_one_function_and_a_line(monkeypatch):
    # DRO as in verl: -(A log p - beta / 2 (log-ratio)^2).
    def dro(b, ratio, t):
        return -b.advantages * b.logprobs + t.options["beta"] / 2 * b.log_ratio.square(), torch.zeros_like(b.at.mask)

    monkeypatch.setitem(SURROGATES, "dro", Surrogate(dro, options={"beta": 0.5}))
    monkeypatch.setitem(RECIPES, "dro", Recipe(surrogate="dro"))
    tensors = batch("dro")
    mask, d = tensors["mask"], tensors["logprobs"] - tensors["old_logprobs"]
    expected = (-tensors["advantages"] * tensors["logprobs"] + 0.1 * d.square())[mask].mean()
    torch.testing.assert_close(run("dro", tensors, options={"beta": 0.2})[0], expected)
    assert "| `dro` | token | dro |" in table()


def test_the_table_is_data_that_a_trainer_can_read():
    lines = table().splitlines()
    assert len(lines) == len(RECIPES) + 2 and all(line.count("|") == lines[0].count("|") for line in lines)
    for name, recipe in RECIPES.items():
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == 1
        assert recipe.advantages in ADVANTAGES and recipe.kl_placement in PLACEMENTS and recipe.paper, name
        assert set(recipe.options) <= set(SURROGATES[recipe.surrogate].options), name
        for number in ("clip", "dual_clip", "ratio_cap"):  # no number in a row that nothing reads
            assert number in recipe.reads or getattr(recipe, number) == getattr(RECIPES["ppo"], number), (name, number)
