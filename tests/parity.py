"""One comparator for every cell of the grid: error against the fp64 truth, relative to plain PyTorch's."""

from __future__ import annotations

import tolerances
import torch
from torch import Tensor


def assert_parity(
    got: Tensor, truth: Tensor, plain: Tensor | None = None, what: str = "result", scale: float | None = None
) -> None:
    """`got` is at most FACTOR times as far from `truth` (fp64) as `plain` (PyTorch, same dtype as got), plus the floor.

    scale: what the floor is a share of, when the result is a difference of larger numbers. Non-finite values must agree in place and kind,
    integers everywhere.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if not got.is_floating_point():
        assert torch.equal(got, truth), f"{what}: {got[got != truth][:4]}, expected {truth[got != truth][:4]}"
        return
    finite = truth.isfinite()
    same = torch.equal(got.isfinite(), finite) and torch.equal(
        got.double()[~finite].nan_to_num(7.0), truth.double()[~finite].nan_to_num(7.0)
    )
    assert same, f"{what}: non-finite values differ: got {got[~finite][:4]}, expected {truth[~finite][:4]}"
    if not finite.any():
        return
    error = (got.double() - truth.double())[finite].abs().max().item()
    own = 0.0 if plain is None else (plain.double() - truth.double())[finite].abs().max().item()
    scale = truth.double()[finite].abs().max().item() if scale is None else scale
    bound = tolerances.FACTOR * own + tolerances.FLOOR[got.dtype] * max(scale, 1e-30)
    assert error <= bound, f"{what}: error {error:.3g} against fp64, bound {bound:.3g} (plain PyTorch {own:.3g})"


def double(kwargs: dict) -> dict:
    """The same inputs with every floating tensor in fp64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
