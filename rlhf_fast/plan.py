"""`rlhf-fast plan`: the memory of a run before it runs, part by part, from the shapes of the model alone.

The model is built without data (torch's fake tensors) and its passes are run on shapes: every tensor that PyTorch would allocate is
counted from its birth to its end, so activations, what a layer leaves behind in the backward and what gradient checkpointing saves
are those of the real code. The rest (optimizer, caches, chunks of the head) is arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rlhf_fast import _check
from rlhf_fast.config import PlanConfig, resolve_dtype
from rlhf_fast.ops._lm_head import CHUNK_BYTES, DEVICE_CHUNK_BYTES

GPUS = {"a100-40": 40, "a100": 80, "h100": 80, "h200": 141, "b200": 180, "l40s": 48, "rtx4090": 24, "rtx5090": 32}
"""GiB of memory by the makers' data sheets."""
ROLES = {
    "sft": (("policy",), ("policy",)),
    "reward": (("reward",), ("reward",)),
    "dpo": (("policy", "reference"), ("policy",)),
    "grpo": (("policy", "reference"), ("policy",)),
    "ppo": (("policy", "reference", "value", "reward"), ("policy", "value")),
}
"""(roles, those that train) by trainer."""


@dataclass
class Plan:
    """Bytes by part. `always` is there all the time; of `phases` one at a time."""

    always: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of the widest moment."""
        return sum(self.always.values()) + max(self.phases.values())

    def lines(self, gpu: str | None = None) -> list[str]:
        """For a reader."""
        rows = [
            *((name, "", n) for name, n in self.always.items()),
            *((n, "one at a time", b) for n, b in self.phases.items()),
        ]
        found = [f"{name:36} {size / 2**20:12,.1f} MiB  {note}".rstrip() for name, note, size in rows]
        found.append(f"{'peak':36} {self.peak / 2**20:12,.1f} MiB")
        if gpu is not None:
            room = GPUS[gpu] * 2**30
            verdict = "fits" if self.peak <= 0.9 * room else "fits barely" if self.peak <= room else "does not fit"
            found.append(f"{gpu}: {GPUS[gpu]} GiB, {self.peak / room:.0%} used: {verdict}")
        return found


class LiveBytes(TorchDispatchMode):
    """Counts the storages of tensors that are born inside the context, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # models ask whether a mask can be left out; with whole rows of real tokens it can
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def plan(config: PlanConfig) -> Plan:
    """The memory of one process of a run.

    Raises ValueError for a folder without a model's config, for roles of which none trains, and for more shared layers than the
    model can spare.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_fast.model import SharedModel
    from rlhf_fast.model.linear import weight_of

    try:
        settings = AutoConfig.from_pretrained(config.model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        expected = "a folder with a model's config"
        raise _check.error(ValueError, "plan", "model", repr(config.model), expected) from error
    device = "cpu" if config.gpu is None else "cuda"
    dtype = resolve_dtype(config.dtype, device)
    roles, trained = ROLES[config.trainer]
    if config.roles:
        roles, trained = tuple(config.roles), tuple(r for r in trained if r in config.roles)
        if not trained:
            expected = f"one of {', '.join(ROLES[config.trainer][1])} among them for {config.trainer}"
            raise _check.error(ValueError, "plan", "roles", list(config.roles), expected)
    with FakeTensorMode() as fake:
        base = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
        model = SharedModel(base, roles, config.lora, gradient_checkpointing=config.gradient_checkpointing)
    own = {role: sum(p.nbytes for p in model.parameters_of(role).values()) for role in model.roles}
    depth = len(model.backbone.layers)
    if config.shared_layers >= depth:
        expected = f"0 to {depth - 1} for a model of {depth} layers"
        raise _check.error(ValueError, "plan", "shared_layers", config.shared_layers, expected)
    if config.shared_layers:
        # A shared layer has no adapter.
        own = {role: size * (depth - config.shared_layers) // depth for role, size in own.items()}
    length = config.prompt_tokens + config.response_tokens
    found = Plan()
    found.always["base weights"] = _bytes((*base.parameters(), *base.buffers()))
    found.always["adapters and heads"] = sum(own.values())
    found.always["gradients"] = sum(own[role] for role in trained)
    found.always["Adam's moments"] = 2 * found.always["gradients"]
    hidden, vocabulary = model.backbone.hidden_size, settings.get_text_config().vocab_size
    if config.shared_layers and config.trainer in ("ppo", "grpo"):
        found.always["outputs of the shared layers"] = config.batch_size * length * hidden * dtype.itemsize
    chunk = CHUNK_BYTES if config.gpu is None else DEVICE_CHUNK_BYTES
    rows = config.micro_batch_size * (2 if config.trainer in ("dpo", "reward") else 1)

    def run(phase: str, which: Sequence[str], train: bool, head: bool) -> None:
        with fake:
            found.phases[phase] = _pass(model, which, rows, length, config.shared_layers, train) + (
                chunk if head else 0
            )

    if config.trainer in ("ppo", "grpo"):
        found.phases["rollout"] = _rollout(settings, config, length, dtype, vocabulary)
        if config.gpu is None:  # the products of a rollout on a CPU read a packed copy of the weights
            layers = model.backbone.all_linears().values()
            found.phases["rollout"] += _bytes([*map(weight_of, layers), weight_of(base.get_output_embeddings())])
        run("scoring", roles, False, True)
    elif "reference" in roles:
        run("reference", ("reference",), False, True)
    for role in trained:
        run(f"update of {role}", (role,), True, role == "policy")
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, those that several share counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _pass(model: Any, roles: Sequence[str], rows: int, length: int, shared_layers: int, train: bool) -> int:
    """Most bytes alive at once in a pass of the decoder for stacked roles, with its backward when it trains."""
    backbone = model.backbone
    ids = torch.zeros(rows * len(roles), length, dtype=torch.int64)
    layers = list(backbone.layers)
    wrap: Callable[..., Any] | None = None
    with model._plan.use(tuple(roles)):
        if train and model.gradient_checkpointing:
            wrap = model._recomputed(ids)
        replaced = {layer: wrap(layer.forward) for layer in layers[shared_layers:]} if wrap else {}
        replaced |= {layer: backbone._returning(None) for layer in layers[:shared_layers]}
        counter = LiveBytes()
        grad: AbstractContextManager[Any] = torch.enable_grad() if train else torch.no_grad()
        with counter, grad, backbone.replaced(replaced):
            out = backbone.decoder(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state
            if train:
                out.backward(torch.zeros_like(out))
            del out
        for parameter in model.parameters():
            parameter.grad = None
    return counter.peak


def _rollout(settings: Any, config: PlanConfig, length: int, dtype: torch.dtype, vocabulary: int) -> int:
    """Keys and values of every layer, prompts once for all their samples, and the logits of a step in two formats."""
    text = settings.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    prompts = config.batch_size // (config.group_size if config.trainer == "grpo" else 1)
    tokens = prompts * config.prompt_tokens + config.batch_size * (length - config.prompt_tokens)
    cache = 2 * text.num_hidden_layers * heads * width * dtype.itemsize * tokens
    return cache + config.batch_size * vocabulary * (4 + dtype.itemsize)


def run(config: PlanConfig) -> None:
    """The command: prints the plan."""
    found = plan(config)
    where = "one process" if config.gpu is None else f"one {config.gpu}"
    print(f"{config.trainer} of {config.model} on {where}, {config.micro_batch_size} sequences of")
    print(f"{config.prompt_tokens} + {config.response_tokens} tokens at a time:")
    print("\n".join(found.lines(config.gpu)))
