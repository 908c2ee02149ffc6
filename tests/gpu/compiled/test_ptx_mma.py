"""The PTX machine multiplies as tensor cores do."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu.tools.driver import install


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    product = tl.dot(tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :]))
    tl.store(out_ptr + m[:, None] * N + n[None, :], product)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_tensor_cores(arch, dtype):
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype)
    out = torch.empty(32, 32)
    with install(arch) as driver:
        product_kernel[(1,)](a, b, out, 32, 32, 64)
    (launch,) = driver.launches
    assert launch.findings == [] and launch.by_op["mma"] == 2 * 4 * 4  # of 16 x 8, by 16 at a time
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
