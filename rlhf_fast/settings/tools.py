"""Settings of the commands that do not train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from rlhf_fast import _check
from rlhf_fast.model.lora import LoraConfig
from rlhf_fast.settings.common import (
    Count,
    CountOrZero,
    Folders,
    GenerationConfig,
    ModelConfig,
    Name,
    Positive,
    PromptDataConfig,
    Resources,
    RunConfig,
    not_offloaded_beside,
)


@dataclass(frozen=True)
class PlanConfig:
    """The memory of a run, part by part, from the shapes of its model."""

    model: Name
    """Folder with the config of a Hugging Face causal language model; its weights are not read."""
    trainer: Literal["ppo", "grpo", "online-dpo", "raft", "dpo", "kto", "sft", "reward"] = "ppo"
    """Which run."""
    roles: tuple[Literal["policy", "reference", "value", "reward"], ...] = ()
    """Roles on the base (those of the trainer when left out)."""
    gpu: Literal["a100-40", "a100", "h100", "h200", "b200", "l40s", "rtx4090", "rtx5090"] | None = None
    """Device to fit; left out: a CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Linear layers of the base in 8 or 4 bits."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Shape of the adapters."""
    shared_layers: CountOrZero = 0
    """First layers without adapters."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer."""
    batch_size: Count = 64
    """Completions per step."""
    micro_batch_size: Count | None = 16
    """Sequences (pairs, for dpo, online-dpo and reward) per pass; none: the largest that fits, up to batch_size."""
    memory_gib: Positive | None = None
    """GiB of which the plan may fill 90 %, on a CPU with the processes themselves; left out: those of the GPU, any number on a CPU."""
    group_size: Count = 8
    """grpo, online-dpo, raft: completions of each prompt."""
    greedy: bool = False
    """grpo: one more completion of each prompt, the greedy one (group.advantages = remax)."""
    old_logprobs: Literal["scored", "sampled"] = "scored"
    """Whether scoring runs the policy (rollout.old_logprobs)."""
    ranks: Count = 1
    """Processes that share the run under torchrun; batch_size is of all of them, the plan is of one."""
    shard: bool = False
    """Every rank keeps its part of the frozen decoder layers (model.shard)."""
    offload: bool = False
    """Frozen decoder layers in host memory, two at a time on the GPU (model.offload); nothing on a CPU."""
    optim_offload: bool = False
    """Adam's moments and step in host memory (optim.offload); nothing on a CPU."""
    engine: Literal["local", "process", "vllm"] = "local"
    """Where completions are sampled: in the trainer, in a second process, which on a CPU has a plan of its own, or in a server, whose
    memory is not planned here."""
    prompt_tokens: Count = 128
    """Tokens of a prompt."""
    response_tokens: Count = 128
    """Tokens of a completion or an answer."""

    def __post_init__(self) -> None:
        not_offloaded_beside(self, self.offload, self.quantize, self.shard)


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


@dataclass(frozen=True)
class RayConfig:
    """Where the processes of a run go on a Ray cluster."""

    address: Name | None = None
    """host:port of the cluster (RAY_ADDRESS, else the one of this node, when left out)."""
    ranks: Count = 1
    """Processes that share the training."""
    cpus_per_rank: CountOrZero = 1
    """CPUs of each."""
    gpus_per_rank: Annotated[int, Field(ge=0, le=1)] = 1
    """GPUs of each: one, or none on a CPU."""
    rank_resources: Resources = field(default_factory=dict)
    """Further resources that each takes, which pick its nodes: those of `ray start --resources`."""
    vllm_cpus: CountOrZero = 1
    """CPUs of the vLLM server, placed with rollout.engine = vllm and rollout.vllm.python."""
    vllm_gpus: CountOrZero = 1
    """Its GPUs, all on one node: more than one share the model by --tensor-parallel-size, unless rollout.vllm.arguments say otherwise."""
    vllm_resources: Resources = field(default_factory=dict)
    """Further resources that the server takes."""
    timeout: Positive = 300.0
    """Seconds to wait for resources that others hold."""
    grace: Positive = 60.0
    """Seconds that the ranks have after Ctrl-C or SIGTERM to end their step and save."""
