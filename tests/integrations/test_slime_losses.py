"""The functions that slime takes by dotted path, against its own formulas."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.corrections import KINDS
from rlhf_fast.integrations import slime
from rlhf_fast.losses import RECIPES, policy_loss

HOME = "slime.backends.megatron_utils.loss"
OURS = "rlhf_fast.integrations.slime"


@pytest.fixture
def training(framework):
    framework("slime")
    lengths, totals = [3, 5, 2], [5, 6, 4]
    tokens = [torch.randint(0, 11, (n,)) for n in totals]
    masks = [torch.ones(n) for n in lengths]
    masks[1][2] = 0
    batch = {
        "unconcat_tokens": tokens, "total_lengths": totals, "response_lengths": lengths, "loss_masks": masks,
        "advantages": [torch.randn(n) for n in lengths],
        "log_probs": [-2.4 + 0.3 * torch.randn(n) for n in lengths],
        "ref_log_probs": [-2.4 + 0.3 * torch.randn(n) for n in lengths],
        "rollout_log_probs": [-2.4 + 0.3 * torch.randn(n) for n in lengths],
        "rollout_mask_sums": [torch.tensor(7.0), torch.tensor(7.0), torch.tensor(2.0)],  # two answers of one rollout
    }  # fmt: skip
    args = SimpleNamespace(
        eps_clip=0.1,
        eps_clip_high=0.2,
        eps_clip_c=None,
        entropy_coef=0.01,
        use_kl_loss=True,
        kl_loss_coef=0.3,
        kl_loss_type="k3",
        use_unbiased_kl=False,
        use_rollout_logprobs=False,
        use_opsm=False,
        opsm_delta=0.05,
        use_tis=False,
        get_mismatch_metrics=False,
        custom_tis_function_path=None,
        tis_clip_low=0.8,
        tis_clip=1.2,
        calculate_per_token_loss=False,
        rollout_top_p=1.0,
    )
    logits = torch.randn(1, sum(totals), 11, requires_grad=True)
    return args, batch, logits


def sample_mean(batch):
    def reduce(x):
        parts = zip(x.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        return sum((p * m).sum() / m.sum().clamp(min=1) for p, m in parts)

    return reduce


def test_losses_by_dotted_path(training):
    args, batch, logits = training
    loss, reported = slime.policy_loss_ppo(args, batch, logits, sample_mean(batch))
    read = sys.modules["slime.backends.megatron_utils.loss"].get_log_probs_and_entropy
    found = read(
        logits,
        args=args,
        with_entropy=True,
        **{k: batch[k] for k in ("unconcat_tokens", "total_lengths", "response_lengths")},
    )[1]
    new, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
    old, ref, A = (torch.cat(batch[k]) for k in ("log_probs", "ref_log_probs", "advantages"))
    reduce, ratio = sample_mean(batch), (new - old).exp()
    policy = reduce(-torch.min(ratio * A, ratio.clamp(0.9, 1.2) * A))
    x = ref - new
    expected = {"pg_loss": policy, "entropy_loss": reduce(entropy), "kl_loss": reduce(x.exp() - x - 1)}
    expected["loss"] = policy - 0.01 * expected["entropy_loss"] + 0.3 * expected["kl_loss"]
    rollout = torch.cat(batch["rollout_log_probs"])
    expected |= {"ppo_kl": reduce(old - new), "train_rollout_logprob_abs_diff": reduce((old - rollout).abs())}
    clipped = (((ratio < 0.9) & (A < 0)) | ((ratio > 1.2) & (A > 0))).float()[torch.cat(batch["loss_masks"]) != 0]
    expected["pg_clipfrac"] = clipped.mean() * 3
    assert reported.keys() == expected.keys() and not reported["loss"].requires_grad
    for name, wanted in expected.items():
        torch.testing.assert_close(reported[name], wanted.detach())
    grads = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, expected["loss"]))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("recipe", [recipe for recipe, rules in RECIPES.items() if not rules.needs])
def test_every_recipe_by_dotted_path(recipe, training):
    args, batch, logits = training
    args.use_kl_loss, args.entropy_coef = False, 0.0
    loss, _ = getattr(slime, f"policy_loss_{recipe}")(args, batch, logits, sample_mean(batch))
    read = sys.modules["slime.backends.megatron_utils.loss"].get_log_probs_and_entropy
    keys = ("unconcat_tokens", "total_lengths", "response_lengths")
    new = torch.cat(read(logits, args=args, with_entropy=False, **{k: batch[k] for k in keys})[1]["log_probs"])
    cu_seqlens = torch.tensor([0, *batch["response_lengths"]]).cumsum(0)
    mask = torch.cat(batch["loss_masks"]) != 0
    rest = (torch.cat(batch["log_probs"]), torch.cat(batch["advantages"]), mask)
    reduction = {"reduction": "seq-mean-token-mean", "normalizer": 1.0, "cu_seqlens": cu_seqlens}
    clip = {"clip": (0.1, 0.2)} if "clip" in RECIPES[recipe].reads else {}
    torch.testing.assert_close(loss, policy_loss(recipe, new, *rest, **clip, **reduction).loss)


def test_context_parallelism_and_unknown_recipes_raise(training, monkeypatch):
    args, batch, logits = training
    with pytest.raises(AttributeError, match="has no attribute 'policy_loss_best'"):
        slime.policy_loss_best  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'policy_loss_kl_cov'"):
        slime.policy_loss_kl_cov  # noqa: B018
    monkeypatch.setattr(sys.modules["megatron.core"].mpu, "get_context_parallel_world_size", lambda: 2)
    with pytest.raises(ValueError, match="policy_loss_ppo: context parallelism got 2 ranks, expected 1"):
        slime.policy_loss_ppo(args, batch, logits, sample_mean(batch))
    with pytest.raises(ValueError, match="gae_advantages: context parallelism got 2 ranks"):
        slime.gae_advantages(args, {"values": [], "kl": []})


OPTIONS = {
    "plain": {},
    "stale": {"use_opsm": True},
    "tis": {"use_tis": True},
    "icepop": {"use_tis": True, "custom_tis_function_path": f"{OURS}.tis_token_mis"},
    "both": {"use_tis": True, "use_opsm": True},
    "sequence": {"use_tis": True, "custom_tis_function_path": f"{OURS}.tis_sequence_tis"},
    "metrics": {"get_mismatch_metrics": True, "custom_tis_function_path": "watching.watch"},
    "rejecting": {"use_tis": True, "custom_tis_function_path": "watching.reject"},
    "rollout": {"use_rollout_logprobs": True},
    "unbiased": {"use_unbiased_kl": True, "kl_loss_type": "low_var_kl"},
    "tokens": {"calculate_per_token_loss": True},
    "dual": {"eps_clip_c": 1.1},
    "reducer": {"custom_pg_loss_reducer_function_path": f"{OURS}.reducer_constant_16"},
    "means": {"custom_pg_loss_reducer_function_path": f"{OURS}.reducer_seq_mean_token_mean"},
    "masks": {"use_tis": True, "custom_tis_function_path": "watching.reject",
              "custom_pg_loss_reducer_function_path": f"{OURS}.reducer_constant_16"},
}  # fmt: skip


def watch(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **_):
    """A TIS function that only measures."""
    return pg_loss, loss_masks, {"seen": torch.cat(train_log_probs) - torch.cat(rollout_log_probs)}


def reject(args, *, pg_loss, loss_masks, **_):
    """A TIS function that takes the first token of every answer out of the masks."""
    masks = [torch.cat([torch.zeros(1), m[1:]]) for m in loss_masks]
    return 2 * pg_loss, masks, {}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_options_of_slimes_policy_loss(option, training, monkeypatch):
    """The formula of slime's policy_loss_function, option by option, for PPO."""
    args, batch, logits = training
    monkeypatch.setitem(sys.modules, "watching", SimpleNamespace(watch=watch, reject=reject))
    vars(args).update(OPTIONS[option])
    home, reduce = sys.modules[HOME], sample_mean(batch)
    keys = {k: batch[k] for k in ("unconcat_tokens", "total_lengths", "response_lengths")}
    found = home.get_log_probs_and_entropy(logits, args=args, with_entropy=True, **keys)[1]
    new, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
    rollout, ref, A = (torch.cat(batch[k]) for k in ("rollout_log_probs", "ref_log_probs", "advantages"))
    old = rollout if args.use_rollout_logprobs else torch.cat(batch["log_probs"])
    ratio = (new - old).exp()
    losses = -torch.min(ratio * A, ratio.clamp(0.9, 1.2) * A)
    if args.eps_clip_c is not None:
        losses = torch.where(A < 0, torch.min(losses, -args.eps_clip_c * A), losses)
    masks = batch["loss_masks"]
    if args.use_opsm:
        kept, share = sys.modules["slime.utils.ppo_utils"].compute_opsm_mask(
            args, found["log_probs"], batch["log_probs"], batch["advantages"], masks
        )
        losses = losses * kept
        assert 0 < kept.mean() < 1
    w = (torch.cat(batch["log_probs"]) - rollout).exp()
    kind = option if option != "both" else "tis"
    if kind == "tis":
        losses = losses * w.clamp(0.8, 1.2)
    elif kind == "icepop":
        losses = losses * w * ((w >= 0.8) & (w <= 1.2))
    elif kind == "sequence":
        product = [(x * m).sum().exp() for x, m in zip(w.log().split(batch["response_lengths"]), masks, strict=True)]
        losses = losses * torch.cat([p.clamp(0.8, 1.2).expand(n) for p, n in zip(product, (3, 5, 2), strict=True)])
    elif kind in ("rejecting", "masks"):
        losses, masks = 2 * losses, reject(None, pg_loss=losses, loss_masks=masks)[1]
    if args.use_tis or args.get_mismatch_metrics:
        reduce = home.get_sum_of_sample_mean(
            None, batch["response_lengths"], masks, batch["rollout_mask_sums"], args.calculate_per_token_loss
        )
    if kind in ("reducer", "masks"):
        policy = (losses * torch.cat(masks)).sum() / 16
    elif kind == "means":
        parts = zip(losses.split(batch["response_lengths"]), masks, strict=True)
        policy = sum((p * m).sum() / m.sum() for p, m in parts)
    else:
        policy = reduce(losses)
    x = ref - new
    kl = x.exp() - 1 - x
    kl = (ratio * kl).clamp(-10, 10) if args.use_unbiased_kl else kl
    expected = policy - 0.01 * reduce(entropy) + 0.3 * reduce(kl)

    loss, reported = slime.policy_loss_ppo(args, batch, logits, sample_mean(batch))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, logits, retain_graph=True)[0] for y in (loss, expected)))
    assert not any(y.requires_grad for y in reported.values())
    if args.use_opsm:
        torch.testing.assert_close(reported["opsm_clipfrac"], share)
    if args.use_tis or args.get_mismatch_metrics:
        torch.testing.assert_close(reported["ois"], sample_mean(batch)(ratio).detach())
    if kind == "metrics":
        torch.testing.assert_close(reported["seen"], sample_mean(batch)(w.log()))


