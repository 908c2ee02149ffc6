"""Settings of the trainers that learn from their own samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from rlhf_fast import _check
from rlhf_fast.dialects import DIALECTS, dialect
from rlhf_fast.losses import ADVANTAGES, RECIPES
from rlhf_fast.settings.common import (
    Count,
    Finite,
    Fraction,
    KLConfig,
    ModelConfig,
    Name,
    NonNegative,
    OptimConfig,
    Positive,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    at_most,
    no_steps,
    no_trunk_to_share,
)
from rlhf_fast.settings.offline import PreferenceLossConfig, whole_batches

GROUP_ADVANTAGES = tuple(kind for kind in ADVANTAGES if kind != "gae")
"""Those of a trainer without a critic."""


@dataclass(frozen=True)
class PPOUpdateConfig:
    """The clipped update (Schulman et al. 2017, arXiv:1707.06347)."""

    epochs: Count = 4
    """Passes over each rollout batch."""
    minibatch_size: Count = 16
    """Completions per optimizer step."""
    micro_batch_size: Count = 16
    """Completions per forward pass."""
    clip: Positive = 0.2
    """Ratios are clipped to 1 - clip and 1 + clip."""
    value_clip: Positive | None = 0.2
    """Values are clipped to this distance from the old ones; none switches it off."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    gamma: Fraction = 1.0
    """Discount of later rewards, per token."""
    lam: Fraction = 0.95
    """GAE's lambda: lower is less variance and more bias."""
    whiten: bool = True
    """Advantages get mean 0 and variance 1 over the real tokens."""
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Bound of the loss for negative advantages (3 is usual); none leaves it to the dialect, whose default has none."""
    dialect: Name = "rlhf_fast"
    """Conventions of another trainer for scores, gaps, whitening, clamps and values: a row of rlhf_fast.dialects."""
    target_kl: Positive | None = None
    """Skip the rest of the epochs when the approximate KL of an update passes this."""

    def __post_init__(self) -> None:
        at_most(self, "micro_batch_size", self.micro_batch_size, "minibatch_size", self.minibatch_size)
        dialect(type(self).__name__, self.dialect)


@dataclass(frozen=True)
class PPOConfig:
    """PPO of the policy adapter against a reward, with policy, reference, value and reward on one base."""

    model: ModelConfig
    data: PromptDataConfig
    run: RunConfig
    reward: RewardSource
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5))
    value_lr: Positive | None = None
    """Peak learning rate of the value role (that of the policy when left out)."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    ppo: PPOUpdateConfig = field(default_factory=PPOUpdateConfig)
    packing: bool | None = None
    """Completions of a micro-batch end to end, without padding; left out: where that is exact and no slower, which it is on a CPU and
    with flash-attn."""
    steps: Count = 100
    """Rollout batches."""

    def __post_init__(self) -> None:
        no_trunk_to_share(self, self.model)
        rollout = self.rollout.batch_size
        at_most(self, "ppo.minibatch_size", self.ppo.minibatch_size, "rollout.batch_size", rollout)
        rules = DIALECTS[self.ppo.dialect]
        if rules.score_clip is not None or rules.drop_truncated:
            no_steps(
                self,
                self.reward,
                f"none with dialect = {self.ppo.dialect}, which has a rule for one score a completion",
            )


@dataclass(frozen=True)
class GroupKLConfig(KLConfig):
    """Penalty on the divergence from the reference policy, in the loss or in the reward as the recipe places it."""

    coef: NonNegative = 0.0
    """Coefficient of the KL; 0 with kind = fixed leaves the reference out altogether."""
    estimator: Literal["k1", "k2", "k3", "abs"] | None = None  # type: ignore[assignment]
    """Per-token estimate (that of the recipe when left out)."""

    @property
    def used(self) -> bool:
        """Whether the reference has a part in training."""
        return self.coef > 0 or self.kind == "adaptive"


