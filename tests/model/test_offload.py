"""Layers that are streamed from the host: the same bits as layers that stay, in the right order, and never three at a time."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model.tiny import FAMILIES, VOCABULARY, disturb, tiny_base, tiny_batch
from models import save_tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rlhf_fast._op import use_backend
from rlhf_fast.batch import pack
from rlhf_fast.config import ModelConfig
from rlhf_fast.model import ROLES, LoraConfig, SharedModel
from rlhf_fast.model.linear import pairs_on
from rlhf_fast.model.offload import ALIGNMENT, Block, Copies, SideStream, streamed
from rlhf_fast.plan_passes import LiveBytes
from rlhf_fast.rollout import generate
from rlhf_fast.train.loop import base_fingerprint, load_model

LAYERS = 5


class Watched(Copies):
    """Copies to a CPU that plays the device. What is on the host is NaN once it has been copied, so nothing else can read it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.values: dict[int, Tensor] = {}
        self.alive: dict[int, int] = {}
        self.most = 0
        self.order: list[int] = []
        self.read: list[int] = []

    def begin(self, host: Tensor) -> tuple[Tensor, Any]:
        at = host.data_ptr()
        if at not in self.values:
            self.values[at] = host.clone()
            host.fill_(255)
        there = self.values[at].clone()
        layer = list(self.values).index(at)
        storage = there.untyped_storage()
        self.alive[storage._cdata] = there.nbytes
        weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        self.order.append(layer)
        return there, layer

    def ready(self, token: int) -> None:
        self.read.append(token)


def build(family: str = "llama", offload: Copies | None = None, **options: Any) -> SharedModel:
    layers = {"n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers": LAYERS}
    model = disturb(SharedModel(tiny_base(family, **layers), lora=LoraConfig(r=4, alpha=8.0), **options))
    if offload is not None:
        model.backbone.offload(offload)
    return model


