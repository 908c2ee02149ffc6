"""Every Triton cell as compiled code: executed on the CPU against the fp64 reference, with no finding, and its traffic counted."""

from __future__ import annotations

import pytest
import torch
from gpu.tools.cases import Case, cases_of, triton_ops
from gpu.tools.driver import install
from gpu.tools.on_cpu import on_cpu
from gpu.tools.ptx_memory import traffic

import rlhf_fast
from rlhf_fast.reference import (
    advantages,
    cached_attention,
    dpo_loss,
    lora_linear,
    ppo_loss,
    sample_tokens,
    token_logprobs,
)

ARCHS = [80, 90, 100]
CASES = cases_of(*triton_ops())
expected: dict[str, tuple] = {}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_parity(arch, case):
    inputs = case.inputs()
    with install(arch) as driver:
        got = case.kernels(inputs)
    assert driver.launches
    for launch in driver.launches:
        assert launch.findings == [], f"{launch.kernel}: {launch.findings}"
    if str(case) not in expected:
        expected[str(case)] = case.expected(inputs)
    case.check(got, expected[str(case)])


@pytest.mark.parametrize("op", triton_ops())
def test_no_launch_for_empty_input(op):
    case = next(c for c in CASES if c.op == op)
    whole = ("weight", "bias", "ref_weight", "lora_a", "lora_b")
    empty = {k: v if k in whole else v[:0] for k, v in case.inputs().items()}
    with install(90) as driver, on_cpu("triton"):
        found = Case(op, "empty", lambda: empty, case.leaves, case.options).results(empty)
    assert driver.launches == []
    assert all(not x.isnan().any() for x in found.values())


@pytest.mark.parametrize("op", ["token_logprobs", "sample_tokens", "cached_attention"])
def test_rows_may_lie_further_apart_than_32_bits_count(op):
    step, vocab = 2**30 + 8, 515

    def inputs():
        if op == "cached_attention":
            found = cached_attention.sample(3, 2, 1, 16, dtype=torch.bfloat16)
            far = torch.empty(2 * step + 32, dtype=torch.bfloat16).as_strided((3, 2, 16), (step, 16, 1))
            return {**found, "query": far.copy_(found["query"])}
        small = {"token_logprobs": token_logprobs.sample, "sample_tokens": sample_tokens.sample}[op]
        found = small((3,), vocab, dtype=torch.bfloat16)
        # 4 GiB of address space, of which three rows are touched.
        far = torch.empty(2 * step + vocab, dtype=torch.bfloat16).as_strided((3, vocab), (step, 1))
        logits = far.copy_(found["logits"])
        if op == "sample_tokens":
            return {"logits": logits, "uniform": found["uniform"]}
        return {"logits": logits, "token_ids": found["token_ids"].clamp_min(0)}

    case = Case(op, "far", inputs, ("logits",) if op == "token_logprobs" else ())
    held = inputs()
    with install(90) as driver:
        got = case.kernels(held)
    assert [launch.findings for launch in driver.launches] == [[], []]
    case.check(got, case.expected(held))


def test_factors_may_lie_further_apart_than_32_bits_count():
    step = 2**29
    kwargs = lora_linear.sample(40, 24, 20, (4, 3), dtype=torch.bfloat16)
    expected = rlhf_fast.lora_linear(**kwargs)
    far = torch.empty(6 * step + 24).as_strided(
        (7, 24), (step, 1)
    )  # 12 GiB of address space, of which seven rows are touched
    kwargs["lora_a"] = far.copy_(kwargs["lora_a"])
    with install(90) as driver, on_cpu("triton"):
        got = rlhf_fast.lora_linear(**kwargs)
    assert [launch.findings for launch in driver.launches] == [[], []]
    torch.testing.assert_close(got, expected)


# ---- traffic


def measured(driver, call):
    before = len(driver.launches)
    out = call()
    return out, driver.launches[before:]


def size(*tensors):
    return sum(x.nbytes for x in tensors if x is not None)


