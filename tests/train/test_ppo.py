from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tolerances
import torch
from models import letter_tokenizer, save_tiny, tiny_llama

from rlhf_fast import advantages
from rlhf_fast.batch import pad
from rlhf_fast.config import (
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOUpdateConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
)
from rlhf_fast.dialects import DIALECTS
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.train.ppo import Trainer, explained_variance, train_ppo
from rlhf_fast.train.rewards import KLController, Rewards, apply_missing_eos

SCORE = f"{Path(__file__).parent / 'scorers.py'}:count_e"


def ppo_config(folder: Path, **changes: object) -> PPOConfig:
    """Settings of a run of seconds on a tiny model; `changes` replaces whole sections or plain fields."""
    base = PPOConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", shared_layers=1, lora=LoraConfig(r=4, alpha=8.0)),
        data=PromptDataConfig(str(folder / "prompts.jsonl")),
        run=RunConfig(str(folder / "run"), save_every=2, sample_every=0),
        reward=RewardSource(source=SCORE),
        optim=OptimConfig(lr=2e-2, schedule="constant"),
        rollout=RolloutConfig(batch_size=16, max_new_tokens=8),
        kl=KLConfig(coef=0.02),
        ppo=PPOUpdateConfig(epochs=2, minibatch_size=8, micro_batch_size=4, entropy_coef=0.01),
        steps=4,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    prompts = ["the film", "a story of", "we saw", "it was", "this"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return tmp_path


class Updates:
    """Stands in for a Run: keeps the gradients of each update and takes no step unless told to."""

    def __init__(self, model: SharedModel, lr: float = 0.0) -> None:
        self.parameters = {f"{r}.{n}": p for r in ("policy", "value") for n, p in model.parameters_of(r).items()}
        self.lr, self.seen = lr, []

    def update(self, loss: float) -> float:
        grads = {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
        self.seen.append(grads)
        with torch.no_grad():
            for p in self.parameters.values():
                if p.grad is not None:
                    p -= self.lr * p.grad
                    p.grad = None
        return math.sqrt(sum(float(g.square().sum()) for g in grads.values()))


def make(folder: Path, *, warm: bool = False, **changes: object) -> tuple[Trainer, SharedModel]:
    config = ppo_config(folder, **changes)
    model = SharedModel(tiny_llama(), lora=config.model.lora, shared_layers=config.model.shared_layers)
    if warm:  # adapters that do something, as after some training
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for role in ("policy", "value"):
                for name, p in model.parameters_of(role).items():
                    if "lora_B" in name or name == "score.weight":
                        p.normal_(0, 0.2, generator=generator)
    return Trainer(config, model, letter_tokenizer(), Rewards(config.reward)), model


def experience(trainer: Trainer, rows: int = 16):
    tokenizer = trainer.tokenizer
    prompts = [tokenizer(p, add_special_tokens=False).input_ids for p in ("the film", "we saw", "this", "it")] * rows
    return trainer.score(trainer.rollout(prompts[:rows], torch.Generator().manual_seed(3)))


def test_item_12_13_on_the_first_minibatch_every_ratio_is_1_and_every_kl_0(folder):
    trainer, model = make(folder)
    e = experience(trainer)
    assert float((e.logprobs - e.ref_logprobs).abs().max()) <= 1e-6
    metrics = trainer.update(Updates(model), e, torch.Generator().manual_seed(1))
    assert metrics["ppo/first_ratio_error"] <= 1e-5
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6) and metrics["ppo/clip_fraction"] == 0.0


def test_item_12_two_scorings_of_one_batch_are_the_same_bits(folder):
    trainer, _ = make(folder, warm=True)
    e = experience(trainer)
    again = trainer.score(e.rollout)
    for name in ("logprobs", "ref_logprobs", "values", "entropy", "scores"):
        assert torch.equal(getattr(e, name), getattr(again, name)), name


def test_logprobs_of_sampling_may_be_the_old_ones_and_scoring_leaves_the_policy_out(folder, monkeypatch):
    trainer, _ = make(folder, warm=True)
    scored = experience(trainer)
    settings = RolloutConfig(batch_size=16, max_new_tokens=8, old_logprobs="sampled")
    trainer, model = make(folder, warm=True, rollout=settings)
    calls, plain = [], SharedModel.forward
    monkeypatch.setattr(SharedModel, "forward", lambda self, *a, **k: calls.append(k["roles"]) or plain(self, *a, **k))
    e = experience(trainer)
    assert calls and not any("policy" in roles for roles in calls)
    assert e.logprobs is e.rollout.logprobs and e.entropy is e.rollout.entropy and not e.mismatch()
    for name in ("logprobs", "entropy", "ref_logprobs", "values", "scores"):
        torch.testing.assert_close(getattr(e, name), getattr(scored, name), atol=1e-5, rtol=1e-5)
    metrics = trainer.update(Updates(model), e, torch.Generator().manual_seed(1))
    assert metrics["ppo/first_ratio_error"] <= 1e-5


def test_item_8_only_response_tokens_carry_gradient_and_statistics(folder):
    trainer, _ = make(folder, warm=True)
    e = experience(trainer)
    assert e.mask.shape == e.rollout.responses.shape == e.logprobs.shape
    assert torch.equal(e.mask, e.rollout.response_mask)
    assert not e.logprobs[~e.mask].any() and not e.ref_logprobs[~e.mask].any()


def test_logprobs_line_up_with_the_tokens_they_predict(folder):
    trainer, model = make(folder, warm=True)
    e = experience(trainer, rows=3)
    with torch.no_grad():
        out = model(e.rollout.input_ids, e.rollout.attention_mask, roles=("policy", "value"))
    full = out.policy.logits.log_softmax(-1)
    P = e.rollout.prompt_length
    for b, t in e.mask.nonzero().tolist():
        token = e.rollout.input_ids[b, P + t]
        assert float(e.logprobs[b, t]) == pytest.approx(float(full[b, P + t - 1, token]), abs=1e-5)
        assert float(e.values[b, t]) == pytest.approx(float(out.value.values[b, P + t - 1]), abs=1e-5)


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_item_26_micro_batches_add_up_to_the_one_shot_gradient(folder, micro):
    grads = []
    for size in (8, micro):
        update = PPOUpdateConfig(epochs=1, minibatch_size=8, micro_batch_size=size, entropy_coef=0.05, value_coef=0.5)
        trainer, model = make(folder, warm=True, ppo=update)
        e = experience(trainer)
        e.logprobs = e.logprobs - 0.1 * e.mask  # off the ratio of 1, so that clipping and its gradient matter
        record = Updates(model)
        metrics = trainer.update(record, e, torch.Generator().manual_seed(1))
        grads.append((record.seen, metrics))
    for whole, split in zip(grads[0][0], grads[1][0], strict=True):
        scale = max(float(g.abs().max()) for g in whole.values())
        for name, g in whole.items():
            assert float((g - split[name]).abs().max()) <= 1e-5 * scale, name
    for name, value in grads[0][1].items():
        assert grads[1][1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def updated(folder, **changes):
    """(trainer, model, experience off the ratio of 1, gradients of an update with one minibatch)."""
    settings = {"epochs": 1, "minibatch_size": 16, "micro_batch_size": 5, "value_coef": 1.0, **changes}
    trainer, model = make(folder, warm=True, ppo=PPOUpdateConfig(**settings))
    e = experience(trainer)
    e.logprobs = e.logprobs - 0.3 * e.mask
    record = Updates(model)
    trainer.update(record, e, torch.Generator().manual_seed(1))
    return trainer, model, e, record.seen[0]


def plain_ppo(trainer, model, e, name):
    """The loss of one minibatch in plain PyTorch, from `advantages` in the dialect."""
    config, rules = trainer.config, DIALECTS[name]
    found = advantages(
        e.scores, e.values, e.mask, logprobs=e.logprobs, ref_logprobs=e.ref_logprobs, kl_coef=config.kl.coef, dialect=name,
        bootstrap=e.next_values if rules.bootstrap else None, truncated=~e.rollout.finished,
    )  # fmt: skip
    P = e.rollout.prompt_length
    out = model(e.rollout.input_ids, e.rollout.attention_mask, roles=("policy", "value"))
    new = out.policy.logits[:, P - 1 : -1].log_softmax(-1).gather(2, e.rollout.responses[..., None])[..., 0]
    ratio, A = (new - e.logprobs).exp(), found.advantages
    policy = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.2))
    bound = {"verl": 3.0, "roll_dual_clip_loss": 1.4}.get(name, math.inf)
    policy = torch.where(A < 0, policy.clamp(max=-bound * A) if bound < math.inf else policy, policy)
    valued = e.mask.clone()
    if name == "trl":
        for row, real in zip(valued, e.mask, strict=True):
            row[min(int(real.nonzero().max()) + 1, len(row) - 1)] = True
    values = out.value.values[:, P - 1 : -1]
    squares = torch.maximum(
        (values - found.returns) ** 2,
        (e.values + (values - e.values).clamp(-0.2, 0.2) - found.returns) ** 2,
    )
    value = (squares / 2 * rules.value_scale)[valued].mean()
    return policy[e.mask].mean() + value, valued


