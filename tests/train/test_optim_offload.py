"""AdamW on the host for parameters elsewhere: the numbers of AdamW where they are, and state that either of them takes."""

from __future__ import annotations

import pytest
import torch
from tolerances import FLOOR
from torch import Tensor, nn

from rlhf_fast.config import OptimConfig
from rlhf_fast.model.offload import Copies
from rlhf_fast.train.checkpoint import load_optimizer_tensors, optimizer_tensors
from rlhf_fast.train.optimizer import HostAdamW, adamw

SHAPES = [(5, 3), (7,), (1,), (300, 41)]
NAMES = [f"p{i}" for i in range(len(SHAPES))]
OPTIONS = {"betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}


class Late(Copies):
    """Copies to the host are made as late as they may be: when the host says that it waits for them."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def host(self, size: int) -> Tensor:
        return super().host(size).fill_(255)  # NaN

    def fetch(self, host: Tensor, there: Tensor) -> None:
        self.asked.append((host, there.detach().clone()))

    def finish(self) -> None:
        for host, value in self.asked:
            host.copy_(value)
        self.asked.clear()


def groups(seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    return [{"params": parameters[:3], "lr": 1e-2, "peak": 1e-2}, {"params": parameters[3:], "lr": 3e-3, "peak": 3e-3}]


def train(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], steps: range) -> None:
    """Steps whose gradients are those of their number; the third parameter has one in every second step only."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(parameters):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if i == 2 and step % 2 else gradient
        optimizer.step()
        optimizer.zero_grad()


def pair() -> tuple[HostAdamW, list[nn.Parameter], torch.optim.AdamW, list[nn.Parameter]]:
    there, here = groups(), groups()
    host = HostAdamW(there, Late(), **OPTIONS)
    plain = torch.optim.AdamW(here, fused=True, **OPTIONS)
    return host, [p for g in there for p in g["params"]], plain, [p for g in here for p in g["params"]]


def equal(found: list[nn.Parameter], expected: list[nn.Parameter]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_steps_are_those_of_adamw_on_the_parameters_themselves():
    host, there, plain, here = pair()
    start = [p.detach().clone() for p in there]
    for n in range(4):
        for optimizer in (host, plain):
            optimizer.param_groups[1]["lr"] = 3e-3 / (n + 1)
        train(host, there, range(n, n + 1))
        train(plain, here, range(n, n + 1))
        assert equal(there, here)
    assert all(p.grad is None for p in there)
    assert not any(torch.equal(x, y) for x, y in zip(start, there, strict=True))
    assert host.state[host.here[2]]["step"] == 2 and host.state[host.here[0]]["step"] == 4
    assert [g["peak"] for g in host.param_groups] == [1e-2, 3e-3]


def test_a_step_on_the_host_is_that_of_a_loop_over_parameters_but_for_rounding():
    host, there, _, here = pair()
    plain = torch.optim.AdamW([{"params": here[:3], "lr": 1e-2}, {"params": here[3:], "lr": 3e-3}], **OPTIONS)
    train(host, there, range(6))
    train(plain, here, range(6))
    for x, y in zip(there, here, strict=True):
        torch.testing.assert_close(x, y, rtol=FLOOR[torch.float32], atol=FLOOR[torch.float32])


def test_what_is_on_the_device_counts():
    host, there, plain, here = pair()
    train(host, there, range(2))
    train(plain, here, range(2))
    with torch.no_grad():
        for p in (*there, *here):  # as a resume, or an adapter that is loaded
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    train(host, there, range(2, 4))
    train(plain, here, range(2, 4))
    assert equal(there, here)


@pytest.mark.parametrize("first, second", [("host", "host"), ("host", "plain"), ("plain", "host")])
def test_saved_state_goes_on_bit_for_bit_wherever_it_is_from(first, second):
    host, there, *_ = pair()
    train(host, there, range(5))
    made = {"host": pair()[:2], "plain": pair()[2:]}
    optimizer, parameters = made[first]
    train(optimizer, parameters, range(3))
    saved = {name: x.clone() for name, x in optimizer_tensors(optimizer, NAMES).items()}
    values = [p.detach().clone() for p in parameters]
    optimizer, parameters = {"host": pair()[:2], "plain": pair()[2:]}[second]
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
    load_optimizer_tensors(optimizer, NAMES, saved)
    train(optimizer, parameters, range(3, 5))
    assert equal(parameters, there)
    names = {f"{name}.{key}" for name in NAMES for key in ("step", "exp_avg", "exp_avg_sq")}
    assert saved.keys() == names


@pytest.mark.parametrize("size", [1, 1000, 70001])
def test_bits_do_not_depend_on_the_threads(size):
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))
            train(HostAdamW([{"params": [p], "lr": 1e-2}], Late(), **OPTIONS), [p], range(3))
            found.append(p)
    finally:
        torch.set_num_threads(before)
    assert equal(found[:1] * 2, found[1:])


def test_gradients_can_be_cleared_in_place():
    host, there, *_ = pair()
    for p in there:
        p.grad = torch.ones_like(p)
    host.zero_grad(set_to_none=False)
    assert all(p.grad.eq(0).all() for p in there)


@pytest.mark.parametrize("offload", [False, True])
def test_on_a_cpu_the_setting_changes_nothing(offload):
    optim = OptimConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, offload=offload)
    found = adamw(groups(), optim)
    assert type(found) is torch.optim.AdamW
    assert all(found.defaults[key] == value for key, value in vars(optim).items() if key in ("betas", "eps"))
    assert found.defaults["weight_decay"] == 0.2
