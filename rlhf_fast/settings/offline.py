"""Settings of the trainers that learn from data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from rlhf_fast import _check
from rlhf_fast.preference import preference_loss
from rlhf_fast.preference_kinds import KINDS
from rlhf_fast.settings.common import (
    Count,
    DataConfig,
    Fraction,
    LabelDataConfig,
    ModelConfig,
    Name,
    NonNegative,
    OptimConfig,
    PairDataConfig,
    Positive,
    ProperFraction,
    RunConfig,
    Weights,
    at_most,
)


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
        at_most(self, "micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)


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
        at_most(self, "micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)


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
        at_most(self, "micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        whole_batches(self, "micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size, self.loss)


def whole_batches(owner: object, name: str, size: int, limit_name: str, limit: int, loss: PreferenceLossConfig) -> None:
    across = [kind for kind in loss.kinds if KINDS[kind].across]
    if across and size != limit:
        expected = f"{limit_name} = {limit} with {across[0]}, which looks across the batch"
        raise _check.error(ValueError, type(owner).__name__, name, size, expected)


@dataclass(frozen=True)
class KTOConfig:
    """KTO (arXiv:2402.01306) on answers that are judged alone; `dpo` with the kind kto takes them from pairs."""

    model: ModelConfig
    data: LabelDataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5, warmup_ratio=0.1))
    beta: Positive = 0.1
    """Inverse temperature: lower lets the policy leave the reference further behind."""
    desirable_weight: Positive = 1.0
    """Weight of the losses of desirable answers."""
    undesirable_weight: Positive = 1.0
    """Weight of the losses of the others. The paper keeps desirable_weight n_desirable / (undesirable_weight n_undesirable) in
    [1, 4/3]; a run outside says so."""
    balance: bool = False
    """Raise one of the weights until that holds for the data of the run."""
    epochs: Count = 1
    """Passes over the answers."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Answers per optimizer step; the baseline comes from those of a batch put to each other's prompts."""
    micro_batch_size: Count = 8
    """Answers per forward pass; gradients add up to the one-shot gradient."""
    packing: bool | None = None
    """The answers of a micro-batch end to end, without padding; left out: where that is exact and no slower."""
    eval_fraction: ProperFraction = 0.1
    """Share of the answers held out for their implicit rewards."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps."""

    def __post_init__(self) -> None:
        at_most(self, "micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