@pytest.mark.parametrize("name", DIALECTS)
def test_an_update_in_every_dialect_is_that_of_plain_pytorch(folder, name):
    trainer, model, e, seen = updated(folder, dialect=name)
    loss, valued = plain_ppo(trainer, model, e, name)
    assert (valued.sum() > e.mask.sum()) == (name == "trl") and e.mask.any(1).all()
    expected = torch.autograd.grad(loss, [Updates(model).parameters[n] for n in seen])
    scale = max(float(g.abs().max()) for g in expected)
    for (n, g), wanted in zip(seen.items(), expected, strict=True):
        assert float((g - wanted).abs().max()) <= 1e-4 * scale, n


def test_dialects_change_the_update(folder):
    """Those that differ in advantages, values or clamps on rollouts of which some did not end."""
    _, _, e, plain = updated(folder)
    assert not e.rollout.finished.all() and e.rollout.finished.any()
    for name in ("trl", "openrlhf", "slime", "areal", "areal_mask_no_eos_with_zero", "roll", "openai"):
        _, _, _, seen = updated(folder, dialect=name)
        assert any(not torch.allclose(g, plain[n], rtol=1e-4, atol=1e-7) for n, g in seen.items()), name


def test_the_value_after_the_last_slot_is_that_of_the_state_after_the_last_token(folder):
    trainer, model = make(folder, warm=True)
    e = experience(trainer)
    with torch.no_grad():
        values = model(e.rollout.input_ids, e.rollout.attention_mask, roles=("value",)).value.values
    last = e.rollout.prompt_length + e.rollout.response_mask.sum(1) - 1
    assert e.next_values.shape == (16,)
    torch.testing.assert_close(e.next_values, values[torch.arange(16), last], atol=1e-5, rtol=1e-5)