@pytest.mark.parametrize("kind", KINDS)
def test_corrections_by_dotted_path(kind, training):
    args, batch, _ = training
    losses = torch.randn(10, requires_grad=True)
    found, masks, metrics = getattr(slime, f"tis_{kind.replace('-', '_')}")(
        args=args,
        pg_loss=losses,
        train_log_probs=batch["log_probs"],
        rollout_log_probs=batch["rollout_log_probs"],
        loss_masks=batch["loss_masks"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )
    w = (torch.cat(batch["log_probs"]) - torch.cat(batch["rollout_log_probs"])).exp()
    (weights,) = torch.autograd.grad(found.sum(), losses)
    real = torch.cat(batch["loss_masks"]) != 0
    if kind.startswith("token"):
        inside = (w >= 0.8) & (w <= 1.2)
        torch.testing.assert_close(weights, w * inside if kind == "token-mis" else w.clamp(0.8, 1.2))
        torch.testing.assert_close(metrics["tis_clipfrac"], (~inside).float())
    else:  # one number for an answer, from its real tokens
        for part, m in zip(weights.split([3, 5, 2]), real.split([3, 5, 2]), strict=True):
            assert len(part[m].unique()) == 1 and not part[~m].any()
    assert masks is batch["loss_masks"]
    torch.testing.assert_close((metrics["tis"], metrics["tis_abs"]), (w, (w - 1).abs()))


def test_no_tokens_keep_the_graph(training):
    args, batch, logits = training
    args.use_kl_loss = False
    empty = {k: [x[:0] for x in v] for k, v in batch.items() if isinstance(v[0], torch.Tensor) and v[0].dim()}
    batch |= empty | {"response_lengths": [0, 0, 0], "unconcat_tokens": batch["unconcat_tokens"]}
    sys.modules[HOME].get_log_probs_and_entropy = lambda *_, **__: (
        None, {name: [torch.zeros(0) for _ in range(3)] for name in ("log_probs", "entropy")},
    )  # fmt: skip
    loss, _ = slime.policy_loss_ppo(args, batch, logits, sample_mean(batch))
    assert not torch.autograd.grad(loss, logits)[0].any() and not loss


def test_nucleus_masks_reach_slimes_function(training):
    args, batch, logits = training
    args.rollout_top_p = 0.9
    batch |= {"rollout_top_p_token_ids": 1, "rollout_top_p_token_offsets": 2}
    given, read = {}, sys.modules[HOME].get_log_probs_and_entropy
    sys.modules[HOME].get_log_probs_and_entropy = lambda *x, **y: (given.update(y), read(*x, **y))[1]
    slime.policy_loss_ppo(args, batch, logits, sample_mean(batch))
    assert (given["top_p_token_ids"], given["top_p_token_offsets"]) == (1, 2)


def test_reducers_refuse_what_slime_divides_otherwise(training):
    masks = training[1]["loss_masks"]
    with pytest.raises(ValueError, match="argument 'calculate_per_token_loss' got True"):
        slime.reducer_constant_16(None, None, masks, True)
    for name in ("reducer_constant_0", "reducer_constant_", "reducer_mean", "tis_best"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(slime, name)