def trained(model: SharedModel, *batch: Any, **options: Any) -> list[Tensor]:
    """What a pass of all roles says, and its gradients."""
    out = model(*batch, **options)
    said = [out.policy.logits, out.reference.logits, out.value.values, out.reward.scores]
    sum(x.float().square().mean() for x in said).backward()
    parameters = [p for role in ROLES for p in model.parameters_of(role).values() if p.requires_grad]
    assert sum(p.grad is not None for p in parameters) > len(parameters) // 2
    return [*(x.detach() for x in said), *(p.grad for p in parameters if p.grad is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_have_the_bits_of_layers_that_stay(family, checkpointing):
    ids, mask = tiny_batch()
    expected = trained(build(family, gradient_checkpointing=checkpointing), ids, mask)
    copies = Watched()
    model = build(family, copies, gradient_checkpointing=checkpointing)
    assert any(x.abs().sum() > 0 for x in expected[4:])
    same(trained(model, ids, mask), expected)
    widest = max(host.nbytes for host in model.backbone.stream.hosts)
    assert widest < copies.most <= 2 * widest


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_packed_passes_and_shared_layers(layers, checkpointing):
    ids, mask = tiny_batch()
    flat, bounds = pack(ids, mask)
    options = {"shared_layers": layers, "gradient_checkpointing": checkpointing}
    expected = trained(build(**options), flat, cu_seqlens=bounds)
    copies = Watched()
    model = build(offload=copies, **options)
    same(trained(model, flat, cu_seqlens=bounds), expected)
    assert copies.most <= 2 * model.backbone.stream.hosts[0].nbytes
    if layers:
        trunk = model.trunk(flat, cu_seqlens=bounds)
        model.zero_grad()
        same(trained(model, flat, trunk=trunk, cu_seqlens=bounds), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_layer_is_copied_once_a_direction_and_ahead_of_its_turn(checkpointing):
    copies = Watched()
    model = build(offload=copies, gradient_checkpointing=checkpointing, roles=("policy",))
    ids, mask = tiny_batch()
    out = model(ids, mask, ("policy",))
    up = list(range(LAYERS))
    assert copies.order == copies.read == up
    assert model.backbone.stream.held == model.backbone.stream.hosts[-1].nbytes
    out.policy.hidden.sum().backward()
    assert copies.order == copies.read == [*up, *up[-2::-1]], "the last layer is still there"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_is_on_its_way_before_the_one_in_front_computes(checkpointing):
    copies = Watched()
    model = build(offload=copies, gradient_checkpointing=checkpointing, roles=("policy",))
    up, down = [], []
    for i, layer in enumerate(model.backbone.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, i=i: up.append((i, copies.order[-1])))
        factor = pairs_on(layer.mlp.down_proj)["policy"].lora_A
        factor.register_post_accumulate_grad_hook(lambda _, i=i: down.append((i, copies.order[-1])))
    out = model(*tiny_batch())
    assert up == [(i, min(i + 1, LAYERS - 1)) for i in range(LAYERS)]
    out.policy.hidden.sum().backward()
    assert down == [(i, max(i - 1, 0)) for i in reversed(range(LAYERS))]


def test_the_backward_above_shared_layers_asks_for_none_of_them():
    copies = Watched()
    model = build(offload=copies, roles=("policy",), shared_layers=2)
    ids, mask = tiny_batch()
    trunk = model.trunk(ids, mask)
    copies.order.clear()
    model(ids, mask, trunk=trunk).policy.hidden.sum().backward()
    assert copies.order == [3, 4, 3, 2], "layer 2 came ahead with the trunk"


def test_a_pass_that_keeps_nothing_costs_one_copy_of_each_layer_whatever_the_roles():
    copies = Watched()
    model = build(offload=copies)
    ids, mask = tiny_batch()
    plain = build()
    with torch.inference_mode():
        found, expected = model(ids, mask), plain(ids, mask)
        assert all(torch.equal(found[role].hidden, expected[role].hidden) for role in ROLES)
    assert copies.order == list(range(LAYERS))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rollout_streams_all_layers_for_every_token(family):
    ids = torch.randint(3, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(1))
    mask, copies = torch.ones_like(ids, dtype=torch.bool), Watched()
    found = []
    with use_backend("reference"):  # as on a device that the kernels for CPUs do not serve
        for model in (build(family), build(family, copies)):
            found.append(generate(model, ids, mask, max_new_tokens=6, num_samples=2, seeds=torch.arange(4)))
    assert torch.equal(found[0].input_ids, found[1].input_ids)
    assert torch.equal(found[0].logprobs, found[1].logprobs)
    assert copies.order == list(range(LAYERS)) * 6


def test_adapters_fingerprints_and_weights_are_those_of_layers_that_stay(tmp_path):
    plain, model = build(), build(offload=Copies(torch.device("cpu")))
    assert base_fingerprint(model) == base_fingerprint(plain)
    assert all(torch.equal(x, y) for x, y in zip(model.base.parameters(), plain.base.parameters(), strict=True))
    ids, mask = tiny_batch()
    for m in (plain, model):  # of another rank: parameters of a new shape
        other = disturb(SharedModel(tiny_base(num_hidden_layers=LAYERS), ("policy",), LoraConfig(r=2)), seed=7)
        other.save_adapter("policy", tmp_path / "other")
        m.load_adapter("policy", tmp_path / "other")
    same(trained(model, ids, mask), trained(plain, ids, mask))
    for name, m in (("plain", plain), ("offloaded", model)):
        m.save_adapter("policy", tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "offloaded")]
    assert files[0] == files[1]


def test_an_error_inside_a_layer_leaves_the_weights_where_they_belong():
    model = build(offload=Copies(torch.device("cpu")), roles=("policy",))
    before = {name: id(p) for name, p in model.base.named_parameters()}
    handle = model.backbone.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*tiny_batch())
    handle.remove()
    assert {name: id(p) for name, p in model.base.named_parameters()} == before
    same([model(*tiny_batch()).policy.hidden], [build(roles=("policy",))(*tiny_batch()).policy.hidden])


class Living(LiveBytes):
    """The same for a pass on data, whose questions have answers of their own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out


def test_nothing_of_a_training_pass_outlives_it():
    copies = Watched()
    model = build(offload=copies, roles=("policy",))
    held = []
    with Living() as counter:
        for _ in range(3):
            out = model(*tiny_batch())  # never followed by a backward
            assert len(copies.alive) <= 2
            del out
            held.append(counter.live)
    assert held[0] == held[1] == held[2]


def test_layers_that_came_in_inference_mode_serve_a_training_pass():
    copies = Watched()
    model = build(
        offload=copies, shared_layers=1, roles=("policy",)
    )  # a pass without gradients would bring layer 1 anew
    ids, mask = tiny_batch()
    with torch.inference_mode():
        model.trunk(ids, mask)
    assert list(model.backbone.stream._there) == [0, 1]
    model(ids, mask).policy.hidden.sum().backward()
    assert copies.order == [*range(LAYERS), 3, 2, 1]
    assert copies.most <= 2 * model.backbone.stream.hosts[0].nbytes


class Model(nn.Module):
    """Two layers with a parameter in common, and one that the model itself uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.layers[1].bias = self.layers[0].bias
        self.head = nn.Linear(3, 3)
        self.head.weight = self.layers[2].weight


def test_what_others_use_as_well_is_not_streamed():
    model = Model()
    first, second, third = model.layers
    assert streamed(model, list(model.layers)) == [[first.weight], [second.weight], [third.bias]]


def test_weights_start_at_aligned_bytes():
    shapes = [(3,), (ALIGNMENT,), (5, 7), (0,), (2,)]
    parameters = [nn.Parameter(torch.zeros(s, dtype=torch.bfloat16), requires_grad=False) for s in shapes]
    block = Block(parameters)
    assert block.starts == [0, 256, 768, 1024, 1024] and block.size == 1280


class Late(TorchDispatchMode):
    """What stands in for torch.cuda: copies of a side stream are made as late as they may be.

    A copy that is launched on the side stream runs when the current one waits for an event behind it, not before; and only if the
    side stream had been told to wait for all that the current one held at the launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Tensor, Tensor]] = []
        self.inside = self.waited = False
        self.locked: dict[int, int] = {}
        self.error = 0
        self.done = 0
        self.stops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and function is torch.ops.aten.copy_.default:
            assert self.waited, "the memory may still be read by what was launched before"
            self.launched.append((args[0], args[1]))
            self.waited = False
            return args[0]
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty_like.default:
            self.waited = False
            out.fill_(255)  # NaN until the copy is made
        return out

    def Stream(self, device: torch.device) -> Any:
        def record() -> int:
            return self.done + len(self.launched)

        return SimpleNamespace(wait_stream=self._wait_stream, record_event=record)

    def _wait_stream(self, stream: Any) -> None:
        assert stream is self.current
        self.waited = True

    @property
    def current(self) -> Any:
        return self.__dict__.setdefault(
            "_current", SimpleNamespace(wait_event=self._wait_event, synchronize=self._synchronize)
        )

    def current_stream(self, device: torch.device) -> Any:
        return self.current

    def _synchronize(self) -> None:
        self.stops += 1

    def _wait_event(self, event: int) -> None:
        while self.done < event:
            there, host = self.launched.pop(0)
            inside, self.inside = self.inside, False
            there.copy_(host)
            self.inside, self.done = inside, self.done + 1

    @contextmanager
    def stream(self, side: Any) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def cudart(self) -> Any:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.error:
            assert address % 4096 == 0, "two blocks must not share a page"
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_of_a_side_stream_are_waited_for_and_write_where_nobody_reads(checkpointing):
    ids, mask = tiny_batch()
    options = {"gradient_checkpointing": checkpointing, "shared_layers": 2}
    with Late():  # under a dispatch mode other backends compute
        expected = trained(build(**options), ids, mask)
    with Late() as streams:
        model = build(offload=SideStream(torch.device("cpu"), streams), **options)
        model.trunk(ids, mask)
        model.trunk(ids, mask)  # a second time: layer 2 came ahead in vain
        found = trained(model, ids, mask)
    same(found, expected)


def test_a_copy_that_nobody_reads_is_complete_before_its_memory_goes():
    with Late() as streams:
        stream = build(offload=SideStream(torch.device("cpu"), streams), roles=("policy",)).backbone.stream
        stream._get(1, 2)
        assert len(streams.launched) == 1
        stream._get(1, None)
    assert not streams.launched and stream.held == stream.hosts[1].nbytes


def test_host_memory_is_page_locked_at_its_exact_size_and_unlocked_before_it_goes():
    streams = Late()
    copies = SideStream(torch.device("cpu"), streams)
    model = build(offload=copies, roles=("policy",))
    hosts = [host.nbytes for host in model.backbone.stream.hosts]
    assert sorted(streams.locked.values()) == sorted(hosts)
    weight = model.base.model.layers[0].mlp.up_proj.weight
    del model
    gc.collect()
    assert len(streams.locked) == 1, "of the layer whose weight is still in use"
    del weight
    gc.collect()
    assert not streams.locked
    assert copies.host(0).nbytes == 0


def test_memory_that_cannot_be_locked_is_told_and_serves(caplog):
    streams = Late()
    streams.error = 2
    with caplog.at_level(logging.WARNING):
        host = SideStream(torch.device("cpu"), streams).host(3 << 20)
    assert host.nbytes == 3 << 20 and not streams.locked
    assert "3.0 MiB of host memory cannot be page-locked (CUDA error 2)" in caplog.text
    host.fill_(1)


def test_a_gradient_is_read_after_a_stop():
    streams = Late()
    copies = SideStream(torch.device("cpu"), streams)
    host = torch.zeros(3)
    copies.fetch(host, torch.ones(3))
    copies.finish()
    assert streams.stops == 1 and host.tolist() == [1.0] * 3


@pytest.mark.parametrize("other", [{"quantize": "nf4"}, {"quantize": "int8"}, {"shard": True}])
def test_settings_that_do_not_go_together_are_refused(other):
    with pytest.raises(ValueError, match="ModelConfig: argument 'offload' got True, expected False beside"):
        ModelConfig("folder", offload=True, **other)


def test_models_that_cannot_be_offloaded_are_refused():
    model = build(roles=("policy",))
    with pytest.raises(ValueError, match="argument 'device' got the CPU, expected another device, once"):
        model.offload(torch.device("cpu"))
    with pytest.raises(ValueError, match="argument 'offload' got True, expected False for a quantised base"):
        SharedModel.from_pretrained("folder", quantize="nf4", offload=True, device="cuda")


def test_a_cpu_says_that_nothing_changes(tmp_path, caplog):
    save_tiny(tmp_path)
    config = ModelConfig(str(tmp_path), dtype="float32", offload=True)
    with caplog.at_level(logging.WARNING):
        model = load_model(config, ("policy",), 0, device=torch.device("cpu"))
    assert model.backbone.stream is None
    assert "model.offload changes nothing on a CPU" in caplog.text
