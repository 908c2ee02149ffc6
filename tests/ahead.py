"""Settings of small runs that sample ahead of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from runs import SCORERS

from rlhf_fast.config import (
    GroupConfig,
    GroupKLConfig,
    GroupUpdateConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOUpdateConfig,
    ProcessConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
)
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.train.group import train_group
from rlhf_fast.train.ppo import train_ppo

AHEAD = RolloutConfig(batch_size=8, max_new_tokens=6, engine="process", staleness=1, process=ProcessConfig(threads=1))


def disturb(model: SharedModel, seed: int) -> SharedModel:
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.2, generator=generator)
    return model


def settings(source: Path, **changes: object) -> ModelConfig:
    base = ModelConfig(str(source / "model"), "float32", 1, LoraConfig(r=2, alpha=8.0))
    return dataclasses.replace(base, **changes)


def beside(source: Path) -> ModelConfig:
    """With a fold, and an adapter that no pipe holds."""
    return settings(source, fold=(str(source / "fold"),), lora=LoraConfig(r=256, alpha=8.0))


def common(source: Path, folder: Path, rollout: RolloutConfig, **run: object) -> dict:
    return {
        "model": settings(source),
        "data": PromptDataConfig(str(source / "prompts.jsonl")),
        "run": RunConfig(str(folder), **{"sample_every": 0, "save_every": 1, "threads": 1, **run}),
        "reward": RewardSource(f"{SCORERS}:count_e", normalize="running", workers=0),
        "optim": OptimConfig(lr=2e-2),
        "rollout": rollout,
        "steps": 5,
    }


def of_ppo(source: Path, folder: Path, rollout: RolloutConfig = AHEAD, **run: object) -> PPOConfig:
    ppo = PPOUpdateConfig(epochs=2, minibatch_size=4, micro_batch_size=4)
    return PPOConfig(**common(source, folder, rollout, **run), ppo=ppo, kl=KLConfig(kind="adaptive", horizon=100.0))


def of_group(source: Path, folder: Path, rollout: RolloutConfig = AHEAD, **run: object) -> GroupConfig:
    update = GroupUpdateConfig(minibatch_size=8, micro_batch_size=4)
    return GroupConfig(
        **common(source, folder, rollout, **run), group=update, group_size=4, kl=GroupKLConfig(coef=0.05)
    )


TRAINERS = {"ppo": (train_ppo, of_ppo), "grpo": (train_group, of_group)}
