"""Small runs of every trainer whose numbers do not depend on how many ranks train: no dropout, whose draws are a rank's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from runs import SCORERS

from rlhf_fast.config import (
    DataConfig,
    GroupConfig,
    GroupKLConfig,
    GroupUpdateConfig,
    KLConfig,
    KTOConfig,
    LabelDataConfig,
    ModelConfig,
    OnlineDPOConfig,
    OnlineDPOUpdateConfig,
    OptimConfig,
    PairDataConfig,
    PPOConfig,
    PPOUpdateConfig,
    PreferenceConfig,
    PreferenceLossConfig,
    PromptDataConfig,
    RaftConfig,
    RaftUpdateConfig,
    RewardConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    SFTConfig,
)
from rlhf_fast.model import LoraConfig
from rlhf_fast.train import group, kto, online_dpo, ppo, preference, raft, reward, sft

SCORE = RewardSource(f"{SCORERS}:count_e", normalize="running", workers=0)


def common(source: Path, folder: Path, shared_layers: int = 0, data: str = "prompts", **run: object) -> dict:
    """Without dropout, whose draws are a rank's own."""
    run = {"sample_every": 0, "save_every": 1000, "threads": 1, **run}
    model = ModelConfig(str(source / "model"), "float32", shared_layers, LoraConfig(r=2, alpha=8.0))
    kinds = {"texts": DataConfig, "prompts": PromptDataConfig, "pairs": PairDataConfig, "labels": LabelDataConfig}
    return {"model": model, "data": kinds[data](str(source / f"{data}.jsonl")), "run": RunConfig(str(folder), **run)}


def of_sft(source: Path, folder: Path, changes: dict | None = None, **run: object) -> SFTConfig:
    more = {"batch_size": 4, "micro_batch_size": 1, "max_steps": 4, "epochs": 9, "optim": OptimConfig(lr=2e-2)}
    return SFTConfig(**{**common(source, folder, data="texts", **run), **more, **(changes or {})})


def of_reward(source: Path, folder: Path, **run: object) -> RewardConfig:
    more = {"batch_size": 5, "micro_batch_size": 2, "max_steps": 3, "epochs": 9, "optim": OptimConfig(lr=1e-2)}
    return RewardConfig(**common(source, folder, data="pairs", **run), **more)


def of_pairs(kind: str) -> Callable:
    def config(source: Path, folder: Path, **run: object) -> PreferenceConfig:
        size = 3 if kind == "aot_unpaired" else 1  # it compares the pairs of all ranks
        more = {"batch_size": 3, "micro_batch_size": size, "max_steps": 3, "eval_fraction": 0.25}
        loss, optim = PreferenceLossConfig(kind), OptimConfig(lr=1e-2)
        return PreferenceConfig(**common(source, folder, data="pairs", **run), **more, loss=loss, optim=optim)

    return config


def of_kto(source: Path, folder: Path, **run: object) -> KTOConfig:
    more = {
        "batch_size": 3,
        "micro_batch_size": 1,
        "max_steps": 3,
        "eval_fraction": 0.25,
        "optim": OptimConfig(lr=1e-2),
    }
    return KTOConfig(**common(source, folder, data="labels", **run), **more)


def of_ppo(shared_layers: int, minibatch_size: int = 3, reward: RewardSource = SCORE) -> Callable:
    def config(source: Path, folder: Path, changes: dict | None = None, **run: object) -> PPOConfig:
        base = PPOConfig(
            **common(source, folder, shared_layers, **run),
            reward=reward,
            optim=OptimConfig(lr=1e-2),
            rollout=RolloutConfig(batch_size=6, max_new_tokens=6),
            kl=KLConfig(kind="adaptive", horizon=100.0),
            ppo=PPOUpdateConfig(epochs=2, minibatch_size=minibatch_size, micro_batch_size=2),
            steps=3,
        )
        return dataclasses.replace(base, **(changes or {}))

    return config