@pytest.mark.parametrize("vocab", [8192, 8195], ids=["aligned", "odd"])
@pytest.mark.parametrize("ref", [False, True], ids=["", "reference"])
def test_token_logprobs_reads_the_logits_once_and_writes_the_gradient_once(vocab, ref):
    inputs = token_logprobs.sample((8,), vocab, dtype=torch.bfloat16, ref=ref)
    del inputs["mask"]
    inputs["token_ids"] = inputs["token_ids"].clamp_min(0)
    logits = inputs["logits"].requires_grad_()
    with install(90) as driver, on_cpu("triton"):
        out, forward = measured(driver, lambda: rlhf_fast.token_logprobs(**inputs))
        total = sum(x.sum() for x in out if x is not None)
        grad, backward = measured(driver, lambda: torch.autograd.grad(total, logits)[0])
    minimum = size(*inputs.values(), *out)
    assert len(forward) == 1
    assert 1.0 <= traffic(forward) / minimum <= 1.02
    minimum = size(*inputs.values(), grad)
    assert len(backward) == 1
    assert 1.0 <= traffic(backward) / minimum <= 1.02
    # A second pass over the logits that stays in the caches would be no traffic, but twice the bytes asked for.
    assert sum(r.load_bytes for r in forward) <= 1.25 * size(*inputs.values())


@pytest.mark.parametrize("vocab", [8192, 151_936], ids=str)
def test_sample_tokens_reads_the_logits_once(vocab):
    inputs = sample_tokens.sample((2,), vocab, dtype=torch.bfloat16)
    with install(90) as driver, on_cpu("triton"):
        out, launches = measured(driver, lambda: rlhf_fast.sample_tokens(**inputs))
    assert len(launches) == 2
    sums = 2 * 2 * 12 * -(-vocab // 4096)  # of two rows, written and read
    part = 2 * 2 * 4096  # of each row, read again
    assert traffic(launches[:1]) == pytest.approx(inputs["logits"].nbytes + sums / 2, rel=0.01)
    assert traffic(launches[1:]) <= size(inputs["uniform"], *out) + sums / 2 + part + 256


def test_advantages_move_little_more_than_they_must_in_two_launches():
    inputs = advantages.sample((16, 512), gaps=False)
    inputs["mask"][:] = True
    with install(90) as driver, on_cpu("triton"):
        out, launches = measured(driver, lambda: rlhf_fast.advantages(**inputs, kl_coef=0.1))
    assert len(launches) <= 2
    assert 1.0 <= traffic(launches) / size(*inputs.values(), *out) <= 1.1


def test_ppo_loss_and_its_gradients_are_one_launch():
    inputs = ppo_loss.sample((16, 512))
    inputs["mask"][:] = True
    leaves = [inputs[k].requires_grad_() for k in ("logprobs", "entropy", "values")]
    with install(90) as driver, on_cpu("triton"):
        out, launches = measured(driver, lambda: rlhf_fast.ppo_loss(**inputs, entropy_coef=0.1, kl_coef=0.1))
        grads, backward = measured(driver, lambda: torch.autograd.grad(out.loss, leaves))
    assert len(launches) == 1 and backward == []
    assert 1.0 <= traffic(launches) / size(*inputs.values(), *grads) <= 1.1


def test_dpo_loss_and_its_gradients_are_one_launch():
    inputs = dpo_loss.sample((8, 1500))
    for mask in ("mask", "chosen_mask", "rejected_mask"):
        inputs[mask][:] = True
    leaves = [inputs[k].requires_grad_() for k in ("chosen_logprobs", "rejected_logprobs")]
    with install(90) as driver, on_cpu("triton"):
        out, launches = measured(driver, lambda: rlhf_fast.dpo_loss(**inputs))
        grads, backward = measured(driver, lambda: torch.autograd.grad(out.loss, leaves))
    assert len(launches) == 1 and backward == []
    assert 1.0 <= traffic(launches) / size(*inputs.values(), *out, *grads) <= 1.02
    # The masks twice, and the numbers of a pair by every thread.
    assert sum(r.load_bytes for r in launches) <= 1.2 * size(*inputs.values())
