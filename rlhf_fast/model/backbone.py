"""The frozen Hugging Face model seen as decoder, layers and LM head, without knowing its architecture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_fast.model.linear import is_linear, weight_of
from rlhf_fast.model.offload import Copies, LayerStream
from rlhf_fast.model.packing import Packing, attending, implementation_of

PASS_TOKENS = 4096
"""Tokens over all roles that go through a layer at once on a CPU where nothing is kept: enough for products at full speed, and tensors small
enough for the C library to use their memory again (above 32 MiB glibc returns it to the system, and every layer faults it in)."""


class _LastHidden(BaseModelOutputWithPast):
    """A decoder output that carries the hidden states alone; whatever else a head asks for is absent."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules compute something else inside the context; their attributes, which models read, stay."""
    before: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is not None:
                module.forward = forward
            elif "forward" in module.__dict__:
                del module.forward


def _hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


class Backbone:
    """Decoder access for one model; the first `shared_layers` layers run once for all roles.

    Raises TypeError for something that is no Hugging Face causal LM, ValueError for a decoder whose
    layers cannot be found or cannot be skipped.
    """

    def __init__(self, base: PreTrainedModel, shared_layers: int = 0) -> None:
        if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
            raise TypeError(
                f"SharedModel: argument 'base' got {type(base).__name__}, expected a Hugging Face causal LM"
            )
        self.base = base
        self.decoder: nn.Module = base.get_decoder()
        self.layers, self.layers_name = self._find_layers()
        if isinstance(shared_layers, bool) or not isinstance(shared_layers, int):
            raise TypeError(f"SharedModel: argument 'shared_layers' got {shared_layers!r}, expected an integer")
        if not 0 <= shared_layers < len(self.layers):
            raise ValueError(
                f"SharedModel: argument 'shared_layers' got {shared_layers},"
                f" expected 0 to {len(self.layers) - 1} for a model of {len(self.layers)} layers"
            )
        self.shared_layers = shared_layers
        self._takes_positions = "position_ids" in signature(type(self.decoder).forward).parameters
        self._layer_extras: int | None = None  # further entries of a layer's output tuple; None: it returns a tensor
        self._packs: set[str] = set()  # attention implementations whose packed passes are proven
        self.stream: LayerStream | None = None
        """What brings the layers to the device when they run; None: they are there."""

    def _find_layers(self) -> tuple[nn.ModuleList, str]:
        config = self.base.config.get_text_config()
        names = {module: name for name, module in self.base.named_modules()}
        for module in self.decoder.children():
            if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
                return module, names[module]
        raise ValueError(
            f"SharedModel: the decoder of {type(self.base).__name__} has no list of {config.num_hidden_layers} layers"
        )

    @property
    def hidden_size(self) -> int:
        return weight_of(self.base.get_output_embeddings()).shape[1]

    @property
    def device(self) -> torch.device:
        return weight_of(self.base.get_input_embeddings()).device

    def offload(self, copies: Copies) -> None:
        """Keep the layers' weights in host memory from now on."""
        self.stream = LayerStream(self.base, self.decoder, list(self.layers), copies, self.shared_layers)

    def device_of(self, layer: nn.Module) -> torch.device:
        """Where a linear layer computes."""
        return weight_of(layer).device if self.stream is None else self.device

    def linears(self) -> dict[str, nn.Module]:
        """Every linear layer inside the decoder layers that differ between roles, by its name in the base."""
        found = {}
        for i in range(self.shared_layers, len(self.layers)):
            for name, module in self.layers[i].named_modules(prefix=f"{self.layers_name}.{i}"):
                if is_linear(module):
                    found[name] = module
        return found

    def all_linears(self) -> dict[str, nn.Module]:
        """Every linear layer inside any decoder layer, by its name in the base."""
        named = self.layers.named_modules(prefix=self.layers_name)
        return {name: module for name, module in named if is_linear(module)}

    @cached_property
    def mixes_rows(self) -> bool:
        """True when a linear layer sees rows picked by a router (a list of experts) instead of all rows."""
        prefix = len(self.layers_name.split(".")) + 1
        return any(part.isdigit() for name in self.linears() for part in name.split(".")[prefix:])

    def hidden(
        self,
        input_ids: Tensor,
        mask: Tensor | Packing,
        trunk: Tensor | None = None,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> Tensor:
        """Final-norm output (B, T, H); with `trunk` (B, T, H) the shared layers are skipped.

        mask: (B, T) bool, or how each of the B rows is packed. wrap: what to make of the forward of every layer that runs.
        """
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        if wrap is not None:
            replaced = {layer: wrap(layer.forward) for layer in self.layers}
        if trunk is not None:
            replaced |= {layer: self._returning(None) for layer in self.layers[: self.shared_layers]}
            replaced[self.layers[0]] = self._returning(trunk)
        with _forwards(replaced):
            return self._decode(input_ids, mask)

    @torch.no_grad()
    def trunk(self, input_ids: Tensor, mask: Tensor | Packing) -> Tensor:
        """Output (B, T, H) of the shared layers; the later layers do not run."""
        if isinstance(mask, Tensor):
            size = self.rows_at_a_time(input_ids.shape[1])
            if len(mask) > size:
                parts = zip(input_ids.split(size), mask.split(size), strict=True)
                return torch.cat([self.trunk(ids, some) for ids, some in parts])
        seen: list[Any] = []
        last = self.layers[self.shared_layers - 1]
        handle = last.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            with _forwards({layer: self._returning(None) for layer in self.layers[self.shared_layers :]}):
                self._decode(input_ids, mask)
        finally:
            handle.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def rows_at_a_time(self, tokens: int) -> int:
        """Rows of a padded pass that keeps nothing, each of so many tokens over all roles: on a CPU as many as PASS_TOKENS allows."""
        if torch.is_grad_enabled() or self.device.type != "cpu":
            return sys.maxsize
        return max(1, PASS_TOKENS // tokens)

    def _decode(self, input_ids: Tensor, mask: Tensor | Packing) -> Tensor:
        if isinstance(mask, Packing):
            return self._decode_packed(input_ids, mask)
        extra = {}
        if self._takes_positions:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp_(min=0)
        out = self.decoder(input_ids=input_ids, attention_mask=mask.long(), use_cache=False, return_dict=True, **extra)
        return out.last_hidden_state

    def _decode_packed(self, input_ids: Tensor, packing: Packing) -> Tensor:
        told = packing.arguments(input_ids.shape[0], self.base.config._attn_implementation)
        with packing.current():
            out = self.decoder(input_ids=input_ids, attention_mask=None, use_cache=False, return_dict=True, **told)
        return out.last_hidden_state

    @contextmanager
    def packed(self) -> Iterator[str]:
        """Packed passes run inside the context, by the best attention there is; yields its name in transformers.

        Raises ValueError for an architecture whose packed sequences would see each other.
        """
        implementation, _ = implementation_of(self.base)
        with attending(self.base, implementation):
            if implementation not in self._packs:
                self._check_packing()
                self._packs.add(implementation)
            yield implementation

    def _check_packing(self) -> None:
        """Prove on five tokens that a sequence packed behind another one depends on itself alone and is what it is alone.

        Its gradient towards the other's embeddings is exactly 0 in every dtype where attention ends at the border.
        """
        ids = torch.arange(5, device=self.device).unsqueeze(0)
        bounds = torch.tensor([0, 2, 5], device=self.device)
        positions = torch.tensor([[0, 1, 0, 1, 2]], device=self.device)
        seen: list[Tensor] = []

        def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen.append(output.detach().requires_grad_())
            return seen[-1]

        handle = self.base.get_input_embeddings().register_forward_hook(leaf)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                second = self._decode_packed(ids, Packing(bounds, positions, 3))[:, 2:]
                (reach,) = torch.autograd.grad(second.float().square().sum(), seen[:1])
                alone = self._decode_packed(ids[:, 2:], Packing(bounds[1:] - 2, positions[:, 2:], 3))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(self._cannot_pack()) from error
        finally:
            handle.remove()
        tolerance = 1e-3 if second.dtype in (torch.float32, torch.float64) else 5e-2
        close = torch.allclose(second.float(), alone.float(), rtol=tolerance, atol=tolerance)
        if reach[:, :2].any() or not reach[:, 2:].any() or not close:
            raise ValueError(self._cannot_pack())

    def _cannot_pack(self) -> str:
        return (
            f"SharedModel: argument 'cu_seqlens' got boundaries, expected None: packed sequences of"
            f" {type(self.base).__name__} would see each other with {self.base.config._attn_implementation} attention"
        )

    @contextmanager
    def replaced(self, forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
        """Layers compute something else inside the context."""
        with _forwards(forwards):
            yield

    def _returning(self, hidden: Tensor | None) -> Callable[..., Any]:
        """A layer forward that returns `hidden`, or its own input when that is None."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = _hidden_argument(args, kwargs) if hidden is None else hidden
            return result if self._layer_extras is None else (result, *[None] * self._layer_extras)

        return forward

    @torch.no_grad()
    def check_shared_layers(self) -> None:
        """Prove on two tokens that skipping the shared layers leaves the result alone.

        Raises ValueError for an architecture whose layers hand each other more than the hidden states.
        """
        ids = torch.arange(2, device=self.device).unsqueeze(0)
        mask = torch.ones_like(ids, dtype=torch.bool)
        seen: list[Any] = []
        handle = self.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            whole = self._decode(ids, mask)
        finally:
            handle.remove()
        self._layer_extras = len(seen[0]) - 1 if isinstance(seen[0], tuple) else None
        try:
            trunk = self.trunk(ids, mask)
            split = self.hidden(ids, mask, trunk)
            same = trunk.shape == whole.shape and torch.allclose(split, whole, rtol=1e-3, atol=1e-3)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(self._cannot_share()) from error
        if not same:
            raise ValueError(self._cannot_share())

    def _cannot_share(self) -> str:
        return (
            f"SharedModel: argument 'shared_layers' got {self.shared_layers}, expected 0: the layers of"
            f" {type(self.base).__name__} exchange more than hidden states"
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., T, H) -> (..., T, V) by the model's own forward, with the decoder standing in for `hidden`."""
        if hidden.dim() == 2:
            return self.logits(hidden.unsqueeze(0)).squeeze(0)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with _forwards({self.decoder: lambda *args, **kwargs: _LastHidden(last_hidden_state=hidden)}):
            return self.base(input_ids=ids, use_cache=False).logits

    @cached_property
    def softcap_and_scale(self) -> tuple[float | None, float]:
        """(c, s): `logits = c tanh(s (W h + b) / c)`, or `s (W h + b)` when c is None; proven on random rows.

        Raises ValueError for a model whose logits have another form.
        """
        config = self.base.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        head = self.base.get_output_embeddings()
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 4, self.hidden_size, generator=generator).to(head.weight)
        with torch.no_grad():
            expected, raw = self.logits(hidden).float(), head(hidden).float()
        division = getattr(config, "logits_scaling", None) or 1.0
        factor = getattr(config, "lm_head_multiplier", None) or 1.0
        scales = (1.0, getattr(config, "logit_scale", None) or 1.0, 1.0 / division, division, factor)
        tolerance = 1e-5 if head.weight.dtype == torch.float32 else 2e-2
        for scale in scales:
            logits = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
            if torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()):
                return softcap, float(scale)
        raise ValueError(
            f"SharedModel: the logits of {type(self.base).__name__} are no scaled or soft-capped product with"
            " the LM head; use .logits instead of head_weight"
        )
