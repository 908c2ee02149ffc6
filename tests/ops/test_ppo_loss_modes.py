"""ppo_loss under autograd, the dispatcher, compilation, threads, instruction sets and strides."""

from __future__ import annotations

import pytest
import tolerances
import torch
from parity import double
from ppo_parity import FULL, GRADIENTS, LEAVES, core, run
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops import ppo_loss
from rlhf_fast.reference import ppo_loss as reference
from rlhf_fast.reference._reduce import REDUCTIONS
from rlhf_fast.reference.ppo_loss import STATS


def test_two_backward_calls_agree_and_leave_the_saved_gradients_alone():
    kwargs = reference.sample((3, 9))
    leaves = [kwargs[k].requires_grad_() for k in LEAVES]
    loss = ppo_loss(**kwargs, **FULL).loss
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for g in torch.autograd.grad(3 * loss, leaves, retain_graph=True):
        g.fill_(7.0)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_last_backward_gives_what_the_ones_before_gave_in_memory_of_its_own(scale):
    kwargs = reference.sample((3, 9))
    leaves = [kwargs[k].requires_grad_() for k in LEAVES]
    loss = ppo_loss(**kwargs, **FULL).loss
    upstream = torch.tensor(scale)
    kept = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    batched = torch.autograd.grad(loss, leaves, upstream.expand(2), retain_graph=True, is_grads_batched=True)
    loss.backward(upstream)
    assert all(
        torch.equal(leaf.grad, g) and torch.equal(b[1], g) for leaf, g, b in zip(leaves, kept, batched, strict=True)
    )
    places = {x.data_ptr() for x in (*kept, *(leaf.grad for leaf in leaves))}
    assert len(places) == 2 * len(leaves) and upstream == scale
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    ppo_loss(**kwargs, **FULL).loss.backward(upstream)  # adds to .grad in place
    assert all(torch.equal(leaf.grad, 2 * g) for leaf, g in zip(leaves, kept, strict=True))


def test_only_logprobs_entropy_and_values_get_a_gradient():
    for backend in ("cpp", "reference"):
        kwargs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in reference.sample((3, 9)).items()}
        with rlhf_fast.use_backend(backend):
            ppo_loss(**kwargs, **FULL).loss.backward()
        assert all((v.grad is not None) == (k in LEAVES) for k, v in kwargs.items() if k != "mask")
    constants = {k: v.detach() if k in LEAVES else v for k, v in kwargs.items()}
    assert not ppo_loss(**constants, **FULL).loss.requires_grad


def test_a_second_derivative_is_refused():
    kwargs = core(reference.sample((2, 5)))
    leaf = kwargs["logprobs"].requires_grad_()
    (grad,) = torch.autograd.grad(ppo_loss(**kwargs).loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def test_without_grad_mode_nothing_is_kept_for_a_backward():
    kwargs = reference.sample((3, 9))
    kwargs["logprobs"].requires_grad_()
    with torch.no_grad():
        assert not ppo_loss(**kwargs).loss.requires_grad
    expected = run(kwargs)["loss"]
    with torch.inference_mode():
        assert torch.equal(ppo_loss(**kwargs).loss, expected)


def test_stats_are_one_small_tensor_with_names():
    stats = ppo_loss(**reference.sample((3, 9))).stats
    assert tuple(stats) == STATS and stats.tensor.shape == (len(STATS),) and not stats.tensor.requires_grad
    assert stats.floats()["tokens"] == stats["tokens"].item()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    kwargs = double(reference.sample((3, 6)))
    inputs = [kwargs.pop(k).requires_grad_() for k in LEAVES]

    def call(logprobs, entropy, values):
        out = ppo_loss(logprobs, entropy=entropy, values=values, **kwargs, **FULL, reduction=reduction, dual_clip=1.5)
        return out.loss

    assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)
    with rlhf_fast.use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)


def _op_args(kwargs, gradients):
    get = kwargs.get
    tensors = [
        get(k)
        for k in (
            "logprobs", "old_logprobs", "advantages", "mask", "entropy", "ref_logprobs", "values", "old_values",
            "returns", "importance_weights",
        )
    ]  # fmt: skip
    numbers = (0.2, 0.2, 3.0, 20.0, 0.01, 0.1, "k3", 20.0, 10.0, 0.2, 0.1, "seq-mean-token-mean", 0.0, "token", "clip")
    return (*tensors, None, None, *numbers, gradients)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    kwargs = reference.sample((3, 9))
    leaves = {k: v.requires_grad_(grad) if k in LEAVES else v for k, v in kwargs.items()}
    opcheck(torch.ops.rlhf_fast.ppo_loss.default, _op_args(leaves, grad))
    opcheck(torch.ops.rlhf_fast.ppo_loss.default, _op_args(core(leaves), grad))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_compile_gives_the_eager_result_and_gradient(backend):
    kwargs = reference.sample((3, 9))
    leaves = [kwargs[k].requires_grad_() for k in LEAVES]
    rest = {k: v for k, v in kwargs.items() if k not in LEAVES}
    call = lambda a, b, c: ppo_loss(a, entropy=b, values=c, **rest, **FULL).loss * 3
    with rlhf_fast.use_backend(backend):
        eager = torch.autograd.grad(call(*leaves), leaves)
        compiled = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=tolerances.FLOOR[torch.float32], rtol=0)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
def test_threads_and_instruction_sets_give_the_same_bits(each_isa, reduction):
    kwargs = reference.sample((40, 701))
    call = lambda: list(run(kwargs, reduction=reduction, **FULL).values())
    torch.set_num_threads(2)
    results = [r for _, r in each_isa(call)]
    torch.set_num_threads(1)
    results.append(call())
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_gradients_do_not_depend_on_the_batch_given_the_normalizer():
    kwargs = reference.sample((40, 300))
    whole = run(kwargs, normalizer=100.0, **FULL)
    for i in (0, 13, 39):
        alone = run({k: v[i : i + 1] for k, v in kwargs.items()}, normalizer=100.0, **FULL)
        assert all(torch.equal(whole[k][i : i + 1], alone[k]) for k in GRADIENTS)


def test_strided_inputs_and_inputs_are_not_changed():
    kwargs = reference.sample((12, 7))
    copies = {k: v.clone() for k, v in kwargs.items()}
    expected = run(kwargs, **FULL)
    got = run({k: v.T.contiguous().T for k, v in kwargs.items()}, **FULL)
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert all(torch.equal(kwargs[k], copies[k]) for k in kwargs)


def test_meta_tensors_have_shapes_and_no_data():
    x = torch.zeros(2, 3, device="meta", requires_grad=True)
    out = ppo_loss(x, x.detach(), x.detach(), torch.ones(2, 3, dtype=torch.bool, device="meta"))
    assert out.loss.shape == () and out.loss.is_meta and out.stats.tensor.shape == (len(STATS),)
