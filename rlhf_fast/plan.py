"""`rlhf-fast plan`: the memory of a run before it runs, part by part, from the shapes of the model alone.

The passes are those of the model's own code (plan_passes.py). The rest is arithmetic: weights, adapters, their gradients and moments
to the byte, a rollout's cache and packed weights, the chunks of the LM head. On a CPU the process itself counts, as it stands.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rlhf_fast import _check
from rlhf_fast._allocator import resident_bytes
from rlhf_fast.config import PlanConfig, resolve_dtype
from rlhf_fast.model.offload import Block, streamed
from rlhf_fast.plan_passes import LiveBytes, Passes, head_bytes, storage_bytes

GPUS = {"a100-40": 40, "a100": 80, "h100": 80, "h200": 141, "b200": 180, "l40s": 48, "rtx4090": 24, "rtx5090": 32}
"""GiB of memory by the makers' data sheets."""
ROLES = {
    "sft": (("policy",), ("policy",)),
    "reward": (("reward",), ("reward",)),
    "dpo": (("policy", "reference"), ("policy",)),
    "kto": (("policy", "reference"), ("policy",)),
    "grpo": (("policy", "reference"), ("policy",)),
    "online-dpo": (("policy", "reference"), ("policy",)),
    "raft": (("policy",), ("policy",)),
    "ppo": (("policy", "reference", "value", "reward"), ("policy", "value")),
}
"""(roles, those that train) by trainer."""
SAMPLE, IN_GROUPS, PAIRS = (
    ("ppo", "grpo", "online-dpo", "raft"),
    ("grpo", "online-dpo", "raft"),
    ("dpo", "online-dpo", "reward"),
)
"""Trainers that learn from their own samples, those with several of a prompt, and those whose micro-batches are of pairs."""
FREE = 0.9
"""Share of a budget that a plan may fill. A GPU's context and libraries, the holes between blocks, and on a CPU what a process touches of
its libraries at the first step (some 35 MiB, bench/plan.py) are not in it."""


class DoesNotFit(ValueError):
    """No micro-batch fits the budget; the message has the plan of the smallest."""


@dataclass
class Plan:
    """Bytes by part of one process. `always` is there all the time; of `phases` one at a time. `host`: what a GPU leaves to the memory
    of its host."""

    always: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    micro_batch_size: int = 1
    sampler: Plan | None = None
    """Of the second process, where one samples."""

    @property
    def peak(self) -> int:
        """Bytes of the widest moment of this process."""
        return sum(self.always.values()) + max(self.phases.values())

    @property
    def total(self) -> int:
        """With those of the second process. What both map of one file is in memory once, and counted twice."""
        return self.peak + (0 if self.sampler is None else self.sampler.peak)

    def lines(self, gpu: str | None = None) -> list[str]:
        """For a reader."""
        rows = [
            *((name, "", n) for name, n in self.always.items()),
            *((n, "one at a time", b) for n, b in self.phases.items()),
        ]
        found = [f"{name:36} {size / 2**20:12,.1f} MiB  {note}".rstrip() for name, note, size in rows]
        found.append(f"{'peak':36} {self.peak / 2**20:12,.1f} MiB")
        found += [f"{name:36} {size / 2**20:12,.1f} MiB  on the host" for name, size in self.host.items()]
        if self.sampler is not None:
            found += ["beside it the process that samples:", *self.sampler.lines()]
            found.append(f"{'both':36} {self.total / 2**20:12,.1f} MiB")
        if gpu is not None:
            room = GPUS[gpu] * 2**30
            verdict = "fits" if self.peak <= FREE * room else "fits barely" if self.peak <= room else "does not fit"
            found.append(f"{gpu}: {GPUS[gpu]} GiB, {self.peak / room:.0%} used: {verdict}")
        return found


