"""The adapted linear layer against plain autograd on the written-out formula."""

from __future__ import annotations

import pytest
import torch
from tolerances import FLOOR
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.model.linear import RowPlan, adapt, pairs_on
from rlhf_fast.model.lora import LoraPair

ROLES = ("policy", "reference", "value")


def layer(kind: str, bias: bool = True) -> nn.Module:
    module = Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.double().requires_grad_(False)


def pair(scale: float, dropout: float = 0.0) -> LoraPair:
    return LoraPair(torch.randn(3, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64), scale, dropout)


@pytest.mark.parametrize("kind, bias", [("linear", True), ("linear", False), ("conv1d", True)])
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (3, 1, 5), (0, 5)])
def test_forward_and_gradients_equal_the_written_out_formula(kind, bias, shape):
    module = layer(kind, bias)
    weight = module.weight.t() if kind == "conv1d" else module.weight
    offset = module.bias if bias else 0.0
    plan, pairs = RowPlan(), {"policy": pair(0.5), "value": pair(2.0)}
    adapt(module, plan)
    pairs_on(module).update(pairs)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def formula(x):
        y = x @ weight.t() + offset
        blocks = []
        for role, x_block, y_block in zip(ROLES, x.chunk(3), y.chunk(3), strict=True):
            if role in pairs:
                p = pairs[role]
                y_block = y_block + p.scale * (x_block @ p.lora_A.t()) @ p.lora_B.t()
            blocks.append(y_block)
        return torch.cat(blocks)

    with plan.use(ROLES):
        got = module(x)
        with torch.no_grad():
            assert torch.equal(module(x), got)
    leaves = [x, *(q for p in pairs.values() for q in p.parameters())]
    if shape[0] == 0:
        assert got.shape == (0, 7)
        return
    expected = formula(x)
    error = {"rtol": 0.0, "atol": 64 * FLOOR[torch.float64]}
    torch.testing.assert_close(got, expected, **error)
    upstream = torch.randn_like(got).transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **error)


def test_frozen_factors_and_inputs_get_no_gradient():
    module, plan, p = layer("linear"), RowPlan(), pair(1.0)
    adapt(module, plan)
    pairs_on(module)["policy"] = p
    p.lora_A.requires_grad_(False)
    x = torch.randn(4, 5, dtype=torch.float64)
    with plan.use(("policy",)):
        module(x).sum().backward()
    assert p.lora_A.grad is None and x.grad is None and p.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("dropout", [0.25, 0.9])
def test_dropout_keeps_the_mean_and_its_gradient_is_that_of_the_drawn_mask(dropout):
    module, plan, p = layer("linear"), RowPlan(), pair(1.0, dropout)
    adapt(module, plan)
    pairs_on(module)["policy"] = p.train()
    x = torch.randn(1, 5, dtype=torch.float64).expand(20000, 5).contiguous().requires_grad_(True)
    with plan.use(("policy",)):
        torch.manual_seed(3)
        y = module(x)
        torch.manual_seed(3)
        keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - dropout)
        plain = module.eval() and x @ module.weight.t() + module.bias
    expected = plain + (x * keep / (1 - dropout)) @ p.lora_A.t() @ p.lora_B.t()
    torch.testing.assert_close(y, expected)
    leaves, upstream = [x, p.lora_A, p.lora_B], torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)
    full = plain[0] + x[0] @ p.lora_A.t() @ p.lora_B.t()
    spread = (y - plain).std(0).max() / 20000**0.5
    assert (y.mean(0) - full).abs().max() < 5 * spread


def test_changed_factor_between_forward_and_backward_is_an_error():
    module, plan, p = layer("linear"), RowPlan(), pair(1.0)
    adapt(module, plan)
    pairs_on(module)["policy"] = p
    with plan.use(("policy",)):
        y = module(torch.randn(2, 5, dtype=torch.float64))
    with torch.no_grad():
        p.lora_B.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_computes_in_its_dtype_for_idle_and_busy_adapters_alike():
    module, plan = layer("linear").float(), RowPlan()
    x = torch.randn(4, 5, requires_grad=True)
    adapt(module, plan)
    p = LoraPair(torch.randn(3, 5), torch.zeros(7, 3), 1.0)
    pairs_on(module)["policy"] = p
    with torch.autocast("cpu", torch.bfloat16):
        idle = module(x)
        with plan.use(("policy",)):
            busy = module(x)
    assert busy.dtype == torch.bfloat16 and torch.equal(idle, busy)
    busy.float().sum().backward()
    assert x.grad.dtype == torch.float32 and p.lora_B.grad.dtype == torch.float32 and p.lora_B.grad.abs().max() > 0


def test_rows_that_do_not_split_into_roles_are_an_error():
    module, plan = layer("linear"), RowPlan()
    adapt(module, plan)
    pairs_on(module)["value"] = pair(1.0)
    with plan.use(ROLES), pytest.raises(ValueError, match="got 4 rows, expected equal blocks"):
        module(torch.randn(4, 5, dtype=torch.float64))
