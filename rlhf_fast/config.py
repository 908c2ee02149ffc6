"""Typed settings of every command, from YAML and `--dotted.name value` overrides, checked as one tree."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
import tyro
import yaml
from pydantic import Field

from rlhf_fast import _check
from rlhf_fast._config_tree import (
    ConfigError,
    Dumper,
    Tree,
    build,
    defaults,
    merge,
    read_overrides,
    read_yaml,
)
from rlhf_fast.dialects import dialect
from rlhf_fast.losses import ADVANTAGES, RECIPES
from rlhf_fast.model.lora import LoraConfig
from rlhf_fast.preference import preference_loss
from rlhf_fast.preference_kinds import KINDS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ProperFraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Columns = Annotated[dict[str, str], tyro.conf.arg(metavar="[FIELD=COLUMN ...]")]
Folders = Annotated[dict[str, str], tyro.conf.arg(metavar="[NAME=FOLDER ...]")]
Weights = Annotated[dict[str, Finite], tyro.conf.arg(metavar="[SOURCE=WEIGHT ...]")]
GROUP_ADVANTAGES = tuple(kind for kind in ADVANTAGES if kind not in ("gae", "remax"))
"""Those of a trainer without a critic and without a greedy answer."""
T = TypeVar("T")
D = TypeVar("D", bound="DataclassInstance")


def _at_most(owner: object, name: str, value: int | None, limit_name: str, limit: int | None) -> None:
    if value is not None and limit is not None and value > limit:
        raise _check.error(ValueError, type(owner).__name__, name, value, f"at most {limit_name} = {limit}")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model and the adapters that sit on it."""

    path: Name
    """Folder of a Hugging Face causal language model (config, safetensors, tokenizer)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base; auto is bfloat16 where the device multiplies it natively, else float32."""
    shared_layers: CountOrZero = 0
    """First layers that carry no adapter, so one pass serves every role."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Shape of the adapters that are trained."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the others again in the backward: less memory, a third more arithmetic."""
    shard: bool = False
    """Under torchrun: every rank keeps its part of the frozen decoder layers, and gathers a layer when it runs (FSDP2). Batches and
    minibatches must be multiples of the ranks, and in trainers that sample shared_layers 0; rollouts hold the layers whole."""
    fold: tuple[Name, ...] = ()
    """Adapter folders merged into the frozen base before training (for example the SFT adapter)."""


def _no_trunk_to_share(owner: object, model: ModelConfig) -> None:
    if model.shard and model.shared_layers:
        expected = f"False with shared_layers = {model.shared_layers}, whose outputs stay with the rank that sampled"
        raise _check.error(ValueError, type(owner).__name__, "model.shard", True, expected)


@dataclass(frozen=True)
class DataConfig:
    """Texts or chats to learn from."""

    path: Name
    """A .jsonl, .json, .csv, .tsv or .parquet file, or the name of a dataset known to `datasets`."""
    kind: Literal["text", "chat", "prompt", "pair"] = "text"
    """Shape of the records: text, chat (messages), prompt, or pair (prompt, chosen, rejected)."""
    split: str | None = None
    """Split of a dataset given by name (train when left out)."""
    fields: Columns = field(default_factory=dict)
    """Where a field is found when its column has another name, for example text=review."""
    on_error: Literal["raise", "skip"] = "raise"
    """A malformed record: stop with file and line, or skip and count it."""
    limit: Count | None = None
    """Read at most this many records."""
    max_prompt_tokens: Count | None = None
    """Longest prompt in tokens."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest whole sequence in tokens."""
    overlong: Literal["error", "skip", "truncate"] = "error"
    """A record over those limits: stop, skip and count, or keep the last prompt tokens / first tokens."""
    eos: bool = True
    """Close plain texts and answers with end-of-sequence; switch it off for texts that were cut."""

    def __post_init__(self) -> None:
        _at_most(self, "max_prompt_tokens", self.max_prompt_tokens, "max_tokens", self.max_tokens)


@dataclass(frozen=True)
class PromptDataConfig(DataConfig):
    """Prompts to complete."""

    kind: Literal["prompt"] = "prompt"
    """Shape of the records: prompt."""


