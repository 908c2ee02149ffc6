"""The product under the heads, against fp64: formats, layouts, odd sizes, threads."""

from __future__ import annotations

import itertools

import pytest
import tolerances
import torch

from rlhf_fast.ops import _matmul
from rlhf_fast.ops._matmul import matmul, pitch

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
# Around the tiles of every instruction set (2 to 14 rows, 16 or 32 columns), the parts of 384 lines, and the blocks of
# 768 units of k; both operands take the part of the smaller one.
SIZES = [
    (1, 1, 1),
    (3, 17, 5),
    (14, 32, 16),
    (15, 33, 31),
    (29, 500, 577),
    (400, 40, 64),
    (5, 3, 1700),
    (900, 7, 33),
    (2, 2, 0),
]


def operand(rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    x = torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)
    return x.to(dtype)


def assert_product(a, b, narrow=False, bias=None, rounded=False):
    """Against fp64; `rounded`: an fp32 operand may have been rounded to bf16."""
    truth, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    out = torch.full((a.shape[0], pitch(b.shape[1])), 7.0)
    c = out[:, : b.shape[1]]
    matmul(a, b, c, bias=bias, narrow=narrow)
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    share = tolerances.ROUNDED if rounded else tolerances.product(a.shape[1])
    assert ((c.double() - truth).abs() <= share * size).all()
    once = c.clone()
    matmul(a, b, c, add=True, narrow=narrow)
    second = truth if bias is None else truth - bias.double()
    assert ((c.double() - once.double() - second).abs() <= 4 * share * size).all()
    assert (out[:, b.shape[1] :] == 7.0).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(size, each_isa):
    m, n, k = size
    for da, db, ta, tb in itertools.product(FORMATS, FORMATS, (False, True), (False, True)):
        a, b, bias = operand(m, k, da, ta), operand(k, n, db, tb), torch.randn(n)
        each_isa(lambda a=a, b=b, bias=bias: assert_product(a, b, bias=bias))
        if torch.float16 not in (da, db):
            rounded = torch.float32 in (da, db)
            each_isa(lambda a=a, b=b, r=rounded: assert_product(a, b, narrow=True, rounded=r))


def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(each_isa):
    a, b = torch.randn(61, 700), torch.randn(700, 129)

    def product(x, threads, dtype):
        torch.set_num_threads(threads)
        out = torch.empty(len(x), 129)
        matmul(x.to(dtype), b.to(dtype), out, narrow=dtype is torch.bfloat16)
        return out

    def check():
        if not _matmul.native(torch.float32):
            return  # PyTorch's product promises nothing
        for dtype in (torch.float32, torch.bfloat16):
            whole = product(a, 2, dtype)
            for rows in (slice(0, 1), slice(7, 30), slice(60, 61)):
                assert torch.equal(product(a[rows], 1, dtype), whole[rows])
            assert torch.equal(product(a, 5, dtype), whole)

    each_isa(check)


@pytest.mark.parametrize("rank", [0, 1, 16, 64, 65, 100])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_product_of_low_rank_is_added_and_its_zeros_change_no_bit(size, rank, each_isa):
    """Up to 64 ranks in the sums of the first product, whose blocks of k they leave as they are; more in a pass of their own."""
    m, n, k = size
    bias = torch.randn(n)
    a, low = operand(m, k, torch.float32, False), torch.randn(m, rank + 3)[:, :rank]
    truth = lambda b, low_b: a.double() @ b.double() + low.double() @ low_b.double() + bias.double()
    size_of = lambda b, low_b: (
        a.double().abs() @ b.double().abs() + low.double().abs() @ low_b.double().abs() + bias.double().abs()
    )

    def check(b, low_b):
        if not _matmul.native(torch.float32):
            return  # callers ask
        out = torch.full((m, pitch(n)), 7.0)
        matmul(a, b, out[:, :n], bias=bias, low_rank=(low, low_b))
        error = (out[:, :n].double() - truth(b, low_b)).abs()
        assert (error <= tolerances.product(k + rank) * size_of(b, low_b)).all()
        assert (out[:, n:] == 7.0).all()
        alone, zero = torch.empty(m, n), torch.empty(m, n)
        matmul(a, b, alone, bias=bias)
        matmul(a, b, zero, bias=bias, low_rank=(low, torch.zeros_like(low_b)))
        assert torch.equal(zero, alone)

    for transposed in (False, True):
        b, low_b = operand(k, n, torch.float32, transposed), operand(rank, n, torch.float32, not transposed)
        each_isa(lambda b=b, low_b=low_b: check(b, low_b))


def test_products_of_bf16_are_not_rounded_to_bf16(each_isa):
    """Small integers: any rounding of a product or of a sum would show."""
    a, b = torch.randint(-8, 9, (33, 200)).bfloat16(), torch.randint(-8, 9, (200, 50)).bfloat16()

    def check(narrow):
        out = torch.full((33, 50), 7.0)
        matmul(a, b, out, narrow=narrow)
        assert torch.equal(out.double(), a.double() @ b.double())

    for narrow in (False, True):
        each_isa(lambda narrow=narrow: check(narrow))


def test_operands_without_a_dense_dimension_and_repeated_rows():
    a, b = torch.randn(20, 30)[:, ::2], torch.randn(30, 40)[::2, ::2]
    assert_product(a, b)
    assert_product(torch.randn(1, 15).expand(20, 15), b)
    assert_product(torch.randn(6, 1), torch.randn(1, 6).t().contiguous().t())


def test_fp64_and_processors_without_wide_vectors_use_torch(each_isa):
    a, b = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, 7)
    out = torch.empty(5, 7, dtype=torch.float64)
    matmul(a, b, out, bias=torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(out, a @ b.double() + 1, rtol=1e-14, atol=1e-14)
    used = dict(each_isa(lambda: _matmul.native(torch.float32)))
    assert not used["scalar"] and all(native for isa, native in used.items() if isa != "scalar")
