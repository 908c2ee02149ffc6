"""A small run of every command that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from models import save_tiny
from runs import SCORERS, TEXTS, write_lines

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

STEPS = 6
DATA = {
    DataConfig: ("texts.jsonl", [{"text": t} for t in TEXTS * 2]),
    PromptDataConfig: ("prompts.jsonl", [{"prompt": t[:8]} for t in TEXTS]),
    PairDataConfig: (
        "pairs.jsonl",
        [{"prompt": "", "chosen": f"a good film {c}.", "rejected": f"a bad story {c}."} for c in "abcdefghijkl"],
    ),
    LabelDataConfig: (
        "labels.jsonl",
        [{"prompt": t[:5], "completion": t[5:], "label": n % 3 == 0} for n, t in enumerate(TEXTS * 2) if t[5:]],
    ),
}


def save_source(folder: Path) -> Path:
    """The model and the data of RUNS."""
    save_tiny(folder / "model")
    for name, rows in DATA.values():
        write_lines(folder / name, rows)
    return folder


class Kind(NamedTuple):
    """A run of STEPS steps whose data, draws and moving parts a resume has to find again."""

    train: Callable[[Any], Path]
    settings: type
    data: type
    changes: dict[str, Any]
    updates: int = 1
    """Of a step."""

    def config(self, source: Path, folder: Path, *, resume: bool = False, save_every: int = 1000) -> Any:
        # Dropout draws from a generator of the process, which a resume has to put back.
        lora = LoraConfig(r=2, alpha=8.0, dropout=0.2)
        return self.settings(
            model=ModelConfig(str(source / "model"), dtype="float32", lora=lora),
            data=self.data(str(source / DATA[self.data][0])),
            run=RunConfig(str(folder), sample_every=0, save_every=save_every, resume=resume, threads=1),
            **self.changes,
        )


# Epochs end within a batch, so that a resume has to know how far it came in which order.
OFFLINE = {"epochs": 9, "max_steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "optim": OptimConfig(lr=1e-2)}
ONLINE = {
    "reward": RewardSource(f"{SCORERS}:count_e", normalize="running", workers=0),
    "optim": OptimConfig(lr=1e-2),
    "rollout": RolloutConfig(batch_size=6, max_new_tokens=6),
    "steps": STEPS,
}

RUNS = {
    "sft": Kind(sft.train_sft, SFTConfig, DataConfig, OFFLINE),
    "reward": Kind(reward.train_reward, RewardConfig, PairDataConfig, OFFLINE),
    "dpo": Kind(preference.train_preference, PreferenceConfig, PairDataConfig, OFFLINE),
    "dpo: kto and bco": Kind(  # a baseline from the batch, and one that is kept between steps
        preference.train_preference,
        PreferenceConfig,
        PairDataConfig,
        {**OFFLINE, "loss": PreferenceLossConfig(mix={"kto": 0.5, "bco": 0.5})},
    ),
    "kto": Kind(kto.train_kto, KTOConfig, LabelDataConfig, {**OFFLINE, "balance": True}),
    "ppo": Kind(
        ppo.train_ppo,
        PPOConfig,
        PromptDataConfig,
        {
            **ONLINE,
            "reward": RewardSource(f"{SCORERS}:count_e", normalize="running"),  # in a process of its own
            "kl": KLConfig(kind="adaptive", horizon=100.0),
            "ppo": PPOUpdateConfig(epochs=2, minibatch_size=3, micro_batch_size=3),
        },
        4,
    ),
    "ppo: steps": Kind(
        ppo.train_ppo,
        PPOConfig,
        PromptDataConfig,
        {
            **ONLINE,
            "reward": RewardSource(f"{SCORERS}:e_per_step", normalize="running", workers=0, separator=" "),
            "ppo": PPOUpdateConfig(epochs=1, minibatch_size=6, micro_batch_size=3),
        },
    ),
    "grpo": Kind(
        group.train_group,
        GroupConfig,
        PromptDataConfig,
        {
            **ONLINE,
            "group_size": 3,
            "kl": GroupKLConfig(kind="adaptive", coef=0.1, horizon=100.0),
            "group": GroupUpdateConfig(epochs=2, minibatch_size=3, micro_batch_size=2, entropy_coef=0.01),
        },
        4,
    ),
    "grpo: covariances": Kind(  # draws of the update
        group.train_group,
        GroupConfig,
        PromptDataConfig,
        {**ONLINE, "group_size": 3, "group": GroupUpdateConfig("clip_cov", minibatch_size=3, micro_batch_size=3)},
        2,
    ),
    "grpo: remax": Kind(
        group.train_group,
        GroupConfig,
        PromptDataConfig,
        {**ONLINE, "group_size": 2, "group": GroupUpdateConfig("remax", minibatch_size=6, micro_batch_size=3)},
    ),
    "online-dpo": Kind(
        online_dpo.train_online_dpo,
        OnlineDPOConfig,
        PromptDataConfig,
        {
            **ONLINE,
            "reward": RewardSource(
                f"{SCORERS}:spread", normalize="running", workers=0
            ),  # no ties, so that all batches have pairs
            "group_size": 3,
            "loss": PreferenceLossConfig(mix={"dpo": 0.5, "kto": 0.2, "bco": 0.3}),
            "dpo": OnlineDPOUpdateConfig(epochs=2, micro_batch_size=1),
        },
        2,
    ),
    "raft": Kind(
        raft.train_raft,
        RaftConfig,
        PromptDataConfig,
        {**ONLINE, "group_size": 3, "raft": RaftUpdateConfig(best=2, epochs=2, minibatch_size=3, micro_batch_size=2)},
        4,
    ),
}
