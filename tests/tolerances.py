"""The one table of numeric tolerances. Bounds are relative to plain PyTorch's own error in the same dtype."""

from __future__ import annotations

import torch

FACTOR = 2.0
"""A kernel may be this many times as far from the fp64 truth as plain PyTorch in the same dtype ..."""

FLOOR = {
    torch.float64: 2.0**-50,
    torch.float32: 2.0**-21,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
"""... plus this share of the largest magnitude of the truth, by the dtype of the result."""

GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}
"""Finite differences of the fp64 kernels."""

ISA = 2.0**-22
"""Two instruction sets may differ by this share of the largest magnitude (their exp and their sums are ordered alike)."""

WORKED = 6e-7
"""Worked values are printed with seven digits."""

WORKED4 = 6e-5
"""Worked values that are printed with four digits."""

K3_RELATIVE = 1e-6
"""k3 and its slope in fp32, relative to the exact value, for log-ratios from 1e-8 to 10."""

DOUBLE = 2.0**-45
"""An fp64 kernel against the fp64 reference, as a share of the largest magnitude among the results: the truth itself has the
rounding errors of a pass over the vocabulary, and KL is a difference of logarithms of its sums."""

ROUNDED = 2.0**-7
"""A product of fp32 operands that are rounded to bf16, as a share of the sum of the magnitudes of its terms: 2^-8 for two operands."""

TEACHER_FORCED = {torch.float32: 1e-5, torch.bfloat16: 0.08, torch.float16: 0.01}
"""Log-probs of a rollout against those of one pass over the finished text, absolute and relative: the same sums in another order, and
in bf16 activations that are rounded at other places (0.05 seen on three layers of width 32)."""

ANOTHER_ENGINE = 1e-4
"""Log-probs in nats of an engine beside the trainer in fp32 against those of training: every sum in another order, and the folds an
adapter there and weights here (1e-5 seen on two layers of width 128)."""

ANOTHER_DEVICE = 1e-4
"""Metrics, parameters and moments after two steps of training in fp32 by other kernels, absolute and relative (2e-5 seen on three
layers of width 32)."""

SPLIT = 1e-12
"""Losses and gradients of the parts of an fp64 batch against those of the whole, as a share of the largest magnitude."""


def product(k: int) -> float:
    """A sum of k products in fp32, as a share of the sum of their magnitudes: its roundings of 2^-24 add up like a random walk."""
    return 2.0**-24 * (4 + k**0.5)