def test_an_unknown_dialect_is_named_before_anything_runs():
    with pytest.raises(
        ValueError, match=r"PPOUpdateConfig: argument 'dialect' got 'tlr', expected one of 'rlhf_fast', 'trl'"
    ):
        PPOUpdateConfig(dialect="tlr")


def test_the_trunk_gives_the_gradient_of_the_whole_model(folder):
    found = []
    for shared in (True, False):
        trainer, model = make(folder, warm=True)
        e = experience(trainer)
        record = Updates(model)
        if not shared:
            e.trunk = None
        trainer.update(record, e, torch.Generator().manual_seed(1))
        found.append(record.seen)
    for a, b in zip(*found, strict=True):
        assert all(torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-7) for n in a)


def test_base_and_reward_role_keep_their_bits_through_ppo(folder):
    trainer, model = make(folder)
    base = {n: p.clone() for n, p in model.base.named_parameters() if "lora" not in n}
    reward = model.state_of("reward")
    record = Updates(model, lr=0.5)
    for seed in range(2):
        trainer.update(record, experience(trainer), torch.Generator().manual_seed(seed))
    assert all(torch.equal(p, base[n]) for n, p in model.base.named_parameters() if n in base)
    assert all(torch.equal(p, reward[n]) for n, p in model.state_of("reward").items())
    assert any(
        not torch.equal(a, b) for a, b in zip(model.state_of("policy").values(), record.seen[0].values(), strict=False)
    )


def test_item_11_the_value_role_starts_at_exactly_0(folder):
    trainer, _ = make(folder)
    assert not experience(trainer).values.any()