def of_group(recipe: str, shared_layers: int = 0, **reward: object) -> Callable:
    def config(source: Path, folder: Path, **run: object) -> GroupConfig:
        return GroupConfig(
            **common(source, folder, shared_layers, **run),
            reward=dataclasses.replace(SCORE, **reward),
            rollout=RolloutConfig(batch_size=12, max_new_tokens=6),
            group_size=4,
            group=GroupUpdateConfig(recipe, minibatch_size=6, micro_batch_size=2),
            kl=GroupKLConfig(coef=0.1 if recipe == "grpo" else 0.0),
            optim=OptimConfig(lr=1e-3),
            steps=3,
        )

    return config


def of_online_dpo(shared_layers: int, across: bool = False) -> Callable:
    def config(source: Path, folder: Path, changes: dict | None = None, **run: object) -> OnlineDPOConfig:
        size = 3 if across else 1
        base = OnlineDPOConfig(
            **common(source, folder, shared_layers, **run),
            reward=SCORE,
            rollout=RolloutConfig(batch_size=12, max_new_tokens=6),
            group_size=4,
            loss=PreferenceLossConfig(mix={"aot_unpaired" if across else "dpo": 0.5, "kto": 0.3, "bco": 0.2}),
            dpo=OnlineDPOUpdateConfig(epochs=2, minibatch_size=max(size, 2), micro_batch_size=size),
            optim=OptimConfig(lr=1e-3),
            steps=3,
        )
        return dataclasses.replace(base, **(changes or {}))

    return config


def of_raft(shared_layers: int) -> Callable:
    def config(source: Path, folder: Path, changes: dict | None = None, **run: object) -> RaftConfig:
        base = RaftConfig(
            **common(source, folder, shared_layers, **run),
            reward=SCORE,
            rollout=RolloutConfig(batch_size=12, max_new_tokens=6),
            group_size=4,
            raft=RaftUpdateConfig(best=2, epochs=2, minibatch_size=4, micro_batch_size=2),
            optim=OptimConfig(lr=1e-3),
            steps=3,
        )
        return dataclasses.replace(base, **(changes or {}))

    return config


RUNS: dict[str, tuple[Callable, Callable]] = {
    "sft": (sft.train_sft, of_sft),
    "reward": (reward.train_reward, of_reward),
    "dpo": (preference.train_preference, of_pairs("dpo")),
    "kto": (preference.train_preference, of_pairs("kto")),
    "kto without pairs": (kto.train_kto, of_kto),
    "bco": (preference.train_preference, of_pairs("bco")),
    "aot": (preference.train_preference, of_pairs("aot_unpaired")),
    "ppo": (ppo.train_ppo, of_ppo(0)),
    "ppo with steps": (
        ppo.train_ppo,
        of_ppo(0, reward=RewardSource(f"{SCORERS}:e_per_step", workers=0, separator=" ")),
    ),
    # Its rows stay with their trunk: a rank has two, one or none of a minibatch of two.
    "ppo with shared layers": (ppo.train_ppo, of_ppo(1, minibatch_size=2)),
    "grpo": (group.train_group, of_group("grpo", shared_layers=1)),
    # Three prompts on two ranks, advantages that look at all of them, scores from one call for all of them.
    "lite_ppo": (group.train_group, of_group("lite_ppo", whole_batch=True)),
    "remax": (group.train_group, of_group("remax", shared_layers=1)),
    "online-dpo": (online_dpo.train_online_dpo, of_online_dpo(0)),
    "online-dpo with shared layers": (online_dpo.train_online_dpo, of_online_dpo(1)),
    "online-dpo across pairs": (online_dpo.train_online_dpo, of_online_dpo(0, across=True)),
    "online-dpo across pairs with shared layers": (online_dpo.train_online_dpo, of_online_dpo(1, across=True)),
    "raft": (raft.train_raft, of_raft(1)),
}
