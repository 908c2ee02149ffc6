"""The access checker's arithmetic is that of the compiled kernel."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu.tools.sanitizer import Sanitizer


def test_bf16_arithmetic_comparisons_and_casts_are_exact():
    @triton.jit
    def arithmetic_kernel(a_ptr, b_ptr, out_ptr, less_ptr):
        i = tl.arange(0, 64)
        a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
        tl.store(out_ptr + i, a * b + a)
        tl.store(less_ptr + i, a < b)

    @triton.jit
    def cast_kernel(x_ptr, out_ptr):
        i = tl.arange(0, 4096)
        tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))

    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    x = torch.cat([torch.randn(4090), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, torch.nan])])
    with Sanitizer() as s:
        out, less = torch.empty(64).bfloat16(), torch.empty(64, dtype=torch.bool)
        arithmetic_kernel[(1,)](a, b, out, less)
        rounded, half = torch.empty(4096).bfloat16(), torch.empty(4096).half()
        cast_kernel[(1,)](x, rounded)
        cast_kernel[(1,)](rounded, half)
    s.check()
    assert torch.equal(out, a * b + a) and torch.equal(less, a < b)
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(half, x.bfloat16().half(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def test_dot_is_exact_in_bf16_and_rounds_fp32_to_tf32():
    a, b = torch.randn(16, 16), torch.randn(16, 16)
    with Sanitizer() as s:
        narrow, tf32 = torch.empty(16, 16), torch.empty(16, 16)
        dot_kernel[(1,)](a.bfloat16(), b.bfloat16(), narrow)
        dot_kernel[(1,)](a, b, tf32)
    s.check()
    with Sanitizer(tf32=False):
        full = torch.empty(16, 16)
        dot_kernel[(1,)](a, b, full)
    assert (narrow - a.bfloat16().float() @ b.bfloat16().float()).abs().max() < 1e-5
    assert 1e-5 < (tf32 - a @ b).abs().max() < 2e-2 and (full - a @ b).abs().max() < 1e-5


@pytest.mark.parametrize("upcast", [True, False])
def test_bf16_reductions_are_reported(upcast):
    @triton.jit
    def sum_kernel(x_ptr, out_ptr, UPCAST: tl.constexpr):
        x = tl.load(x_ptr + tl.arange(0, 64))
        if UPCAST:
            x = x.to(tl.float32)
        tl.store(out_ptr, tl.sum(x, 0))

    x, out = torch.randn(64).bfloat16(), torch.zeros(1)
    with Sanitizer() as s:
        sum_kernel[(1,)](x, out, UPCAST=upcast)
    assert s.kinds() == ([] if upcast else ["bf16-reduce"])
    assert (out - x.float().sum()).abs() < (1e-5 if upcast else 0.1)


@triton.jit
def affine(c1, d1, c2, d2):
    return c1 * c2, d2 + c2 * d1


@triton.jit
def scan_kernel(c_ptr, d_ptr, out_ptr, T, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    rows, i = tl.arange(0, 2)[:, None], tl.arange(0, BLOCK)[None]
    on = i < T
    c = tl.load(c_ptr + rows * T + i, mask=on, other=1.0)
    d = tl.load(d_ptr + rows * T + i, mask=on, other=0.0)
    _, y = tl.associative_scan((c, d), 1, affine, reverse=REVERSE)
    tl.store(out_ptr + rows * T + i, y, mask=on)


@pytest.mark.parametrize("T", [1, 5, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_of_pairs_that_do_not_commute(T, reverse):
    c, d = torch.rand(2, T), torch.randn(2, T)
    with Sanitizer() as s:
        out = torch.empty(2, T)
        scan_kernel[(1,)](c, d, out, T, BLOCK=triton.next_power_of_2(T), REVERSE=reverse)
    s.check()
    state, expected = torch.zeros(2, dtype=torch.float64), torch.zeros(2, T, dtype=torch.float64)
    for t in reversed(range(T)) if reverse else range(T):
        state = d[:, t] + c[:, t] * state
        expected[:, t] = state
    assert (out - expected).abs().max() < 1e-5


def test_a_reduction_of_pairs_that_do_not_commute():
    @triton.jit
    def last_kernel(c_ptr, d_ptr, out_ptr):
        i = tl.arange(0, 32)
        c, d = tl.reduce((tl.load(c_ptr + i), tl.load(d_ptr + i)), 0, affine)
        tl.store(out_ptr, c)
        tl.store(out_ptr + 1, d)

    c, d, out = torch.rand(32), torch.randn(32), torch.empty(2)
    with Sanitizer() as s:
        last_kernel[(1,)](c, d, out)
    s.check()
    state = 0.0
    for t in range(32):
        state = d[t].item() + c[t].item() * state
    assert abs(out[1].item() - state) < 1e-5 and abs(out[0].item() - c.double().prod().item()) < 1e-6
