"""Generalised advantage estimation as one reverse scan."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast._native import kernel
from rlhf_fast._op import Op, cpp, cuda, no_doubles, reference_backward, triton
from rlhf_fast._scan import Steps
from rlhf_fast.reference.gae import gae as reference

GAPS = ("carry", "decay", "read")


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gap: str = "carry",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of token-level rewards (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns_t = A_t + V_t. Not whitened.

    Args:
        rewards: (..., T) reward per token; (N,) packed when cu_seqlens is given.
        values: like rewards; value of the state before the token.
        mask: like rewards, True = real token; None = all real. Masked slots give 0 and are never read, but for their values with
            gap "read".
        gamma: discount in [0, 1].
        lam: trace decay in [0, 1]; or a tensor (...) ((S,) when packed), one constant per row (VAPO, Yue et al. 2025, arXiv
            2504.05118, with `length_adaptive_lambda`). On a CPU one pass per distinct number; elsewhere, and in a compiled graph,
            where the host would have to wait for them, one scan of plain PyTorch, and a number outside of [0, 1] gives NaN.
        bootstrap: (...) value of the state after the last real token of each row ((S,) when packed); None = 0.
        cu_seqlens: (S+1,) boundaries of S packed sequences, from 0 to N.
        gap: masked slots between real tokens (tool output, observations) are skipped ("carry"), or are a step with zero
            reward and zero value ("decay", OpenRLHF's rule). "read" is ROLL's lack of a mask: every masked slot of a row, padding
            too, is a step with zero reward and the value that stands there, and the bootstrap value follows the last slot.

    Returns:
        (advantages, returns), each like rewards, fp32 (fp64 when an input is fp64); differentiable towards rewards,
        values and bootstrap.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    if type(rewards) is not Tensor or rewards.dtype not in _check.FLOATS:
        _check.floating("gae", "rewards", rewards)
    ready = _check.alike("gae", rewards, "rewards", {"values": values})
    mask = _check.mask_like("gae", mask, rewards, "rewards")
    gamma = _check.number("gae", "gamma", gamma, 0.0, 1.0)
    if not isinstance(lam, Tensor):
        lam = _check.number("gae", "lam", lam, 0.0, 1.0)
    _check.choice("gae", "gap", gap, GAPS)
    shape = rewards.shape
    if cu_seqlens is not None:
        if rewards.dim() != 1:
            raise _check.error(ValueError, "gae", "rewards", f"shape {tuple(shape)}", "(N,) with cu_seqlens")
        cu_seqlens = _check.cu_seqlens("gae", cu_seqlens, shape[0], rewards)
        rows: tuple[int, ...] = (cu_seqlens.shape[0] - 1,)
    else:
        if rewards.dim() == 0:
            raise _check.error(ValueError, "gae", "rewards", "a scalar", "(..., T)")
        rows = tuple(shape[:-1])
        if rewards.dim() != 2:
            rewards, values = rewards.reshape(-1, shape[-1]), values.reshape(-1, shape[-1])
            mask = None if mask is None else mask.reshape(-1, shape[-1])
    if bootstrap is not None:
        _check.floating("gae", "bootstrap", bootstrap)
        _check.shape("gae", "bootstrap", bootstrap, rows, "one value per sequence")
        _check.device("gae", "bootstrap", bootstrap, rewards, "rewards")
        bootstrap = bootstrap.reshape(-1)
    if not ready or bootstrap is not None:
        rewards, values, bootstrap = _check.common_wide(rewards, values, bootstrap)  # type: ignore[assignment]
    shown = mask
    if gap == "read" and mask is not None:
        rewards, mask = rewards.where(mask, 0.0), None
    if isinstance(lam, Tensor):
        lam = _each(lam, rows, rewards)
        by_lam = _by_lam if lam.is_cpu and not torch.compiler.is_compiling() else _by_scan
        advantages, returns = by_lam(lam, rewards, values, mask, bootstrap, cu_seqlens, gamma, gap == "decay")
    else:
        advantages, returns = _gae(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, gap == "decay")
    if shown is not mask and shown is not None:
        advantages, returns = advantages.where(shown, 0.0), returns.where(shown, 0.0)
    if advantages.shape != shape:
        return advantages.view(shape), returns.view(shape)
    return advantages, returns


def _each(lam: Tensor, rows: tuple[int, ...], rewards: Tensor) -> Tensor:
    _check.floating("gae", "lam", lam)
    _check.shape("gae", "lam", lam, rows, "one number per sequence")
    _check.device("gae", "lam", lam, rewards, "rewards")
    return lam.detach().reshape(-1)


def _by_scan(lam, rewards, values, mask, bootstrap, cu_seqlens, gamma, decay_gaps):  # type: ignore[no-untyped-def]
    """Without reading a number."""
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    steps = Steps.of(mask, cu_seqlens, gaps=decay_gaps)
    delta = rewards + gamma * steps.next(values, bootstrap) - values
    lam = lam.where((lam >= 0) & (lam <= 1), torch.nan).to(rewards.dtype)
    advantages = steps.accumulate(gamma * steps.each(lam), delta).where(mask, 0.0)
    return advantages, (advantages + values).where(mask, 0.0)


def _by_lam(lam, rewards, values, mask, bootstrap, cu_seqlens, gamma, decay_gaps):  # type: ignore[no-untyped-def]
    """The rows of each number in a call of their own, which gives them the bits of a call with that number."""
    numbers = lam.tolist()
    for number in numbers:
        _check.number("gae", "lam", number, 0.0, 1.0)
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    rows = torch.tensor(order, dtype=torch.int64, device=rewards.device)
    place, ends, bounds = rows, list(range(len(order) + 1)), None
    if cu_seqlens is not None:
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1])[rows]
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        moved = (cu_seqlens[:-1][rows] - bounds[:-1]).repeat_interleave(lengths, output_size=rewards.shape[0])
        place, ends = torch.arange(rewards.shape[0], device=rewards.device) + moved, bounds.tolist()
    sorted_ = [None if x is None else x[place] for x in (rewards, values, mask)]
    start = None if bootstrap is None else bootstrap[rows]
    parts, i = [], 0
    for number, run in groupby(numbers[row] for row in order):
        j = i + sum(1 for _ in run)
        picked = [None if x is None else x[ends[i] : ends[j]] for x in sorted_]
        inner = None if bounds is None else bounds[i : j + 1] - ends[i]
        parts.append(_gae(*picked, None if start is None else start[i:j], inner, gamma, number, decay_gaps))
        i = j
    if not parts:
        return _gae(rewards, values, mask, bootstrap, cu_seqlens, gamma, 0.0, decay_gaps)
    back = place.argsort()
    return tuple(torch.cat(pieces)[back] for pieces in zip(*parts, strict=True))


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(rows, length) of padded (B, T) input, (sequences, 0) of packed input."""
    return (x.shape[0], x.shape[1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)


def _forward(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, decay_gaps):  # type: ignore[no-untyped-def]
    advantages, returns = _buffers.empty_like(rewards), _buffers.empty_like(rewards)
    kernel("gae")(
        rewards,
        values,
        mask,
        bootstrap,
        cu_seqlens,
        advantages,
        returns,
        *_rows(rewards, cu_seqlens),
        gamma,
        lam,
        decay_gaps,
        rewards.dtype is torch.float64,
        torch.get_num_threads(),
    )
    return advantages, returns


def _backward_cpp(grad_advantages, grad_returns, mask, cu_seqlens, gamma, lam, decay_gaps):  # type: ignore[no-untyped-def]
    grad_advantages, grad_returns = grad_advantages.contiguous(), grad_returns.contiguous()
    grad_rewards, grad_values = _buffers.empty_like(grad_advantages), _buffers.empty_like(grad_advantages)
    rows, length = _rows(grad_advantages, cu_seqlens)
    grad_bootstrap = grad_advantages.new_empty(rows)
    kernel("gae_backward")(
        grad_advantages,
        grad_returns,
        mask,
        cu_seqlens,
        grad_rewards,
        grad_values,
        grad_bootstrap,
        rows,
        length,
        gamma,
        lam,
        decay_gaps,
        grad_advantages.dtype is torch.float64,
        torch.get_num_threads(),
    )
    return grad_rewards, grad_values, grad_bootstrap


def _backward_reference(grad_advantages, grad_returns, mask, cu_seqlens, gamma, lam, decay_gaps):  # type: ignore[no-untyped-def]
    zeros = torch.zeros_like(grad_advantages)  # linear: the gradient is the same at every point
    rows = grad_advantages.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inputs = (zeros, zeros, mask, zeros.new_zeros(rows), cu_seqlens, gamma, lam, decay_gaps)
    return reference_backward(reference, inputs, (0, 1, 3), (grad_advantages, grad_returns))


def _fake_backward(grad_advantages, grad_returns, mask, cu_seqlens, gamma, lam, decay_gaps):  # type: ignore[no-untyped-def]
    rows = grad_advantages.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(grad_advantages, memory_format=contiguous),
        torch.empty_like(grad_advantages, memory_format=contiguous),
        grad_advantages.new_empty(rows),
    )


