from __future__ import annotations

import json
import random

import numpy
import pytest
import safetensors.torch
import torch
from checkpoints import save, tensors_of

from rlhf_fast.train.checkpoint import (
    CheckpointStore,
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def test_rng_state_survives_json_and_restores_every_generator():
    own = torch.Generator().manual_seed(3)
    random.gauss(0, 1)  # leaves a cached second value in Python's and NumPy's generators
    numpy.random.normal()

    def draw() -> list[float]:
        floats = [random.random(), random.gauss(0, 1), numpy.random.normal(), numpy.random.rand()]
        return [*floats, *torch.rand(3).tolist(), *torch.rand(3, generator=own).tolist()]

    state = json.loads(json.dumps(rng_state({"own": own}), allow_nan=False))
    first = draw()
    assert draw() != first
    set_rng_state(state, {"own": own})
    assert draw() == first


def test_wrong_rng_state_is_refused_and_changes_nothing():
    state = rng_state({"own": torch.Generator()})
    before = rng_state()
    with pytest.raises(ValueError, match=r"'generators' got \[\], expected \['own'\]"):
        set_rng_state(state)
    for broken in (
        {},
        {**before, "torch": "xx"},
        {**before, "python": {}},
        {**before, "numpy": {"kind": "MT19937"}},
    ):
        with pytest.raises(ValueError, match="incomplete state"):
            set_rng_state(broken)
    with pytest.raises(ValueError, match="2 CUDA devices, expected at most 1"):
        set_rng_state({**before, "cuda": ["00", "00"]})
    assert rng_state() == before


def parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(1)
    return {n: torch.nn.Parameter(torch.randn(3, 2)) for n in ("policy.a", "policy.b", "unused")}


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95), eps=1e-5, amsgrad=True),
    "Adam, two groups": lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("as_mapping", [True, False])
def test_optimizer_continues_bit_for_bit_after_a_checkpoint(store, kind, as_mapping):
    def step(named, optimizer, at: int) -> None:
        for i, p in enumerate(list(named.values())[:2]):  # the third never has a gradient
            p.grad = torch.sin(p.detach() * (at + i + 1))
        optimizer.step()

    named = parameters()
    optimizer = OPTIMIZERS[kind](list(named.values()))
    names = named if as_mapping else list(named)
    for at in range(3):
        step(named, optimizer, at)
    store.save(3, {"model": named, "optim": optimizer_tensors(optimizer, names)}, {})

    found = store.load_latest().tensors
    other = {n: torch.nn.Parameter(t) for n, t in found["model"].items()}
    other = {n: other[n] for n in named}
    resumed = OPTIMIZERS[kind](list(other.values()))
    load_optimizer_tensors(resumed, other if as_mapping else list(other), found["optim"])
    for at in range(3, 6):
        step(named, optimizer, at)
        step(other, resumed, at)
    for name, p in named.items():
        assert torch.equal(p, other[name])
    assert {n: (type(t), t.dtype, t.device) for n, t in optimizer_tensors(optimizer, named).items()} == {
        n: (type(t), t.dtype, t.device) for n, t in optimizer_tensors(resumed, other).items()
    }


def test_loaded_optimizer_state_does_not_share_memory_with_the_checkpoint():
    named = parameters()
    optimizer = OPTIMIZERS["AdamW"](list(named.values()))
    named["policy.a"].grad = torch.ones(3, 2)
    optimizer.step()
    saved = {n: t.clone() for n, t in optimizer_tensors(optimizer, named).items()}
    assert sorted(saved) == [f"policy.a.{k}" for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")]
    load_optimizer_tensors(optimizer, named, saved)
    before = {n: t.clone() for n, t in saved.items()}
    optimizer.step()
    assert all(torch.equal(saved[n], before[n]) for n in saved)
    load_optimizer_tensors(optimizer, named, {})
    assert not optimizer.state


def test_wrong_optimizer_state_is_refused_and_changes_nothing():
    named = parameters()
    optimizer = OPTIMIZERS["AdamW"](list(named.values()))
    named["policy.a"].grad = torch.ones(3, 2)
    optimizer.step()
    state = optimizer_tensors(optimizer, named)
    with pytest.raises(ValueError, match=r"got 'policy\.z\.exp_avg', which is of no parameter"):
        load_optimizer_tensors(optimizer, named, {"policy.z.exp_avg": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"got shape \(2, 3\) for 'policy\.a\.exp_avg', expected \(3, 2\)"):
        load_optimizer_tensors(optimizer, named, {**state, "policy.a.exp_avg": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="got 2 names, 2 of them different, expected 3 different names"):
        optimizer_tensors(optimizer, ["a", "b"])
    with pytest.raises(ValueError, match="got 3 names, 2 of them different"):
        optimizer_tensors(optimizer, ["a", "a", "b"])
    with pytest.raises(ValueError, match=r"none for a parameter of shape \(3, 2\)"):
        optimizer_tensors(optimizer, {"policy.a": named["policy.a"]})
    assert optimizer_tensors(optimizer, named).keys() == state.keys()
    optimizer.state[named["policy.a"]]["odd"] = object()
    with pytest.raises(TypeError, match=r"got object for policy\.a\.odd"):
        optimizer_tensors(optimizer, named)


def test_files_are_plain_safetensors_and_json(store):
    save(store, 1)
    named = safetensors.torch.load_file(store.path(1) / "model.safetensors")
    assert torch.equal(named["a"], tensors_of(1)["model"]["a"])
    body = json.loads((store.path(1) / "state.json").read_text())
    assert body["state"] == {"step": 1, "nested": {"lr": 0.1}}
    assert set(body["versions"]) == {"rlhf_fast", "torch", "python"}