@dataclass(frozen=True)
class GroupUpdateConfig:
    """The update by a recipe of rlhf_fast.losses.RECIPES, with advantages relative to the other completions of a prompt."""

    recipe: Name = "grpo"
    """Policy loss by name: grpo, dapo, dr_grpo, gspo, cispo, rloo, reinforce++ and others (`python -m rlhf_fast.tables`)."""
    advantages: Name | None = None
    """Kind of group advantages, or returns for those without groups (that of the recipe when left out). remax decodes one more
    completion of each prompt, the greedy one, and takes its score for the baseline."""
    epochs: Count = 1
    """Passes over each rollout batch."""
    minibatch_size: Count = 64
    """Completions per optimizer step."""
    micro_batch_size: Count = 16
    """Completions per forward pass; gradients add up to those of the minibatch."""
    clip: tuple[Positive, Positive] | None = None
    """Bounds of the ratio below and above 1 (those of the recipe when left out)."""
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Bound of the loss for negative advantages (that of the recipe when left out)."""
    ratio_cap: Positive | None = None
    """Largest ratio before it is multiplied by the advantage (that of the recipe when left out)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        at_most(self, "micro_batch_size", self.micro_batch_size, "minibatch_size", self.minibatch_size)
        owner = type(self).__name__
        _check.choice(owner, "recipe", self.recipe, tuple(RECIPES))
        if self.advantages is not None:
            _check.choice(owner, "advantages", self.advantages, GROUP_ADVANTAGES)
        elif self.kind not in GROUP_ADVANTAGES:
            expected = f"one of {', '.join(GROUP_ADVANTAGES)} with recipe = {self.recipe}, whose own ({self.kind}) want a critic"
            raise _check.error(ValueError, owner, "advantages", None, expected)
        for name in ("clip", "dual_clip", "ratio_cap"):
            value = getattr(self, name)
            if value is not None and name not in RECIPES[self.recipe].reads:
                raise _check.error(
                    ValueError, owner, name, value, f"nothing with recipe = {self.recipe}, which has none"
                )

    @property
    def kind(self) -> str:
        """Kind of the advantages."""
        return self.advantages or RECIPES[self.recipe].advantages


@dataclass(frozen=True)
class GroupConfig:
    """GRPO, RLOO, REINFORCE++ and their kin: policy and reference on one base, several completions of each prompt, no critic."""

    model: ModelConfig
    data: PromptDataConfig
    run: RunConfig
    reward: RewardSource
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5))
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    group_size: Count = 8
    """Completions of each prompt; rollout.batch_size is a multiple of it."""
    kl: GroupKLConfig = field(default_factory=GroupKLConfig)
    group: GroupUpdateConfig = field(default_factory=GroupUpdateConfig)
    packing: bool | None = None
    """Completions of a micro-batch end to end, without padding; left out: where that is exact and no slower, which it is on a CPU and
    with flash-attn."""
    steps: Count = 100
    """Rollout batches."""

    def __post_init__(self) -> None:
        no_trunk_to_share(self, self.model)
        at_most(self, "group.minibatch_size", self.group.minibatch_size, "rollout.batch_size", self.rollout.batch_size)
        _whole_groups(self, self.group_size, self.rollout)
        if RECIPES[self.group.recipe].sampled:
            _no_correction(
                self, self.rollout, f"whose ratio with recipe = {self.group.recipe} is over the policy that sampled"
            )
        if self.group.kind != "returns":
            no_steps(self, self.reward, f"none with advantages = {self.group.kind}, which compare whole completions")


def _whole_groups(owner: object, group_size: int, rollout: RolloutConfig) -> None:
    size = rollout.batch_size
    if size % group_size:
        expected = f"a divisor of batch_size = {size}"
        raise _check.error(ValueError, type(owner).__name__, "group_size", group_size, expected)


def _no_correction(
    owner: object, rollout: RolloutConfig, why: str = "which does not compare with the policy that sampled"
) -> None:
    if rollout.correction not in (None, "none"):
        expected = f"none for the loss, {why}"
        raise _check.error(ValueError, type(owner).__name__, "rollout.correction", rollout.correction, expected)