_gae_backward = Op(
    "gae_backward",
    "(Tensor grad_advantages, Tensor grad_returns, Tensor? mask, Tensor? cu_seqlens, float gamma, float lam, "
    "bool decay_gaps) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake_backward,
    backends=[cuda("gae", "backward", no_doubles), triton("gae", "backward", no_doubles), cpp(_backward_cpp)],
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, mask, bootstrap, cu_seqlens, *rest = inputs
    ctx.save_for_backward(mask, cu_seqlens)
    ctx.rest = rest
    ctx.bootstrap = bootstrap is not None


def _backward(ctx, grad_advantages, grad_returns):  # type: ignore[no-untyped-def]
    mask, cu_seqlens = ctx.saved_tensors
    rewards, values, bootstrap = _gae_backward(grad_advantages, grad_returns, mask, cu_seqlens, *ctx.rest)
    return rewards, values, None, bootstrap if ctx.bootstrap else None, None, None, None, None


_gae = Op(
    "gae",
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor? bootstrap, Tensor? cu_seqlens, float gamma, float lam, "
    "bool decay_gaps) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda rewards, *_: (
        torch.empty_like(rewards, memory_format=torch.contiguous_format),
        torch.empty_like(rewards, memory_format=torch.contiguous_format),
    ),
    backends=[cuda("gae", "forward", no_doubles), triton("gae", "forward", no_doubles), cpp(_forward)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1, 3),
)
