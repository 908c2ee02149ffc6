"""What every op on per-token tensors promises under unusual calls: concurrency, fork, autocast, transforms, mixed dtypes."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import rlhf_fast
from rlhf_fast.ops import advantages, dpo_loss, group_advantages, kl_estimate, ppo_loss, reward_loss, whiten
from rlhf_fast.reference import advantages as sample_advantages
from rlhf_fast.reference import dpo_loss as sample_dpo
from rlhf_fast.reference import group_advantages as sample_group
from rlhf_fast.reference import kl_estimate as sample_kl
from rlhf_fast.reference import ppo_loss as sample_ppo
from rlhf_fast.reference import reward_loss as sample_reward
from rlhf_fast.reference import whiten as sample_whiten

LONG = (40, 1000)  # long enough to start a second thread

# name: (call, inputs, differentiable input)
CALLS = {
    "kl_estimate": (lambda **k: [kl_estimate(kind="k3", **k)], sample_kl.sample, "logprobs"),
    "whiten": (lambda **k: [whiten(**k)], sample_whiten.sample, "x"),
    "advantages": (lambda **k: list(advantages(kl_coef=0.1, **k)), sample_advantages.sample, "values"),
    "group_advantages": (
        lambda **k: [group_advantages(**k)], lambda shape, **o: sample_group.sample(shape[0] * shape[1], **o), "scores",
    ),
    "reward_loss": (
        lambda **k: [reward_loss(**k).loss], lambda shape, **o: sample_reward.sample(shape[0] * shape[1], **o), "chosen_scores",
    ),
    "dpo_loss": (lambda **k: list(dpo_loss(**k)), sample_dpo.sample, "chosen_logprobs"),
    "ppo_loss": (
        lambda **k: [ppo_loss(kl_coef=0.1, entropy_coef=0.01, **k).loss], sample_ppo.sample, "logprobs",
    ),
}  # fmt: skip
each_op = pytest.mark.parametrize("name", CALLS)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_op
def test_threads_calling_at_once_get_the_result_of_a_single_call(name):
    call, sample, _ = CALLS[name]
    torch.set_num_threads(2)
    inputs = [sample((20, 500), seed=s) for s in range(4)]
    expected = [call(**k) for k in inputs]
    wrong = []

    def work(i):
        for _ in range(10):
            if not same(call(**inputs[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_computes_the_same_bits_on_one_thread_instead_of_hanging():
    torch.set_num_threads(2)
    inputs = {name: sample(LONG) for name, (_, sample, _) in CALLS.items()}
    # As bytes: torch's own parallel operators, a comparison for one, hang in a forked child.
    run = lambda name: [x.numpy().tobytes() for x in CALLS[name][0](**inputs[name])]
    expected = {name: run(name) for name in CALLS}  # the parent has used its threads
    child = os.fork()
    if child == 0:
        os._exit(0 if all(run(name) == expected[name] for name in CALLS) else 1)
    deadline = threading.Timer(30, os.kill, (child, 9))
    deadline.start()
    _, status = os.waitpid(child, 0)
    deadline.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@each_op
def test_autocast_does_not_change_the_result(name):
    call, sample, leaf = CALLS[name]
    kwargs = sample((4, 9))
    kwargs[leaf].requires_grad_()
    expected = call(**kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(**kwargs)
        got[0].sum().backward()
    assert same(got, expected) and all(x.dtype is torch.float32 for x in got)
    assert kwargs[leaf].grad is not None


@each_op
def test_mixed_dtypes_are_promoted_to_the_widest(name):
    call, sample, leaf = CALLS[name]
    kwargs = sample((4, 9))
    half = {**kwargs, leaf: kwargs[leaf].bfloat16()}
    assert same(call(**half), call(**{**kwargs, leaf: half[leaf].float()}))
    wide = {**kwargs, leaf: kwargs[leaf].double()}
    assert all(x.dtype is torch.float64 for x in call(**wide))


@each_op
def test_an_integer_mask_counts_as_one(name):
    call, sample, _ = CALLS[name]
    kwargs = sample((4, 9))
    assert same(call(**{**kwargs, "mask": kwargs["mask"].long()}), call(**kwargs))


@each_op
def test_sliced_inputs_with_an_offset(name):
    call, sample, _ = CALLS[name]
    kwargs = sample((4, 9))
    sliced = {}
    for k, v in kwargs.items():
        padded = torch.zeros(*(n + 3 for n in v.shape), dtype=v.dtype)
        window = tuple(slice(2, n + 2) for n in v.shape)
        padded[window] = v
        sliced[k] = padded[window]
    assert same(call(**sliced), call(**kwargs))


@each_op
def test_inputs_are_not_changed_and_outputs_do_not_alias_them(name):
    call, sample, leaf = CALLS[name]
    kwargs = sample((4, 9))
    copies = {k: v.clone() for k, v in kwargs.items()}
    kwargs[leaf].requires_grad_()
    out = call(**kwargs)
    out[0].sum().backward()
    for x in out:
        x.detach().fill_(7.0)
    assert all(torch.equal(kwargs[k].detach(), copies[k]) for k in kwargs)


@pytest.mark.parametrize("name", ["kl_estimate", "whiten", "advantages", "group_advantages"])
def test_changing_a_saved_input_before_the_backward_is_an_error(name):
    call, sample, leaf = CALLS[name]
    kwargs = sample((4, 9))
    source = kwargs[leaf].clone().requires_grad_()
    kwargs[leaf] = source * 1
    out = call(**kwargs)[0].sum()
    kwargs[leaf].data.add_(0)  # not seen by autograd, and harmless
    with torch.no_grad():
        kwargs[leaf].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("name", ["reward_loss", "ppo_loss", "dpo_loss"])
def test_changing_an_input_of_a_loss_before_the_backward_leaves_its_gradient_alone(name):
    call, sample, leaf = CALLS[name]
    grads = []
    for change in (0.0, 5.0):
        kwargs = sample((4, 9))
        source = kwargs[leaf].clone().requires_grad_()
        kwargs[leaf] = source * 1
        out = call(**kwargs)[0]
        with torch.no_grad():
            kwargs[leaf].add_(change)
        out.backward()
        grads.append(source.grad)
    assert torch.equal(*grads)


@each_op
def test_deterministic_from_call_to_call(name):
    call, sample, _ = CALLS[name]
    torch.set_num_threads(2)
    kwargs = sample(LONG)
    first = call(**kwargs)
    assert all(same(call(**kwargs), first) for _ in range(5))


@each_op
def test_fake_tensors_give_shapes(name):
    from torch._subclasses import FakeTensorMode

    call, sample, leaf = CALLS[name]
    kwargs = sample((4, 9))
    expected = call(**kwargs)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) for k, v in kwargs.items()}
        fake[leaf].requires_grad_()
        got = call(**fake)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]


@each_op
def test_the_forced_reference_agrees(name):
    call, sample, _ = CALLS[name]
    kwargs = sample((4, 33))
    with rlhf_fast.use_backend("reference"):
        plain = call(**kwargs)
    for a, b in zip(call(**kwargs), plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