def test_item_18_the_reward_role_scores_what_the_cut_completion_says_and_nothing_after_it(folder):
    trainer, model = make(folder)
    e = experience(trainer)
    ended = next(i for i in range(len(e.mask)) if e.rollout.finished[i] and not e.rollout.response_mask[i].all())
    ids, attention = e.rollout.input_ids.clone(), e.rollout.attention_mask
    scores = model(ids, attention, roles=("reward",)).reward.scores
    ids[ended, ~attention[ended]] = 9  # whatever stands before the prompt and after the end
    assert torch.equal(model(ids, attention, roles=("reward",)).reward.scores, scores)
    row = ids[ended][attention[ended]][None]
    alone = model(row, torch.ones_like(row, dtype=torch.bool), roles=("reward",)).reward.scores
    assert torch.allclose(alone[0], scores[ended], atol=1e-5)


def test_item_19_missing_eos_is_replaced_subtracted_or_kept():
    scores, finished = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    rule = lambda kind: apply_missing_eos(scores, finished, RolloutConfig(missing_eos=kind)).tolist()
    assert rule("none") == [2.0, 2.0] and rule("replace") == [2.0, -1.0] and rule("subtract") == [2.0, 1.0]


@pytest.mark.parametrize(("kl", "expected"), [(3.0, 0.149232), (6.0, 0.15), (6.6, 0.150384), (12.0, 0.150768)])
def test_item_32_adaptive_kl_coefficient(kl, expected):
    controller = KLController(KLConfig(kind="adaptive", coef=0.15, target=6.0, horizon=1e4))
    controller.update(kl, 256)
    assert controller.coef == pytest.approx(expected, abs=tolerances.WORKED)
    fixed = KLController(KLConfig(kind="fixed", coef=0.15))
    fixed.update(kl, 256)
    assert fixed.coef == 0.15


def test_item_29_epochs_stop_once_the_kl_from_the_sampling_policy_is_too_large(folder):
    updates = PPOUpdateConfig(epochs=4, minibatch_size=8, micro_batch_size=8, target_kl=1e-9)
    trainer, model = make(folder, ppo=updates)
    metrics = trainer.update(Updates(model, lr=0.1), experience(trainer), torch.Generator().manual_seed(0))
    assert metrics["ppo/updates"] == 2.0  # the first one starts from ratio 1, the second sees what it did
    trainer, model = make(folder, ppo=dataclasses.replace(updates, target_kl=None))
    metrics = trainer.update(Updates(model, lr=0.1), experience(trainer), torch.Generator().manual_seed(0))
    assert metrics["ppo/updates"] == 8.0


def test_item_34_explained_variance_is_1_perfect_0_constant_and_never_nan():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    values = torch.tensor([[1.1, 1.9, 3.2, -5.0]])
    assert explained_variance(values, returns, mask) == pytest.approx(0.9766667, abs=tolerances.WORKED)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full_like(returns, 7.0), returns, mask) == 0.0
    assert explained_variance(values, torch.ones_like(returns), mask) == 0.0
    assert explained_variance(values, returns, torch.zeros_like(mask)) == 0.0


def test_ppo_learns_to_say_a_letter(folder):
    config = ppo_config(folder, steps=12, rollout=RolloutConfig(batch_size=32, max_new_tokens=8))
    adapter = train_ppo(config)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["score"] > lines[0]["score"] + 1.0
    assert (adapter / "adapter_model.safetensors").is_file()
    assert lines[0]["ppo/first_ratio_error"] <= 1e-5 and abs(lines[0]["kl"]) <= 1e-6


def test_a_constant_reward_moves_nothing_and_a_huge_kl_coefficient_holds_the_policy(folder):
    constant = RewardSource(source=SCORE.replace("count_e", "constant"))
    still = PPOUpdateConfig(epochs=2, minibatch_size=8, micro_batch_size=8, whiten=False, lam=1.0)
    trainer, model = make(folder, reward=constant, ppo=still, kl=KLConfig(coef=0.0))
    trainer.update(Updates(model, lr=0.1), e := experience(trainer), torch.Generator().manual_seed(0))
    # lambda = 1 and a critic of 0: every token of a batch has the same advantage, the constant itself.
    assert float(e.scores.std()) == 0.0
    held = train_ppo(
        ppo_config(folder, steps=6, kl=KLConfig(coef=50.0), run=RunConfig(str(folder / "held"), sample_every=0))
    )
    free = train_ppo(
        ppo_config(folder, steps=6, kl=KLConfig(coef=0.0), run=RunConfig(str(folder / "free"), sample_every=0))
    )
    kl = [
        [json.loads(line)["kl"] for line in (adapter.parent / "metrics.jsonl").read_text().splitlines()][-1]
        for adapter in (held, free)
    ]
    assert kl[0] < 0.5 * kl[1]


