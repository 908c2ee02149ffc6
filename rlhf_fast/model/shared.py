"""One frozen base model for all roles of RLHF: LoRA adapters, and heads for value and reward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast import _check
from rlhf_fast.model.adapter_set import AdapterSet, check_fits, fold_file
from rlhf_fast.model.adapters import AdapterFile, concatenate, read_adapter, write_adapter
from rlhf_fast.model.backbone import Backbone
from rlhf_fast.model.fused import fuse
from rlhf_fast.model.heads import HEAD_INIT, ScalarHead
from rlhf_fast.model.inputs import checked_roles, packed, padded
from rlhf_fast.model.linear import RowPlan, adapt, is_adapted, is_known, is_quantized, select, weight_of
from rlhf_fast.model.load import load_base
from rlhf_fast.model.lora import LoraConfig, LowRank
from rlhf_fast.model.offload import copies_to
from rlhf_fast.model.outputs import RoleOutput, SharedOutput
from rlhf_fast.model.packing import Packing, attending, implementation_of

ROLES = ("policy", "reference", "value", "reward")
_NO_ROLE = ("",)
"""Plan of a pass whose rows have no adapter anywhere."""

PathLike = str | os.PathLike[str]


class SharedModel(nn.Module):
    """Policy, reference, value and reward on one frozen Hugging Face causal LM.

    A call computes all roles asked for with one pass of the base: their rows are stacked, every base matrix
    is multiplied once, and each adapted layer adds `alpha / r B A x` on the rows of the roles that have an
    adapter there. In grad mode roles without trainable adapters take a pass of their own that keeps nothing.

    base: taken over in place: its parameters stop requiring gradients, its dropout stays off for good, its
        linear layers become adapted ones under the same names, with `lora_linear` for their product, and on a CPU norms, gates and
        rotary positions run by ops of their own (model/fused.py). Without an active role it is the plain model.
    roles: a subset of ROLES. "reference" has no adapter unless `adapters` gives one; "value" and "reward"
        have a head.
    lora: shape of the new adapters (A random, B zero: every role starts as the base).
    shared_layers: the first k decoder layers carry no adapter: they run once for all roles, never backward.
    fold: adapter folder(s) merged into the base weights in fp32 before anything else.
    adapters: adapter folders to start roles from, heads included.
    seed: of adapters and heads; a role's start depends neither on the global generator nor on other roles.
    gradient_checkpointing: a pass with gradients keeps one activation per layer and computes the others again in
        the backward: the memory of one layer instead of all, for a third more arithmetic.

    Raises TypeError for a base that is no causal LM or a linear layer of an unknown class, ValueError for
    unknown roles or targets and for an adapter that does not fit; the base's weights and layers are then as
    they were.
    One pass at a time: the active roles are state of the model, not of the thread.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        roles: Sequence[str] = ROLES,
        lora: LoraConfig | None = None,
        shared_layers: int = 0,
        *,
        fold: PathLike | Sequence[PathLike] | None = None,
        adapters: Mapping[str, PathLike] | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.roles = checked_roles(roles, ROLES, "the known roles")
        self.lora = lora if lora is not None else LoraConfig()
        self.backbone = Backbone(base, shared_layers)
        if any(is_adapted(layer) for layer in self.backbone.all_linears().values()):
            raise ValueError("SharedModel: argument 'base' already belongs to a SharedModel, expected a plain model")
        # Everything is read and checked before the base is touched.
        checked_roles(tuple(adapters or ()), self.roles, "the roles of this model", allow_none=True)
        folded = [read_adapter(folder) for folder in _folders(fold)]
        loaded = {role: read_adapter(folder) for role, folder in (adapters or {}).items()}
        targets = select(self.backbone.linears(), self.lora.suffixes)
        for file in folded:
            check_fits(file, self.backbone, None)
        for role, file in loaded.items():
            check_fits(file, self.backbone, role)
        base.eval()
        if shared_layers:
            self.backbone.check_shared_layers()

        self.base = base.requires_grad_(False)
        for file in folded:
            fold_file(file, self.backbone)
        self._folded = [file.weights for file in folded]
        self._plan = RowPlan()
        fuse(self.backbone.decoder, self._plan)
        for layer in self.backbone.all_linears().values():
            if is_known(layer):  # without adapters, its product is still the op's
                adapt(layer, self._plan)
        self.adapters = AdapterSet(self.roles, self.backbone, self._plan, self.lora)
        self.heads = nn.ModuleDict()
        for role in self.roles:
            self._start(role, targets, seed)
        for role, file in loaded.items():
            self._install(role, file)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        roles: Sequence[str] = ROLES,
        lora: LoraConfig | None = None,
        shared_layers: int = 0,
        *,
        fold: PathLike | Sequence[PathLike] | None = None,
        adapters: Mapping[str, PathLike] | None = None,
        dtype: torch.dtype = torch.float32,
        quantize: str = "none",
        seed: int = 0,
        gradient_checkpointing: bool = False,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ) -> SharedModel:
        """Load a local model folder (safetensors only, no remote code, no network) and share it.

        quantize: none, or int8 or nf4 for its linear layers but the LM head (model/quantized.py, the extra `quant`).
        device: where the base, its adapters and its heads are. Their start is drawn on the CPU, the same on every device.
        offload: as `offload(device)`, with nothing but the shared parts ever on the device; nothing changes on a CPU.
        Raises ValueError if there is no such model; otherwise as the constructor.
        """
        op, device = "SharedModel.from_pretrained", torch.device(device)
        offload = offload and device.type != "cpu"
        if offload and quantize != "none":
            expected = "False for a quantised base, whose layers have their scales on the device"
            raise _check.error(ValueError, op, "offload", True, expected)
        model = cls(
            load_base(op, path, dtype, quantize, "cpu" if offload else device),
            roles,
            lora,
            shared_layers,
            fold=fold,
            adapters=adapters,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )
        if offload:
            model.offload(device)
        return model

    def move_all_but_layers(self, device: torch.device) -> None:
        """Embeddings, LM head, adapters and heads go to a device; the decoder layers of the base stay where they are."""
        held = {id(x) for x in self.backbone.layers.parameters()}
        self._apply(lambda x: x if id(x) in held else x.to(device))

    def offload(self, device: torch.device) -> None:
        """Keep the frozen weights of the decoder layers in host memory; all else moves to the device, where everything computes.

        A pass copies every layer that it runs to the device, the next one while one computes (on CUDA), and at most two are there at a
        time. Results have the same bits as without. A backward copies each layer once more, and a rollout all of them for every token.
        To be called once; the model stays on this device. Raises ValueError for a quantised base and for a CPU.
        """
        if device.type == "cpu" or self.backbone.stream is not None:
            got = "the CPU" if device.type == "cpu" else f"{device} for a model that is offloaded"
            raise _check.error(ValueError, "SharedModel.offload", "device", got, "another device, once")
        if any(is_quantized(layer) for layer in self.backbone.all_linears().values()):
            raise ValueError("SharedModel.offload: the base is quantised, expected layers in floating point")
        self.move_all_but_layers(device)
        self.backbone.offload(copies_to(device))

    def train(self, mode: bool = True) -> SharedModel:
        """LoRA dropout follows `mode`; the base stays in eval mode, its own dropout never runs."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        roles: Sequence[str] | None = None,
        trunk: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> SharedOutput:
        """Outputs of the roles asked for (all of them by default) on one batch.

        input_ids: (B, T) integer; attention_mask: (B, T) bool or integer, True = real token (None: all real).
        Padding on either side, or both, changes no real token: positions count real tokens, pads are fed as
        id 0. trunk: (B, T, H) from `trunk()` on the same batch; skips the shared layers.
        cu_seqlens: (S + 1,) boundaries of S sequences packed into input_ids (N,), none empty; outputs are then (N, ...), a
        trunk is (N, H). The same results as padded: flash-attn's kernels on CUDA (`packed_attention` tells), our
        `varlen_attention` on a CPU, elsewhere PyTorch's attention on one sequence after the other, or, for architectures with one of
        their own, under a mask of (N, N) blocks, whose cost grows with the square of all tokens.
        Raises ValueError for ids outside the vocabulary, a row without a real token, wrong shapes, or an architecture whose
        packed sequences would see each other.
        """
        roles = self.roles if roles is None else checked_roles(roles, self.roles, "the roles of this model")
        input_ids, mask = self._checked_batch("SharedModel", input_ids, attention_mask, cu_seqlens)
        if isinstance(mask, Packing):
            with self.backbone.packed():
                return self._outputs(input_ids, mask, roles, trunk)
        return self._outputs(input_ids, mask, roles, trunk)

    def _outputs(
        self, input_ids: Tensor, mask: Tensor | Packing, roles: Sequence[str], trunk: Tensor | None
    ) -> SharedOutput:
        flat = isinstance(mask, Packing)
        if trunk is not None:
            self._check_trunk(trunk, input_ids[0] if flat else input_ids)
            trunk = trunk.unsqueeze(0) if flat else trunk
        elif self.shared_layers:
            trunk = self._trunk(input_ids, mask)
        trained = [role for role in roles if torch.is_grad_enabled() and self.adapters.trains(role)]
        frozen = [role for role in roles if role not in trained]
        with torch.no_grad():
            hidden = self._pass(input_ids, mask, frozen, trunk)
        hidden |= self._pass(input_ids, mask, trained, trunk)
        if flat:
            hidden = {role: x.squeeze(0) for role, x in hidden.items()}
        return SharedOutput({role: RoleOutput(role, hidden[role], mask, self) for role in roles})

    def trunk(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Output (B, T, H) of the shared layers, or (N, H) packed, without gradient: pass it as `trunk=` with the same batch.

        Raises ValueError if shared_layers is 0.
        """
        if not self.shared_layers:
            raise ValueError("SharedModel.trunk: the model has shared_layers=0, expected at least 1")
        input_ids, mask = self._checked_batch("SharedModel.trunk", input_ids, attention_mask, cu_seqlens)
        if isinstance(mask, Packing):
            with self.backbone.packed():
                return self._trunk(input_ids, mask).squeeze(0)
        return self._trunk(input_ids, mask)

    def _trunk(self, input_ids: Tensor, mask: Tensor | Packing) -> Tensor:
        with self._plan.use(_NO_ROLE):
            return self.backbone.trunk(input_ids, mask)

    @property
    def packed_attention(self) -> tuple[str, str | None]:
        """Attention of a packed pass by its name in transformers, and why it is not flash-attn's (None: it is)."""
        return implementation_of(self.base)

    @contextmanager
    def as_role(self, role: str) -> Iterator[SharedModel]:
        """Inside the context `model.base` (and its generate, with KV cache) is that role for every row."""
        with self._plan.use(checked_roles((role,), self.roles, "the roles of this model")):
            yield self

    @property
    def shared_layers(self) -> int:
        """Number of first decoder layers that all roles share."""
        return self.backbone.shared_layers

    @property
    def head_weight(self) -> Tensor:
        """LM head weight (V, H); with head_bias, logit_scale and final_softcap it turns hidden into logits.

        Raises ValueError for a model whose logits have another form; `.logits` works for those as well.
        """
        self.backbone.softcap_and_scale  # noqa: B018 (raises for a head of another form)
        return weight_of(self.base.get_output_embeddings())

    @property
    def head_bias(self) -> Tensor | None:
        """LM head bias (V,), or None."""
        return getattr(self.base.get_output_embeddings(), "bias", None)

    @property
    def final_softcap(self) -> float | None:
        """c of `logits = c tanh(x / c)` after the head (Gemma 2), or None."""
        return self.backbone.softcap_and_scale[0]

    @property
    def logit_scale(self) -> float:
        """Factor on the LM head's output, before the soft-cap (Cohere, Granite); 1 for most models."""
        return self.backbone.softcap_and_scale[1]

    def head_of(self, role: str) -> ScalarHead:
        """The scalar head of "value" or "reward"."""
        return self.heads[role]  # type: ignore[return-value]

    def parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        """Everything a role can train: LoRA factors (fp32) by module name, and its head."""
        checked_roles((role,), self.roles, "the roles of this model")
        found: dict[str, nn.Parameter] = {}
        for name, pair in self.adapters.of(role).items():
            found[f"{name}.lora_A.weight"] = pair.lora_A
            found[f"{name}.lora_B.weight"] = pair.lora_B
        if role in self.heads:
            found |= {f"score.{name}": p for name, p in self.head_of(role).named_parameters()}
        return found

    def state_of(self, role: str) -> dict[str, Tensor]:
        """Detached copies of `parameters_of(role)`."""
        return {name: p.detach().clone() for name, p in self.parameters_of(role).items()}

    @torch.no_grad()
    def load_state_of(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copy a `state_of` back in place. Raises ValueError, changing nothing, if names or shapes differ."""
        parameters = self.parameters_of(role)
        expected = {name: tuple(p.shape) for name, p in parameters.items()}
        got = {name: tuple(t.shape) for name, t in state.items()}
        if got != expected:
            odd = min(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            raise ValueError(
                f"SharedModel.load_state_of: role {role!r}, tensor {odd!r} got {got.get(odd, 'nothing')},"
                f" expected {expected.get(odd, 'nothing')}"
            )
        for name, parameter in parameters.items():
            parameter.copy_(state[name])

    def copy_role(self, source: str, target: str) -> None:
        """Make the adapter of `target` a copy of that of `source`; heads stay as they are.

        Raises ValueError if `source` has no adapter.
        """
        checked_roles((source, target), self.roles, "the roles of this model")
        self.adapters.replace(target, self._adapter("SharedModel.copy_role", source))

    def save_adapter(self, role: str, folder: PathLike) -> None:
        """Write the role's adapter and head in PEFT's format, relative to the base with its folds.

        Raises ValueError if the role has no adapter.
        """
        self._write(role, folder, self._adapter("SharedModel.save_adapter", role))

    def export_adapter(self, role: str, folder: PathLike) -> None:
        """Like `save_adapter`, but relative to the base before any fold.

        The folded adapters and the role's become one of summed rank, so plain PEFT on the original base
        computes this role. Raises ValueError if there is neither a fold nor an adapter.
        """
        checked_roles((role,), self.roles, "the roles of this model")
        weights = concatenate([*self._folded, self.adapters.data(role)])
        if not weights:
            raise ValueError(f"SharedModel.export_adapter: nothing folded, and the role {role!r} has no adapter")
        self._write(role, folder, weights)

    def load_adapter(self, role: str, folder: PathLike) -> None:
        """Replace the role's adapter by the one in a PEFT folder, and its head by the one stored with it.

        Parameters whose shape stays are changed in place, others are new ones. A value role keeps its head if
        the folder has none; a reward role must find one. Raises ValueError, changing nothing, if it does not
        fit.
        """
        checked_roles((role,), self.roles, "the roles of this model")
        file = read_adapter(folder)
        check_fits(file, self.backbone, role)
        self._install(role, file)

    def _pass(
        self, input_ids: Tensor, mask: Tensor | Packing, roles: Sequence[str], trunk: Tensor | None
    ) -> dict[str, Tensor]:
        """Hidden states (B, T, H) by role: one stacked pass, or one each where experts pick the rows."""
        if not roles:
            return {}
        if len(roles) > 1 and self.backbone.mixes_rows:
            return {role: self._pass(input_ids, mask, (role,), trunk)[role] for role in roles}
        n = len(roles)
        size = self.backbone.rows_at_a_time(n * input_ids.shape[1])
        if isinstance(mask, Tensor) and len(mask) > size:
            parts = []
            for i in range(0, len(mask), size):
                some = slice(i, i + size)
                part = None if trunk is None else trunk[some]
                parts.append(self._pass(input_ids[some], mask[some], roles, part))
            return {role: torch.cat([part[role] for part in parts]) for role in roles}
        with self._plan.use(roles):
            stacked = None if trunk is None else trunk.repeat(n, 1, 1)
            wrap = self._recomputed(mask) if self.gradient_checkpointing and torch.is_grad_enabled() else None
            rows = mask if isinstance(mask, Packing) else mask.repeat(n, 1)
            hidden = self.backbone.hidden(input_ids.repeat(n, 1), rows, stacked, wrap)
        return dict(zip(roles, hidden.chunk(n), strict=True))

    def _recomputed(self, mask: Tensor | Packing) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Makes of a layer's forward one that keeps its input alone, and runs again in the backward as the same roles and by the same
        attention."""
        roles, attention = self._plan.roles, self.base.config._attn_implementation
        inside = mask.current if isinstance(mask, Packing) else nullcontext

        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self._plan.use(roles), attending(self.base, attention), inside():
                    return forward(*args, **kwargs)

            return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)

        return wrap

    def _checked_batch(
        self, op: str, input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | Packing]:
        vocabulary = weight_of(self.base.get_input_embeddings()).shape[0]
        if cu_seqlens is None:
            return padded(op, input_ids, attention_mask, vocabulary)
        return packed(op, input_ids, attention_mask, cu_seqlens, vocabulary)

    def _check_trunk(self, trunk: Tensor, input_ids: Tensor) -> None:
        if not self.shared_layers:
            raise _check.error(ValueError, "SharedModel", "trunk", "a tensor", "None with shared_layers=0")
        _check.floating("SharedModel", "trunk", trunk)
        shape = (*input_ids.shape, self.backbone.hidden_size)
        _check.shape("SharedModel", "trunk", trunk, shape, "the hidden states")
        _check.device("SharedModel", "trunk", trunk, input_ids, "input_ids")

    def _start(self, role: str, targets: Sequence[str], seed: int) -> None:
        """New head and adapter; one random stream per role, so its start depends on no other."""
        generator = torch.Generator().manual_seed(seed * len(ROLES) + ROLES.index(role))
        if role in HEAD_INIT:
            device = weight_of(self.base.get_output_embeddings()).device
            self.heads[role] = ScalarHead(self.backbone.hidden_size, HEAD_INIT[role], generator, device)
        if role != "reference":
            self.adapters.start(role, targets, generator)

    def _install(self, role: str, file: AdapterFile) -> None:
        self.adapters.replace(role, file.weights)
        if file.head:
            head = self.head_of(role)
            with torch.no_grad():
                head.weight.copy_(file.head["weight"])
                head.bias.copy_(file.head["bias"])

    def _adapter(self, op: str, role: str) -> dict[str, LowRank]:
        checked_roles((role,), self.roles, "the roles of this model")
        weights = self.adapters.data(role)
        if not weights:
            raise ValueError(f"{op}: the role {role!r} has no adapter")
        return weights

    def _write(self, role: str, folder: PathLike, weights: Mapping[str, LowRank]) -> None:
        linears = self.backbone.all_linears()
        write_adapter(
            folder,
            weights,
            linears,
            head=dict(self.head_of(role).named_parameters()) if role in self.heads else None,
            base_name=self.base.config.name_or_path,
            conv1d=all(isinstance(linears[name], Conv1D) for name in weights),
            dropout=self.lora.dropout,
        )


def _folders(fold: PathLike | Sequence[PathLike] | None) -> list[PathLike]:
    if fold is None:
        return []
    return [fold] if isinstance(fold, (str, os.PathLike)) else list(fold)
