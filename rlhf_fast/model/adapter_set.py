"""The adapters of all roles of a model: what stands on which layer, and what a file may put there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rlhf_fast.model.adapters import AdapterFile
from rlhf_fast.model.backbone import Backbone
from rlhf_fast.model.heads import HEAD_INIT
from rlhf_fast.model.linear import RowPlan, adapt, check_adaptable, features, fold_into, pairs_on
from rlhf_fast.model.lora import LoraConfig, LoraPair, LowRank


class AdapterSet(nn.ModuleDict):
    """By role, its pairs by the names of their layers in the base, whose dots are slashes here: a child's name must not contain one.

    A pair is registered twice: as a child (for .to, .train, .parameters) and on the layer that runs it.
    """

    def __init__(self, roles: Sequence[str], backbone: Backbone, plan: RowPlan, config: LoraConfig) -> None:
        super().__init__({role: nn.ModuleDict() for role in roles})
        self._linears, self._plan, self._config = backbone.linears(), plan, config
        self._device_of = backbone.device_of

    def of(self, role: str) -> dict[str, LoraPair]:
        """The role's pairs by the name of their layer, in the order of the layers."""
        on_layers = ((name, pairs_on(layer).get(role)) for name, layer in self._linears.items())
        return {name: pair for name, pair in on_layers if pair is not None}

    def data(self, role: str) -> dict[str, LowRank]:
        """Detached fp32 copies of the role's pairs on the CPU."""
        return {name: pair.data() for name, pair in self.of(role).items()}

    def trains(self, role: str) -> bool:
        """Whether any factor of the role takes a gradient."""
        return any(p.requires_grad for pair in self.of(role).values() for p in pair.parameters())

    def start(self, role: str, names: Sequence[str], generator: torch.Generator) -> None:
        """A new pair on each of the layers `names`, drawn in their order."""
        for name in names:
            self._place(role, name, LoraPair.fresh(self._config, *features(self._linears[name]), generator))

    @torch.no_grad()
    def replace(self, role: str, weights: Mapping[str, LowRank]) -> None:
        """Make these the role's adapter; parameters whose shape stays are changed in place."""
        current = self.of(role)
        for name in current.keys() - weights.keys():
            del pairs_on(self._linears[name])[role], self._children(role)[_child(name)]
        for name, update in weights.items():
            pair = current.get(name)
            if pair is not None and pair.lora_A.shape == update.a.shape:
                pair.lora_A.copy_(update.a)
                pair.lora_B.copy_(update.b)
                pair.scale = update.scale
            else:
                pair = LoraPair(update.a.clone(), update.b.clone(), update.scale, self._config.dropout)
                self._place(role, name, pair)

    def _place(self, role: str, name: str, pair: LoraPair) -> None:
        layer = self._linears[name]
        adapt(layer, self._plan)
        device = self._device_of(layer)
        if pair.lora_A.device != device:
            pair.to(device)
        pair.requires_grad_(role != "reference").train(self.training)
        self._children(role)[_child(name)] = pair
        pairs_on(layer)[role] = pair

    def _children(self, role: str) -> nn.ModuleDict:
        return self[role]  # type: ignore[return-value]


def _child(name: str) -> str:
    return name.replace(".", "/")


def check_fits(file: AdapterFile, backbone: Backbone, role: str | None) -> None:
    """Raises ValueError unless the file's modules and head are this model's, TypeError for a layer of another kind; role None: to be folded."""
    linears = backbone.all_linears() if role is None else backbone.linears()
    where = "a fold" if role is None else f"the role {role!r}"
    for name, update in file.weights.items():
        if name not in linears:
            raise ValueError(
                f"{file.folder}: module {name!r} is no linear layer that {where} can adapt"
                f" (decoder layers from {0 if role is None else backbone.shared_layers} on)"
            )
        check_adaptable(name, linears[name], fold=role is None)
        maps, base_maps = (update.a.shape[1], update.b.shape[0]), features(linears[name])
        if maps != base_maps:
            raise ValueError(f"{file.folder}: module {name!r} maps (in, out) {maps}, the base's {base_maps}")
    if file.head and role not in HEAD_INIT:
        raise ValueError(f"{file.folder}: has a scalar head, which {where} cannot take")
    if role == "reward" and not file.head:
        raise ValueError(f"{file.folder}: has no scalar head ('score.weight'), expected one for {where}")
    if file.head and file.head["weight"].shape[1] != backbone.hidden_size:
        got, expected = file.head["weight"].shape[1], backbone.hidden_size
        raise ValueError(f"{file.folder}: the head reads {got} features, the base has {expected}")


def fold_file(file: AdapterFile, backbone: Backbone) -> None:
    """Add the file's update to the base weights, in fp32."""
    linears = backbone.all_linears()
    for name, update in file.weights.items():
        fold_into(linears[name], update)