@dataclass(frozen=True)
class OnlineDPOUpdateConfig:
    """The updates on the pairs of a rollout batch."""

    epochs: Count = 1
    """Passes over the pairs of each rollout batch."""
    minibatch_size: Count | None = None
    """Pairs per optimizer step (all of a batch when left out)."""
    micro_batch_size: Count = 8
    """Pairs per forward pass; gradients add up to those of the minibatch."""

    def __post_init__(self) -> None:
        at_most(self, "micro_batch_size", self.micro_batch_size, "minibatch_size", self.minibatch_size)


@dataclass(frozen=True)
class OnlineDPOConfig:
    """Online DPO (arXiv:2402.04792): the best and the worst of several completions of a prompt are a preference pair."""

    model: ModelConfig
    data: PromptDataConfig
    run: RunConfig
    reward: RewardSource
    """What ranks the completions. A judge that compares those of a prompt is a callable with whole_batch, which gets them side by
    side, and scores the winner above the loser."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5))
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    group_size: Annotated[int, Field(ge=2)] = 2
    """Completions of each prompt, of which two become a pair; rollout.batch_size is a multiple of it."""
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    dpo: OnlineDPOUpdateConfig = field(default_factory=OnlineDPOUpdateConfig)
    packing: bool | None = None
    """Completions of a micro-batch end to end, without padding; left out: where that is exact and no slower, which it is on a CPU and
    with flash-attn."""
    steps: Count = 100
    """Rollout batches."""

    def __post_init__(self) -> None:
        no_trunk_to_share(self, self.model)
        _no_correction(self, self.rollout)
        no_steps(self, self.reward, "none: whole completions are compared")
        _whole_groups(self, self.group_size, self.rollout)
        prompts = self.rollout.batch_size // self.group_size
        minibatch = prompts if self.dpo.minibatch_size is None else self.dpo.minibatch_size
        at_most(self, "dpo.minibatch_size", minibatch, "rollout.batch_size / group_size", prompts)
        sizes = self.dpo.micro_batch_size, "dpo.minibatch_size", minibatch
        whole_batches(self, "dpo.micro_batch_size", *sizes, self.loss)


@dataclass(frozen=True)
class RaftUpdateConfig:
    """Which completions are learned, and the updates on them."""

    best: Count | None = 1
    """At most so many completions of each prompt, those with the highest scores; none: all that reach the threshold."""
    threshold: Finite | None = None
    """Completions that score less are not learned; scores as they are after reward.normalize and rollout.missing_eos."""
    epochs: Count = 1
    """Passes over what a rollout batch keeps."""
    minibatch_size: Count | None = None
    """Completions per optimizer step (all that are kept when left out)."""
    micro_batch_size: Count = 8
    """Completions per forward pass; gradients add up to those of the minibatch."""

    def __post_init__(self) -> None:
        at_most(self, "micro_batch_size", self.micro_batch_size, "minibatch_size", self.minibatch_size)
        if self.best is None and self.threshold is None:
            raise _check.error(ValueError, type(self).__name__, "best", None, "a number, or a threshold")


@dataclass(frozen=True)
class RaftConfig:
    """Best-of-n fine-tuning (RAFT, arXiv:2304.06767; rejection sampling, arXiv:2307.09288): learn the best of several completions."""

    model: ModelConfig
    data: PromptDataConfig
    run: RunConfig
    reward: RewardSource
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    group_size: Count = 8
    """Completions of each prompt; rollout.batch_size is a multiple of it."""
    raft: RaftUpdateConfig = field(default_factory=RaftUpdateConfig)
    packing: bool | None = None
    """Completions of a micro-batch end to end, without padding; left out: where that is exact and no slower, which it is on a CPU and
    with flash-attn."""
    steps: Count = 100
    """Rollout batches."""

    def __post_init__(self) -> None:
        no_trunk_to_share(self, self.model)
        _no_correction(self, self.rollout)
        no_steps(self, self.reward, "none: whole completions are compared")
        _whole_groups(self, self.group_size, self.rollout)
        at_most(self, "raft.best", self.raft.best, "group_size", self.group_size)