def test_unscorable_completions_are_left_out_and_counted(folder):
    trainer, _ = make(folder, reward=RewardSource(source=SCORE.replace("count_e", "skip_first")))
    e = experience(trainer)
    assert e.raw_scores[0].isnan() and not e.mask[0].any() and e.mask[1:].any()
    assert e.scores.isfinite().all()


def test_item_15_rewards_before_step_1_are_normalised_by_the_reference(folder):
    config = ppo_config(folder, steps=1, reward=RewardSource(source=SCORE, normalize="reference", clip=2.0))
    train_ppo(config)
    rewards = Rewards(config.reward)
    rewards.observe(torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert torch.allclose(
        rewards.normalized(torch.tensor([4.0, 4.0 + math.sqrt(5.0), 100.0])), torch.tensor([0.0, 1.0, 2.0])
    )


def test_running_moments_do_not_depend_on_how_the_scores_arrive():
    scores = torch.randn(50)
    one, many = (Rewards(RewardSource(source=SCORE, normalize="running")) for _ in range(2))
    one.observe(scores)
    for part in scores.split(7):
        many.observe(part)
    assert one.mean == pytest.approx(many.mean) and one.m2 == pytest.approx(many.m2) and one.count == many.count == 50


def test_pad_refuses_an_empty_prompt():
    with pytest.raises(ValueError, match="empty sequences at \\[1\\]"):
        pad([[1], []], left=True)


@pytest.mark.parametrize("dialect", ["rlhf_fast", "trl", "verl", "areal"])
@pytest.mark.parametrize("layers", [0, 1])
def test_packed_equals_padded_in_scores_losses_and_gradients(folder, dialect, layers):
    update = PPOUpdateConfig(epochs=1, minibatch_size=16, micro_batch_size=5, entropy_coef=0.01, dialect=dialect)
    model_settings = ModelConfig(str(folder / "model"), dtype="float32", shared_layers=layers, lora=LoraConfig(r=4))
    found = {}
    for packing in (False, True):
        trainer, model = make(folder, warm=True, ppo=update, packing=packing, model=model_settings)
        assert trainer.packed is packing and model.shared_layers == layers
        e = experience(trainer)
        updates = Updates(model)
        metrics = trainer.update(updates, e, torch.Generator().manual_seed(1))
        found[packing] = e, metrics, updates.seen[0]
    (e, metrics, gradients), (packed_e, packed_metrics, packed_gradients) = found.values()
    assert torch.equal(e.rollout.input_ids, packed_e.rollout.input_ids)
    assert (~e.rollout.response_mask).any(), "the batch has completions of several lengths"
    for name in ("logprobs", "ref_logprobs", "entropy", "next_values"):
        torch.testing.assert_close(getattr(packed_e, name), getattr(e, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed_e.values[e.mask], e.values[e.mask], atol=1e-5, rtol=1e-5)
    assert packed_metrics.keys() == metrics.keys()
    off = float((packed_e.logprobs - e.logprobs).abs().max())  # held to 1e-5 above
    for name, value in metrics.items():
        # The mismatch is the distance of these log-probs from those of the rollout: it moves as far as they do.
        bound = max(1e-5, off) if name.startswith("mismatch/") else 1e-5
        assert packed_metrics[name] == pytest.approx(value, rel=1e-4, abs=bound), name
    for name, g in gradients.items():
        torch.testing.assert_close(packed_gradients[name], g, atol=1e-5, rtol=1e-3)


def test_a_dialect_that_reads_the_pads_is_not_packed(folder):
    name = next(n for n, rules in DIALECTS.items() if rules.gap == "read")
    trainer, _ = make(folder, ppo=PPOUpdateConfig(minibatch_size=8, micro_batch_size=4, dialect=name))
    assert trainer.packed is False
    assert make(folder)[0].packed is True
