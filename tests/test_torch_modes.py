"""What every op promises inside of PyTorch's own machinery: vmap and torch.func, inference mode, autocast, torch.compile of a whole
step, DDP, FSDP2 and DTensor."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import modes_rank
import pytest
import tolerances
import torch
from parity import double
from torch import Tensor

import rlhf_fast
from rlhf_fast import ops

SETTINGS = {
    "kl_estimate": {"kind": "k3"},
    "advantages": {"kl_coef": 0.1},
    "ppo_loss": {"entropy_coef": 0.1},
    "group_advantages": {"kind": "rloo"},
}
each_op = pytest.mark.parametrize("name", ops.__all__)
CONSTANT = {"cached_attention", "sample_tokens"}  # of generation: nothing there has a gradient
each_differentiable_op = pytest.mark.parametrize("name", [name for name in ops.__all__ if name not in CONSTANT])


def sample(name):
    return importlib.import_module(f"rlhf_fast.reference.{name}").sample()


def call(name, kwargs) -> tuple[Tensor, ...]:
    out = getattr(rlhf_fast, name)(**kwargs, **SETTINGS.get(name, {}))
    if isinstance(out, rlhf_fast.LossOutput):
        return out.loss, out.stats.tensor
    return (out,) if isinstance(out, Tensor) else tuple(x for x in out if x is not None)


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def leaf(kwargs):
    return next(k for k, v in kwargs.items() if v.is_floating_point())


def derivative(name, kwargs):
    """(function of the first float input, that input)."""
    first = leaf(kwargs)

    def weighted(x):
        out = call(name, {**kwargs, first: x})[0]
        return (out * torch.linspace(1.0, 2.0, out.numel(), dtype=out.dtype).view(out.shape)).sum()

    return weighted, kwargs[first]


@each_op
def test_inference_mode_and_no_grad_change_nothing(name):
    kwargs = sample(name)
    kwargs[leaf(kwargs)].requires_grad_()
    expected = call(name, kwargs)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            got = call(name, kwargs)
        assert same(got, expected) and not any(x.requires_grad for x in got)
    with torch.inference_mode():
        inside = call(
            name, {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        )  # inference tensors
    assert same(inside, expected)


@each_op
def test_vmap_is_a_loop_over_samples(name):
    kwargs = sample(name)
    first = leaf(kwargs)
    batch = torch.stack([kwargs[first], 0.5 * kwargs[first], kwargs[first].flip(0)])
    got = torch.func.vmap(lambda x: call(name, {**kwargs, first: x}))(batch)
    one_by_one = [call(name, {**kwargs, first: x}) for x in batch]
    assert same(got, [torch.stack(x) for x in zip(*one_by_one, strict=True)])


def forward_mode(function, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(
            function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        )[1]


TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(function)(x),
    "grad of vmap": lambda function, x: torch.func.grad(lambda x: torch.func.vmap(function)(x[None]).sum())(x),
    "vmap of grad": lambda function, x: torch.func.vmap(torch.func.grad(function))(x[None]),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "forward mode": forward_mode,
}


@each_differentiable_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_other_than_autograds_are_refused_by_name(name, transform):
    with pytest.raises(RuntimeError, match=rf"^{name}: the derivatives of torch.func .*use_backend\('reference'\)"):
        TRANSFORMS[transform](*derivative(name, sample(name)))


@each_differentiable_op
def test_the_reference_has_the_derivatives_of_torch_func_and_of_forward_mode(name):
    function, x = derivative(name, double(sample(name)))
    with rlhf_fast.use_backend("reference"):
        of_x = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(of_x), of_x)
        assert torch.equal(TRANSFORMS["grad"](function, x), expected) and expected.any()
        for transform in ("jvp", "forward mode"):
            error = TRANSFORMS[transform](function, x) - expected.sum()
            assert error.abs() <= tolerances.DOUBLE * expected.abs().sum(), transform


@each_op
def test_a_constant_inside_of_torch_func_is_no_derivative_of_the_op(name):
    kwargs = sample(name)
    expected = call(name, kwargs)[0].sum()
    grad, value = torch.func.grad_and_value(lambda c: c * call(name, kwargs)[0].sum())(torch.tensor(2.0))
    assert torch.equal(grad, expected) and torch.equal(value, 2.0 * expected)


def test_a_step_in_one_graph_is_the_eager_step():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 6, 8, generator=g), torch.randn(31, 8, generator=g)
    ids, mask = torch.randint(0, 31, (3, 6), generator=g), torch.rand(3, 6, generator=g) > 0.2
    values, scores = torch.randn(3, 6, generator=g), torch.randn(3, generator=g)

    def step(hidden, values):
        now = rlhf_fast.token_logprobs(hidden @ weight.t(), ids, mask=mask)
        again = rlhf_fast.linear_token_logprobs(hidden, weight, ids, mask=mask).logprobs
        found = rlhf_fast.advantages(scores, values.detach(), mask)
        rewards = torch.zeros_like(values).index_fill(1, torch.tensor([5]), 1.0)
        advantages, _ = rlhf_fast.gae(rewards, values, mask)
        out = rlhf_fast.ppo_loss(
            now.logprobs, again.detach() - 0.1, found.advantages, mask,
            entropy=now.entropy, entropy_coef=0.01, values=values, old_values=values.detach(), returns=found.returns,
        )  # fmt: skip
        return out.loss + again.sum() + advantages.sum()

    inputs = [hidden.requires_grad_(), values.requires_grad_()]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [(f(*inputs), torch.autograd.grad(f(*inputs), inputs)) for f in (step, compiled)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_autocast_region_leaves_the_dtypes_of_the_arguments(dtype, backend):
    torch.manual_seed(0)
    body, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 31, bias=False, dtype=dtype)
    x, ids = torch.randn(3, 6, 8), torch.randint(0, 31, (3, 6))
    with rlhf_fast.use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(x)
            assert hidden.dtype is torch.bfloat16  # what the region makes of a Linear
            stats = rlhf_fast.linear_token_logprobs(hidden, head.weight, ids)
            of_logits = rlhf_fast.token_logprobs(head(x), ids)
        outside = hidden.detach().requires_grad_()
        expected = rlhf_fast.linear_token_logprobs(outside, head.weight, ids)
        assert same(stats[:3], expected[:3]) and stats.logprobs.dtype is of_logits.logprobs.dtype is torch.float32
        wanted = torch.autograd.grad(expected.logprobs.sum(), head.weight)
        got = torch.autograd.grad(stats.logprobs.sum(), [head.weight, body.weight])  # outside of it, as PyTorch advises
    assert torch.equal(got[0], wanted[0]) and got[0].dtype is dtype and got[1].dtype is torch.float32


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes under gloo found."""
    folder = tmp_path_factory.mktemp("gloo")
    script = Path(__file__).parent / "modes_rank.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(modes_rank.WORLD)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(modes_rank.WORLD)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_ranks_train_the_head_on_their_mean_gradient(ranks, wrapper):
    model = modes_rank.policy()
    (modes_rank.loss(model(*modes_rank.batch())) / modes_rank.WORLD).backward()
    for found in ranks:
        for name, p in model.named_parameters():
            got = torch.tensor(found[wrapper][name])
            assert (got - p.grad).abs().max() <= tolerances.FLOOR[torch.float32] * p.grad.abs().max(), name


def test_a_dtensor_is_refused_by_name_and_its_local_part_is_taken(ranks):
    _, ids, mask = modes_rank.batch()
    expected = rlhf_fast.token_logprobs(modes_rank.logits(), ids, mask=mask)
    assert mask[0, 0]
    for found in ranks:
        assert found["sharded head"].startswith("linear_token_logprobs: argument 'weight' got a DTensor, expected its")
        assert found["sharded logits"].startswith("token_logprobs: argument 'logits' got a DTensor, expected its")
        assert "to_local() with process_group" in found["sharded logits"]
        for got, x in zip(found["local logits"], expected, strict=False):
            torch.testing.assert_close(torch.tensor(got), x)


def test_a_cut_vocabulary_compiles(ranks):
    assert all(found["compiled"] for found in ranks)
