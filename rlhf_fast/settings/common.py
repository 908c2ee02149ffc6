"""Kinds of values, and the sections that several commands share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from pydantic import Field

from rlhf_fast import _check, corrections
from rlhf_fast.model.lora import LoraConfig

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
Resources = Annotated[dict[str, Positive], tyro.conf.arg(metavar="[RESOURCE=AMOUNT ...]")]


_DEVICE = re.compile(r"auto|cpu|cuda|cuda:(0|[1-9]\d{0,2})")


def known_device(owner: object, name: str) -> None:
    if not _DEVICE.fullmatch(name):
        raise _check.error(ValueError, type(owner).__name__, "device", repr(name), "auto, cpu, cuda or cuda:N")


def at_most(owner: object, name: str, value: int | None, limit_name: str, limit: int | None) -> None:
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
    quantize: Literal["none", "int8", "nf4"] = "none"
    """The linear layers of the frozen base, but the LM head, in 8 or 4 bits by bitsandbytes (the extra `quant`); adapters stay fp32."""
    shard: bool = False
    """Under torchrun: every rank keeps its part of the frozen decoder layers, and gathers a layer when it runs (FSDP2). Batches and
    minibatches must be multiples of the ranks, and in trainers that sample shared_layers 0; rollouts hold the layers whole."""
    offload: bool = False
    """On a GPU: the frozen decoder layers stay in page-locked host memory and are copied to the device when they run, the next while one
    computes; two are there at a time. The same results; a training pass copies each layer twice, a rollout all of them for every token.
    Every rank under torchrun holds its own. On a CPU nothing changes."""
    fold: tuple[Name, ...] = ()
    """Adapter folders merged into the frozen base before training (for example the SFT adapter)."""

    def __post_init__(self) -> None:
        if self.quantize != "none" and (self.shard or self.fold):
            name = "shard" if self.shard else "fold"
            expected = f"nothing beside quantize = {self.quantize}"
            raise _check.error(ValueError, "ModelConfig", name, getattr(self, name), expected)
        not_offloaded_beside(self, self.offload, self.quantize, self.shard)


def not_offloaded_beside(owner: object, offload: bool, quantize: str, shard: bool) -> None:
    if offload and (shard or quantize != "none"):
        beside = "shard, which spreads the layers over GPUs" if shard else f"quantize = {quantize}, whose scales stay"
        raise _check.error(ValueError, type(owner).__name__, "offload", True, f"False beside {beside}")


def no_trunk_to_share(owner: object, model: ModelConfig) -> None:
    if model.shard and model.shared_layers:
        expected = f"False with shared_layers = {model.shared_layers}, whose outputs stay with the rank that sampled"
        raise _check.error(ValueError, type(owner).__name__, "model.shard", True, expected)


@dataclass(frozen=True)
class DataConfig:
    """Texts or chats to learn from."""

    path: Name
    """A .jsonl, .json, .csv, .tsv or .parquet file, or the name of a dataset known to `datasets`."""
    kind: Literal["text", "chat", "prompt", "pair", "label"] = "text"
    """Shape of the records: text, chat (messages), prompt, pair (prompt, chosen, rejected), or label (prompt, completion, label)."""
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
        at_most(self, "max_prompt_tokens", self.max_prompt_tokens, "max_tokens", self.max_tokens)


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
class LabelDataConfig(DataConfig):
    """Answers that are judged alone: a prompt, a completion, and whether it is a desirable one."""

    kind: Literal["label"] = "label"
    """Shape of the records: prompt, completion, label."""


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
    offload: bool = False
    """On a GPU: AdamW's moments are in host memory and its step runs on the CPU; gradients go there, parameters come back. The numbers
    round in other places. On a CPU nothing changes."""


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
    device: Name = "auto"
    """Where the model is: cpu, cuda, cuda:N, or auto for cuda where there is one; cuda is the GPU of the local rank under torchrun.
    A run may resume on another kind of device if the dtype stays: from there on its numbers round in other places."""
    threads: Count | None = None
    """CPU threads (PyTorch's choice when left out)."""
    memory_gib: Positive | None = None
    """On a CPU: GiB that the process may take, libraries and data included, and that of rollout.engine = process with it. micro_batch_size is then the most: the run takes the largest
    that `rlhf-fast plan` finds room for in 90 % of it, or refuses to start. What lives is all that is held: blocks go back to the system as they die,
    which costs time (about a fifth of a step of a small model)."""
    halve_on_oom: bool = True
    """Out of memory in an update: go on with micro-batches half as large (the same gradient but for rounding), or stop."""
    rank_timeout: Positive = 600.0
    """Under torchrun: seconds that a rank waits for the others before it gives up. A rank that dies is noticed at once."""
    slow_rank: Positive = 60.0
    """Under torchrun: seconds of waiting before a warning names who is late."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        known_device(self, self.device)
        if self.resume and self.overwrite:
            raise _check.error(ValueError, "RunConfig", "overwrite", True, "False beside resume = True")


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
    separator: Name | None = None
    """Process rewards (ppo, and grpo with advantages = returns): completions are cut into steps behind each separator. A callable or
    server gets the list of steps of each completion and gives a list of one score for each; an adapter is read at the end of each."""
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


def no_steps(owner: object, reward: RewardSource, expected: str) -> None:
    if reward.separator is not None:
        got = repr(reward.separator)
        raise _check.error(ValueError, type(owner).__name__, "reward.separator", got, expected)


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
        at_most(self, "min_new_tokens", self.min_new_tokens, "max_new_tokens", self.max_new_tokens)


@dataclass(frozen=True)
class ProcessConfig:
    """A second process that samples."""

    threads: Count | None = None
    """Its CPU threads (PyTorch's choice when left out)."""
    device: Name = "cpu"
    """Where it samples: auto, cpu, cuda or cuda:N, as run.device."""
    timeout: Positive = 600.0
    """Seconds to wait for a batch; then the run stops, and can be resumed."""

    def __post_init__(self) -> None:
        known_device(self, self.device)


@dataclass(frozen=True)
class VLLMConfig:
    """A vLLM server that samples: one that the run starts, or one that runs elsewhere, on another host for instance."""

    python: Name | None = None
    """Python of the environment that vLLM is installed in: the run starts a server with it, which ends with the run."""
    server: Name | None = None
    """Instead, a server that runs: http://host:port. It serves model.path without folds, with --enable-lora, a --max-lora-rank for
    adapter and folds together, --logprobs-mode processed_logprobs and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."""
    arguments: tuple[Name, ...] = ()
    """Further arguments for the server that the run starts, for example --gpu-memory-utilization=0.4."""
    adapters: Name | None = None
    """Folder through which adapters are handed over, which a server elsewhere sees under the same path (vllm in run.output_dir when
    left out)."""
    requests: Count = 256
    """Completions asked for at once."""
    start_timeout: Positive = 900.0
    """Seconds in which the server that the run starts has to answer."""
    timeout: Positive = 600.0
    """Seconds that a completion may take, with the time it waits for others."""
    retries: CountOrZero = 3
    """Further attempts, with growing pauses, after a connection that fails, a timeout or a busy server."""


@dataclass(frozen=True)
class RolloutConfig(GenerationConfig):
    """Sampling of completions, and what one that never ends is worth."""

    missing_eos: Literal["none", "replace", "subtract"] = "none"
    """A completion that never ends: keep its score, replace it by -penalty, or subtract the penalty."""
    missing_eos_penalty: NonNegative = 1.0
    """The penalty of missing_eos."""
    engine: Literal["local", "process", "vllm"] = "local"
    """Who samples: the training process, a second one with the base and the newest adapter (under torchrun one for each rank), or a
    vLLM server (one for all ranks)."""
    staleness: CountOrZero = 0
    """Batches that an engine samples ahead while others are trained on, each by the policy of so many steps before; 0 waits."""
    correction: Name | None = None
    """Importance weights for what an older policy or another engine sampled: none, or a kind of rlhf_fast.corrections (token-tis when
    left out and the sampling policy is not the one in training, bit for bit). With min_new_tokens they hold the probability of an
    early end as well, which that took from who sampled."""
    old_logprobs: Literal["scored", "sampled"] = "scored"
    """Log-probs that an update compares with: those of a pass by the arithmetic of the update, so that every ratio begins at 1 exactly, or
    those that came with the completions, which saves the policy's part of scoring and differs by rounding (some 1e-6 in fp32)."""
    process: ProcessConfig = field(default_factory=ProcessConfig)
    """The second process of engine = process."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """The server of engine = vllm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if self.correction is not None:
            _check.choice(owner, "correction", self.correction, ("none", *corrections.KINDS))
        if self.staleness and self.engine == "local":
            expected = "0 with engine = local, which samples with the model in training"
            raise _check.error(ValueError, owner, "staleness", self.staleness, expected)
        if self.old_logprobs == "sampled":
            differs = self.engine == "vllm" or self.staleness or self.correction not in (None, "none")
            if differs or self.min_new_tokens:
                got = f"{self.old_logprobs!r} with engine = {self.engine}, staleness = {self.staleness}"
                got += f", correction = {self.correction}, min_new_tokens = {self.min_new_tokens}"
                expected = "scored unless the policy in training samples, without a correction and a shortest length"
                raise _check.error(ValueError, owner, "old_logprobs", got, expected)
        if self.engine == "vllm" and (self.vllm.python is None) == (self.vllm.server is None):
            got = f"{self.vllm.python!r} and server {self.vllm.server!r}"
            raise _check.error(ValueError, owner, "vllm.python", got, "exactly one of the two")

    def same_policy(self, device: str) -> bool:
        """Whether completions come from the policy in training, by the same arithmetic. device: kind of that of the training."""
        on_cpus = self.engine == "process" and self.process.device == device == "cpu"
        return (self.engine == "local" or on_cpus) and not self.staleness

    def weighted(self, device: str) -> str | None:
        """Kind of the importance weights, None for none."""
        kind = self.correction or ("none" if self.same_policy(device) else "token-tis")
        return None if kind == "none" else kind


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