class Planner:
    """The model of a plan, built once of shapes, and its plan for any micro-batch.

    Raises ValueError for a folder without a model's config, for roles of which none trains, and for more shared layers than the
    model can spare.
    """

    def __init__(self, config: PlanConfig) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from transformers import AutoConfig, AutoModelForCausalLM

        from rlhf_fast.model import SharedModel
        from rlhf_fast.model.quantized import loading

        try:
            settings = AutoConfig.from_pretrained(config.model, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            expected = "a folder with a model's config"
            raise _check.error(ValueError, "plan", "model", repr(config.model), expected) from error
        self.config, self.text = config, settings.get_text_config()
        self.cpu = config.gpu is None
        self.dtype = resolve_dtype(config.dtype, "cpu" if self.cpu else "cuda")
        self.stored = getattr(settings, "dtype", None) or torch.float32
        self.roles, self.trained = ROLES[config.trainer]
        if config.roles:
            self.roles, self.trained = tuple(config.roles), tuple(r for r in self.trained if r in config.roles)
            if not self.trained:
                expected = f"one of {', '.join(ROLES[config.trainer][1])} among them for {config.trainer}"
                raise _check.error(ValueError, "plan", "roles", list(config.roles), expected)
        depth = self.text.num_hidden_layers
        if config.shared_layers >= depth:
            expected = f"0 to {depth - 1} for a model of {depth} layers"
            raise _check.error(ValueError, "plan", "shared_layers", config.shared_layers, expected)
        if config.quantize != "none" and importlib.util.find_spec("bitsandbytes"):
            loading("plan", config.quantize, self.dtype)  # its library counts with the process
        self.held = _held(config.model) if self.cpu else 0
        with FakeTensorMode() as fake, LiveBytes():
            base = AutoModelForCausalLM.from_config(settings, dtype=self.dtype, trust_remote_code=False)
            self.model = SharedModel(
                base,
                self.roles,
                config.lora,
                config.shared_layers,
                gradient_checkpointing=config.gradient_checkpointing,
            )
        self.passes = Passes(fake, self.model, packed=self.cpu)
        self.online = config.trainer in SAMPLE
        self.length = config.prompt_tokens + config.response_tokens
        share = -(-config.batch_size // (config.ranks * self._samples))
        self.batch = share * self._samples
        """Completions that a rank samples: those of a prompt stay together."""
        self._rollouts: dict[int, int] = {}

    @property
    def _samples(self) -> int:
        return self.config.group_size if self.config.trainer in IN_GROUPS else 1

    def at(self, micro_batch_size: int) -> Plan:
        """The plan with so many sequences (pairs) in a pass."""
        config, model, base = self.config, self.model, self.model.base
        own = {role: sum(p.nbytes for p in model.parameters_of(role).values()) for role in model.roles}
        rows = micro_batch_size * (2 if config.trainer in PAIRS else 1)
        learned = rows * (config.response_tokens if self.online else self.length)
        weights, widest = self._weights()
        gradients = sum(own[role] for role in self.trained)
        found = Plan(micro_batch_size=micro_batch_size)
        if self.cpu:
            found.always["process before the model"] = self.held
        layers = self._layers() if config.shard else []
        found.always["base weights"] = weights - sum(layers) + sum(-(-size // config.ranks) for size in layers)
        if config.offload and not self.cpu:
            self._stream(found)
        if layers:
            # FSDP2 asks for a layer while the one before runs.
            found.always["layers gathered at once"] = sum(sorted(layers)[-2:])
        found.always["adapters and heads"] = sum(own.values())
        found.always["gradients"] = gradients
        if config.optim_offload and not self.cpu:
            found.host["Adam's moments"] = 2 * gradients
            found.host["parameters and gradients of a step"] = 2 * Block(self._trained()).size
        else:
            found.always["Adam's moments"] = 2 * gradients
        if self.online and config.shared_layers:
            size = model.backbone.hidden_size * self.dtype.itemsize
            found.always["outputs of the shared layers"] = self.batch * self.length * size
        if any(role in ("policy", "reference") for role in self.roles):
            head = base.get_output_embeddings().weight
            found.always["chunks of the LM head"] = head_bytes(learned, head, not self.cpu)
        if widest:
            found.always["widest layer, dequantised"] = widest
        reading = {}
        if self.cpu and (self.stored != self.dtype or config.quantize != "none"):
            reading["reading the weights"] = sum(p.numel() for p in base.parameters()) * self.stored.itemsize
        found.phases |= reading
        if self.online:
            if config.engine == "local":
                found.phases["rollout"] = self._sampling(self._samples) + sum(
                    layers
                )  # whole, for as long as it samples
            elif config.engine == "process" and self.cpu:
                always = {"process before the model": self.held, "base weights": weights, "adapter": own["policy"]}
                always["packed weights"] = self._packed()
                if widest:
                    always["widest layer, dequantised"] = widest
                rollout = self._sampling(self._samples) - self._packed()
                found.sampler = Plan(always, {**reading, "rollout": rollout}, micro_batch_size=micro_batch_size)
            if config.greedy:
                found.phases["greedy rollout"] = self._sampling(1) + sum(layers)
            if scored := [role for role in self.roles if role != "policy" or self._scores_policy]:
                found.phases["scoring"] = self.passes.scores(scored, micro_batch_size, self.length, kept_trunk=True)
        if config.trainer == "kto":
            found.phases["answers to other prompts"] = self.passes.scores(self.roles, rows, self.length)
        for role in self.trained:
            found.phases[f"update of {role}"] = self._update(role, rows)
        if "Adam's moments" in found.always:
            parameters = [p.nbytes for p in self._trained()]
            # The root of the second moment: of one parameter after the other on a CPU, elsewhere of all at once (torch.optim's foreach).
            found.phases["optimizer step"] = max(parameters) if self.cpu else sum(parameters)
        if self.cpu:
            # Of the moments: copies, their bytes, and those of the whole file (train/checkpoint.py).
            found.phases["checkpoint"] = 3 * 2 * gradients
        return found

    @property
    def _scores_policy(self) -> bool:
        return self.config.old_logprobs == "scored" and self.config.trainer != "raft"

    def _weights(self) -> tuple[int, int]:
        """Bytes of the base, and of its widest quantised layer in the dtype of products (0 without)."""
        from rlhf_fast.model.linear import weight_of
        from rlhf_fast.model.quantized import weight_bytes

        base, kind = self.model.base, self.config.quantize
        whole = storage_bytes((*base.parameters(), *base.buffers()))
        if kind == "none":
            return whole, 0
        layers = [weight_of(layer) for layer in self.model.backbone.all_linears().values()]
        small = sum(weight_bytes(kind, *w.shape) for w in layers)
        return whole - storage_bytes(layers) + small, max(w.nbytes for w in layers)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for role in self.trained for p in self.model.parameters_of(role).values()]

    def _stream(self, found: Plan) -> None:
        """The layers move to the host; the two widest are what a pass holds."""
        backbone = self.model.backbone
        layers = streamed(backbone.base, list(backbone.layers))
        blocks = [Block(parameters).size for parameters in layers]
        found.always["base weights"] -= sum(p.nbytes for parameters in layers for p in parameters)
        found.always["layers on the GPU at once"] = sum(sorted(blocks)[-2:])
        found.host["decoder layers"] = sum(blocks)

    def _layers(self) -> list[int]:
        """Bytes of every decoder layer of the base."""
        return [storage_bytes(layer.parameters()) for layer in self.model.backbone.layers]

    def _update(self, role: str, rows: int) -> int:
        config, online = self.config, self.online
        head = "values" if role in ("value", "reward") else "ppo" if config.trainer == "ppo" else "logprobs"
        before = ("reference",) if config.trainer in ("dpo", "kto") and "reference" in self.roles else ()
        responses = config.response_tokens if online and head != "values" else None
        return self.passes.trains(
            role, rows, self.length, head=head, before=before, responses=responses, kept_trunk=online
        )

    def _sampling(self, samples: int) -> int:
        """Of `samples` of every prompt: keys and values of every layer, prompts once for all their samples; the pass over the prompts, or
        the logits of a token beside those of the one before; on a CPU the packed weights."""
        if samples in self._rollouts:
            return self._rollouts[samples]
        config, text = self.config, self.text
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        prompts = self.batch // self._samples
        tokens = prompts * (config.prompt_tokens + samples * config.response_tokens)
        cache = 2 * text.num_hidden_layers * heads * width * self.dtype.itemsize * tokens
        logits = 2 * prompts * samples * text.vocab_size * 4
        read = max(logits, self.passes.reads("policy", prompts, config.prompt_tokens))
        self._rollouts[samples] = self._packed() + cache + read
        return self._rollouts[samples]

    def _packed(self) -> int:
        """Of rollout/packed.py."""
        from rlhf_fast.model.linear import weight_of
        from rlhf_fast.rollout.packed import packable

        if not self.cpu:
            return 0
        plain = self.config.quantize == "none"
        layers = [weight_of(layer) for layer in self.model.backbone.all_linears().values() if plain]
        layers.append(weight_of(self.model.base.get_output_embeddings()))
        return sum(w.nbytes for w in layers if packable(w))


def _held(folder: str) -> int:
    """Bytes of this process with the libraries and the tokenizer of a run, which is what a run begins with but for its data."""
    import rlhf_fast.train.loop as loop

    tokenizer = None
    if any((Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = loop.load_tokenizer(folder)
    held = resident_bytes()
    del tokenizer
    return held


def plan(config: PlanConfig) -> Plan:
    """The memory of one process of a run, and of the second one where that samples.

    Without a micro_batch_size: with the largest that fits 90 % of `memory_gib` or of the GPU, and at most batch_size. Raises DoesNotFit
    when none does, ValueError as Planner.
    """
    planner = Planner(config)
    room = budget(config)
    if config.micro_batch_size is not None:
        found = planner.at(config.micro_batch_size)
        return found if config.memory_gib is None or room is None else checked(found, room)
    return planner.at(config.batch_size) if room is None else largest(planner, room, config.batch_size)


def budget(config: PlanConfig) -> float | None:
    """Bytes that the plan may fill, or None for any number."""
    if config.memory_gib is not None:
        return FREE * config.memory_gib * 2**30
    return None if config.gpu is None else FREE * GPUS[config.gpu] * 2**30


def largest(planner: Planner, room: float, most: int) -> Plan:
    """The plan of the largest micro-batch up to `most` that fits `room` bytes. Raises DoesNotFit.

    What a pass holds grows by the same number of bytes with every sequence, so two plans tell of all; the one chosen is made to see.
    """
    first = checked(planner.at(1), room)
    if most == 1:
        return first
    second = planner.at(2)
    size = max(n for n in range(1, most + 1) if n == 1 or _along(first, second, n) <= room)
    found = first
    while size > 1 and (found := planner.at(size)).total > room:
        size, found = size - 1, first
    return found


def _along(first: Plan, second: Plan, n: int) -> float:
    """`total` of a micro-batch of n by the plans of 1 and 2."""
    line = lambda a, b: {name: a[name] + (n - 1) * (b[name] - a[name]) for name in a}
    beside = 0 if first.sampler is None else first.sampler.peak  # a rollout has no micro-batches
    return sum(line(first.always, second.always).values()) + max(line(first.phases, second.phases).values()) + beside


def checked(found: Plan, room: float) -> Plan:
    """The same plan. Raises DoesNotFit when it takes more than `room` bytes."""
    if found.total <= room:
        return found
    got = f"{found.total / 2**30:.2f} GiB with a micro-batch of {found.micro_batch_size}"
    table = "\n".join(found.lines())
    raise DoesNotFit(
        f"plan: argument 'memory_gib' got a run that takes {got}, expected at most {room / 2**30:.2f}, 90 % of it:\n{table}"
    )


def run(config: PlanConfig) -> None:
    """The command: prints the plan."""
    found = plan(config)
    where = "one process" if config.gpu is None else f"one {config.gpu}"
    print(f"{config.trainer} of {config.model} on {where}, {found.micro_batch_size} sequences of")
    print(f"{config.prompt_tokens} + {config.response_tokens} tokens at a time:")
    print("\n".join(found.lines(config.gpu)))
