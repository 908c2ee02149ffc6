"""No kernel reads what the mask hides: not to throw it away afterwards either, since it may be another's memory."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from gpu.tools.cases import CASES
from gpu.tools.sanitizer import Sanitizer

MASKED = [c for c in CASES if "mask" in c.inputs() and "large" not in c.name and "long" not in c.name]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_what_the_mask_hides_is_never_read(case):
    inputs = case.inputs()
    with Sanitizer(order="shuffle", seed=1) as s:
        for x, where in case.masked(inputs):
            s.hide(x, where)
        case.kernels(inputs)
    s.check()


@triton.jit
def _sum(x, mask, out, N: tl.constexpr, CAREFUL: tl.constexpr):
    i = tl.arange(0, N)
    real = tl.load(mask + i) != 0
    value = tl.load(x + i, mask=real, other=0.0) if CAREFUL else tl.load(x + i)
    tl.store(out, tl.sum(tl.where(real, value, 0.0), 0))


@pytest.mark.parametrize("careful", [True, False])
def test_a_hidden_element_that_is_read_and_thrown_away_is_found(careful):
    x, mask, out = torch.randn(8), torch.arange(8) < 5, torch.zeros(1)
    with Sanitizer() as s:
        s.hide(x, ~mask)
        _sum[(1,)](x, mask.view(torch.uint8), out, 8, careful)
    assert s.kinds() == ([] if careful else ["uninit-read"])
    torch.testing.assert_close(out[0], x[:5].sum())