@dataclass(frozen=True)
class PairDataConfig(DataConfig):
    """Preference pairs: one prompt, a chosen and a rejected answer."""

    kind: Literal["pair"] = "pair"
    """Shape of the records: prompt, chosen, rejected."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: Positive = 2e-4
    """Peak learning rate."""
    betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Positive = 1e-5
    """Added to the root of the second moment; PyTorch's 1e-8 lets PPO take steps that spike the KL."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    warmup_ratio: ProperFraction = 0.0
    """Share of the steps over which the rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the rate after warm-up; linear and cosine end at 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class RunConfig:
    """Where the run writes, and how often."""

    output_dir: Name
    """Folder for adapters, checkpoints and metrics; new or empty unless resume or overwrite is given."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initialisation, shuffling and sampling."""
    resume: bool = False
    """Continue bit for bit from the newest complete checkpoint in output_dir."""
    overwrite: bool = False
    """Delete what an earlier run left in output_dir."""
    save_every: CountOrZero = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least two, so that a damaged one leaves another."""
    sample_every: CountOrZero = 10
    """Steps between tables of sampled completions; 0 shows none."""
    log_every: Count = 1
    """Steps between lines of metrics."""
    threads: Count | None = None
    """CPU threads (PyTorch's choice when left out)."""
    halve_on_oom: bool = True
    """Out of memory in an update: go on with micro-batches half as large (the same gradient but for rounding), or stop."""
    rank_timeout: Positive = 600.0
    """Under torchrun: seconds that a rank waits for the others before it gives up. A rank that dies is noticed at once."""
    slow_rank: Positive = 60.0
    """Under torchrun: seconds of waiting before a warning names who is late."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise _check.error(ValueError, "RunConfig", "overwrite", True, "False beside resume = True")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning of the policy adapter on texts or chats."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: Count = 1
    """Passes over the data."""
    batch_size: Count = 32
    """Sequences per optimizer step."""
    micro_batch_size: Count = 8
    """Sequences per forward pass; gradients add up to the one-shot gradient."""
    response_only: bool = True
    """Chats: learn the assistant's turns only. Plain texts always count whole."""
    packing: bool | None = None
    """The sequences of a micro-batch end to end, without padding; left out: where that is exact and no slower, which it is on a CPU
    and with flash-attn."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps."""

    def __post_init__(self) -> None:
        _at_most(self, "micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)


@dataclass(frozen=True)
class RewardConfig:
    """Bradley-Terry reward model: the reward adapter and its head, trained on preference pairs."""

    model: ModelConfig
    data: PairDataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    epochs: Count = 1
    """Passes over the pairs; reward models overfit quickly."""
    batch_size: Count = 32
    """Pairs per optimizer step."""
    micro_batch_size: Count = 8
    """Pairs per forward pass."""
    center_coef: NonNegative = 0.01
    """Weight of the squared sum of both scores, which keeps scores centred on 0."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of wrong labels."""
    packing: bool | None = None
    """The answers of a micro-batch end to end, without padding; left out: where that is exact and no slower."""
    eval_fraction: ProperFraction = 0.1
    """Share of the pairs held out for accuracy."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps."""

    def __post_init__(self) -> None:
        _at_most(self, "micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)


_CODE = re.compile(r"(?:.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")


def is_url(source: str) -> bool:
    """True for the address of a reward server."""
    return source.startswith(("http://", "https://"))


def is_callable_spec(source: str) -> bool:
    """True for `module:function` and `file.py:function`, False for a folder name or an address."""
    return not is_url(source) and _CODE.fullmatch(source) is not None


@dataclass(frozen=True)
class RewardSource:
    """What scores a completion: one source, or a weighted mix of several."""

    source: Name | None = None
    """Adapter folder of a trained reward role, a callable as module:function or file.py:function, or a server as http://..."""
    mix: Weights = field(default_factory=dict)
    """Several sources and their weights, instead of source."""
    normalize: Literal["none", "reference", "running"] = "none"
    """Shift and scale scores by nothing, by SFT completions before step 1, or by running moments."""
    clip: Positive | None = None
    """Scores are limited to this absolute value after normalisation."""
    workers: CountOrZero = 1
    """Processes that run callables, or requests to a server at once. 0 runs callables in the training process: no timeout, and
    a crash of theirs ends the run."""
    timeout: Positive = 120.0
    """Seconds a call of a callable or a request may take; then its worker is killed and replaced. A call holds call_size
    completions."""
    retries: CountOrZero = 3
    """Servers: further attempts, with growing pauses, after an error that may pass."""
    call_size: Count | None = None
    """Completions per call; left out, an equal share for each worker."""
    whole_batch: bool = False
    """Callables that compare the completions of a batch: one call gets all of them, and a failed one costs them all.
    Otherwise a score depends on its own completion alone, and a failed call is repeated one by one to find the culprits."""
    max_unscorable: Fraction = 0.1
    """The run stops when more than this share of a batch gets no score."""

    def __post_init__(self) -> None:
        if (self.source is None) == (not self.mix):
            got = f"{self.source!r} and mix {self.mix!r}"
            raise _check.error(ValueError, "RewardSource", "source", got, "exactly one of the two")
        if self.whole_batch and self.call_size is not None:
            raise _check.error(
                ValueError, "RewardSource", "call_size", self.call_size, "none beside whole_batch = True"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Source -> weight, whichever of the two forms was used."""
        return {self.source: 1.0} if self.source is not None else dict(self.mix)


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling of completions."""

    batch_size: Count = 64
    """Completions per step."""
    max_new_tokens: Count = 64
    """Longest completion in tokens."""
    min_new_tokens: CountOrZero = 0
    """End-of-sequence is not sampled before this many tokens."""
    temperature: Positive = 1.0
    """Logits are divided by this, when sampling and when scoring."""
    stop_at_eos: bool = True
    """End a completion at the first end-of-sequence token."""

    def __post_init__(self) -> None:
        _at_most(self, "min_new_tokens", self.min_new_tokens, "max_new_tokens", self.max_new_tokens)


@dataclass(frozen=True)
class RolloutConfig(GenerationConfig):
    """Sampling of completions, and what one that never ends is worth."""

    missing_eos: Literal["none", "replace", "subtract"] = "none"
    """A completion that never ends: keep its score, replace it by -penalty, or subtract the penalty."""
    missing_eos_penalty: NonNegative = 1.0
    """The penalty of missing_eos."""


@dataclass(frozen=True)
class KLConfig:
    """Penalty on the divergence from the reference policy."""

    kind: Literal["fixed", "adaptive"] = "fixed"
    """Constant coefficient, or the proportional controller of Ziegler et al. 2019 (arXiv:1909.08593)."""
    coef: NonNegative = 0.05
    """Coefficient of the per-token KL (its first value when adaptive)."""
    target: Positive = 6.0
    """Adaptive: KL per completion to steer towards, in nats."""
    horizon: Positive = 10_000.0
    """Adaptive: completions over which the coefficient reacts."""
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Per-token estimate; k1 = logprob - reference logprob is the unbiased one."""


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
        _at_most(self, "micro_batch_size", self.micro_batch_size, "minibatch_size", self.minibatch_size)
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
        _no_trunk_to_share(self, self.model)
        rollout = self.rollout.batch_size
        _at_most(self, "ppo.minibatch_size", self.ppo.minibatch_size, "rollout.batch_size", rollout)


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
    """Kind of group advantages, or returns for those without groups (that of the recipe when left out)."""
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
        _at_most(self, "micro_batch_size", self.micro_batch_size, "minibatch_size", self.minibatch_size)
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
        _no_trunk_to_share(self, self.model)
        size = self.rollout.batch_size
        _at_most(self, "group.minibatch_size", self.group.minibatch_size, "rollout.batch_size", size)
        if size % self.group_size:
            raise _check.error(
                ValueError, "GroupConfig", "group_size", self.group_size, f"a divisor of batch_size = {size}"
            )


@dataclass(frozen=True)
class PreferenceLossConfig:
    """A loss on pairs by name: a kind of rlhf_fast.preference_kinds.KINDS, or a weighted mix of several."""

    kind: Name = "dpo"
    """dpo, ipo, hinge, simpo, orpo, kto and others (`python -m rlhf_fast.tables`)."""
    mix: Weights = field(default_factory=dict)
    """Several kinds and their weights, instead of kind."""
    beta: Positive = 0.1
    """Inverse temperature: lower lets the policy leave the reference further behind."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of wrong labels, for the kinds that read it."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """f-divergence that holds the policy near the reference, for the kinds that read it."""
    options: Weights = field(default_factory=dict)
    """Further numbers of the kind by name: gamma, penalty, nll_coef, length_coef, tau, alpha, desirable_weight, undesirable_weight."""
    tail_weight: Fraction = 1.0
    """Weight of the tokens of the longer answer past the length of the shorter one (LD-DPO)."""

    def __post_init__(self) -> None:
        if self.mix and self.kind != "dpo":
            raise _check.error(
                ValueError, type(self).__name__, "mix", dict(self.mix), f"nothing beside kind = {self.kind!r}"
            )
        for name in self.options:
            known = (
                "gamma",
                "penalty",
                "nll_coef",
                "length_coef",
                "tau",
                "alpha",
                "desirable_weight",
                "undesirable_weight",
            )
            _check.choice(type(self).__name__, "options", name, known)
        # One pair through the loss finds what it does not know, or does not read.
        pair, kinds = torch.zeros(1), [KINDS[name] for name in self.kinds if name in KINDS]
        lengths = torch.ones(1, dtype=torch.int64) if any(k.per_token or k.lengths for k in kinds) else None
        reference = pair if self.needs_reference else None
        preference_loss(
            pair, pair, reference, reference, chosen_lengths=lengths, rejected_lengths=lengths,
            kl_logratios=pair if "kto" in self.kinds else None, **self.arguments(),
        )  # fmt: skip

    @property
    def kinds(self) -> dict[str, float]:
        """Kind -> weight, whichever of the two forms was used."""
        return dict(self.mix) or {self.kind: 1.0}

    @property
    def needs_reference(self) -> bool:
        """Whether a kind compares with the reference."""
        return any(KINDS[name].reference for name in self.kinds if name in KINDS)

    def arguments(self) -> dict[str, Any]:
        """Keywords of `preference_loss`."""
        return {
            "kind": self.kinds if self.mix else self.kind,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "divergence": self.divergence,
            **self.options,
        }


@dataclass(frozen=True)
class PreferenceConfig:
    """DPO and its kin: the policy adapter on preference pairs, the base itself for the reference."""

    model: ModelConfig
    data: PairDataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5, warmup_ratio=0.1))
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    epochs: Count = 1
    """Passes over the pairs."""
    batch_size: Count = 32
    """Pairs per optimizer step."""
    micro_batch_size: Count = 8
    """Pairs per forward pass; gradients add up to the one-shot gradient."""
    packing: bool | None = None
    """The answers of a micro-batch end to end, without padding; left out: where that is exact and no slower."""
    eval_fraction: ProperFraction = 0.1
    """Share of the pairs held out for accuracy."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps."""

    def __post_init__(self) -> None:
        _at_most(self, "micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        across = [name for name in self.loss.kinds if KINDS[name].across]
        if across and self.micro_batch_size != self.batch_size:
            expected = f"batch_size = {self.batch_size} with {across[0]}, which looks across the batch"
            raise _check.error(ValueError, "PreferenceConfig", "micro_batch_size", self.micro_batch_size, expected)


@dataclass(frozen=True)
class PlanConfig:
    """The memory of a run, part by part, from the shapes of its model."""

    model: Name
    """Folder with the config of a Hugging Face causal language model; its weights are not read."""
    trainer: Literal["ppo", "grpo", "dpo", "sft", "reward"] = "ppo"
    """Which run."""
    roles: tuple[Literal["policy", "reference", "value", "reward"], ...] = ()
    """Roles on the base (those of the trainer when left out)."""
    gpu: Literal["a100-40", "a100", "h100", "h200", "b200", "l40s", "rtx4090", "rtx5090"] | None = None
    """Device to fit; left out: a CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Shape of the adapters."""
    shared_layers: CountOrZero = 0
    """First layers without adapters."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer."""
    batch_size: Count = 64
    """Completions per step."""
    micro_batch_size: Count = 16
    """Sequences (pairs, for dpo and reward) per pass."""
    group_size: Count = 8
    """grpo: completions of each prompt."""
    prompt_tokens: Count = 128
    """Tokens of a prompt."""
    response_tokens: Count = 128
    """Tokens of a completion or an answer."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Completions of several policies on the same prompts, compared by judges."""

    model: ModelConfig
    data: PromptDataConfig
    run: RunConfig
    adapters: Folders = field(default_factory=dict)
    """Policies to compare with the plain model: a name and an adapter folder each."""
    baseline: str | None = None
    """Name of the policy the others are compared with (the plain model, `base`, when left out)."""
    rollout: GenerationConfig = field(default_factory=GenerationConfig)
    judges: tuple[Name, ...] = ()
    """Built-in judges, reward adapter folders, or callables as module:function or file.py:function."""
    samples_per_prompt: Count = 1
    """Completions of each prompt by each policy."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the confidence intervals."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the confidence intervals."""

    def __post_init__(self) -> None:
        if self.baseline not in (None, "base", *self.adapters):
            names = ["base", *self.adapters]
            raise _check.error(ValueError, "EvaluateConfig", "baseline", repr(self.baseline), f"one of {names}")


# Settings that name code or a server. A file that was handed over must not choose what runs, nor where completions go: only the
# command line may.
_CODE_KEYS = ("reward.source", "reward.mix", "judges")
# Settings that move, show or guard a run without changing its numbers.
_UNHASHED_KEYS = {
    "model": {"shard"},
    "run": {f.name for f in dataclasses.fields(RunConfig)} - {"seed"},
    "reward": {"workers", "timeout", "retries", "call_size", "max_unscorable"},
}


def resolve_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """Dtype of ModelConfig.dtype on a device ("cpu" or "cuda").

    "auto" is bfloat16 on CUDA and on CPUs with AVX512-BF16 or AMX, elsewhere float32: without those
    instructions a bfloat16 product on a CPU is several times slower than a float32 one. Raises ValueError.
    """
    if name == "auto":
        if device == "cpu":
            has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            native = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
        else:
            native = True
        return torch.bfloat16 if native else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"resolve_dtype: name must be auto, float32 or bfloat16, got {name!r}")
    return getattr(torch, name)


def load_config(
    cls: type[T], yaml_path: str | Path | None, overrides: Sequence[str] = (), *, allow_code: bool = False
) -> T:
    """Settings of type `cls`: an override beats the YAML file, the file beats the default.

    overrides: `--optim.lr 1e-5`, `--optim.lr=1e-5`, `--optim.betas 0.9 0.99`, `--run.resume`,
    `--run.no-resume`, `--data.fields text=review`. allow_code: let the file name Python callables and reward servers,
    which otherwise only an override may. Raises ConfigError.
    """
    file = Tree() if yaml_path is None else read_yaml(Path(yaml_path))
    values = merge(defaults(cls), file, cls)
    if not allow_code:
        _refuse_code(file)
    places = dict(file.places)
    for override in read_overrides(cls, overrides):
        values = merge(values, override, cls)
        places.update(override.places)
    return build(cls, values, places)


def _refuse_code(file: Tree) -> None:
    for key in _CODE_KEYS:
        value: Any = file.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        for source in [value] if isinstance(value, str) else value or ():
            if isinstance(source, str) and (is_callable_spec(source) or is_url(source)):
                what = "a server to send completions to" if is_url(source) else "code to run"
                raise ConfigError(
                    f"{file.places[key]}{key}: got {source!r}, but a settings file may not name {what}; "
                    f"give it on the command line as --{key}"
                )


def validate(config: D) -> D:
    """The same settings with every type and range checked, as if read from a file. Raises ConfigError."""
    return build(type(config), dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """YAML text that `load_config` reads back to an equal object."""
    return yaml.dump(_plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def config_hash(config: Any) -> str:
    """SHA-256 (hex) of the settings that can change a run's numbers; of `run` only the seed counts."""
    tree = _plain(validate(config))
    for section, keys in _UNHASHED_KEYS.items():
        for key in keys:
            tree.get(section, {}).pop(key, None)
    text = json.dumps([type(config).__name__, tree], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def config_help(cls: type, prog: str, description: str | None = None) -> str:
    """Help text with every override, its meaning and its default."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(cls, prog=prog, description=description or cls.__doc__, args=["--help"])
    return text.getvalue()


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))
