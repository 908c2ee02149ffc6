"""gae against the loops that trainers run step by step, a scan made of matrix products, and a compiled library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases.common import no_grad, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.bench.machine import Machine
from rlhf_fast.reference.gae import gae as reference

GAMMA, LAM = 0.99, 0.95
BYTES = 17
"""Per token: rewards, values and a mask in, advantages and returns out."""


def make(rows: int, length: int) -> dict[str, Any]:
    """Ragged rows without gaps: what every peer can do."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=g)
    if rows == 1:
        lengths[0] = length
    return {
        "rewards": torch.randn(rows, length, generator=g),
        "values": torch.randn(rows, length, generator=g),
        "mask": torch.arange(length)[None] < lengths[:, None],
    }


def ours(x: dict[str, Any]) -> Results:
    return rlhf_fast.gae(x["rewards"], x["values"], x["mask"], gamma=GAMMA, lam=LAM)


def loop(x: dict[str, Any]) -> Results:
    """The reference: one step of tensor operations per token."""
    return reference(x["rewards"], x["values"], x["mask"], None, None, GAMMA, LAM, False)


def of_verl(algos: Any) -> Call:
    """Its advantages come whitened, so only the returns are compared; the mask of its results is the caller's."""

    def run(x: dict[str, Any]) -> Results:
        _, returns = algos.compute_gae_advantage_return(x["rewards"], x["values"], x["float_mask"], GAMMA, LAM)
        return None, returns * x["float_mask"]

    return lambda x: run(x | {"float_mask": x["mask"].float()})


def chunked(x: dict[str, Any], size: int = 128) -> Results:
    """Scan by triangular matrix products over chunks, as slime does (formulated anew)."""
    mask = x["mask"]
    rewards, values = x["rewards"] * mask, x["values"] * mask
    rows, length = rewards.shape
    following = torch.cat([values[:, 1:], values.new_zeros(rows, 1)], 1)
    delta = rewards + GAMMA * following - values
    pad = -length % size
    delta = torch.nn.functional.pad(delta, (0, pad)).view(rows, -1, size)
    steps = torch.arange(size, device=delta.device)
    gap = steps[:, None] - steps[None]  # from the earlier column to the later row
    decay = torch.where(gap >= 0, (GAMMA * LAM) ** gap.clamp(min=0), 0.0)
    local = delta @ decay  # (rows, chunks, size): sums of the later deltas of the chunk
    carry_weight = (GAMMA * LAM) ** (size - steps).float()
    out, carry = torch.empty_like(local), delta.new_zeros(rows)
    for c in range(local.shape[1] - 1, -1, -1):
        out[:, c] = local[:, c] + carry[:, None] * carry_weight
        carry = out[:, c, 0]
    advantages = out.view(rows, -1)[:, :length] * mask
    return advantages, advantages + values


def of_rlox(module: Any) -> Call:
    """One flat array of rows; an episode ends where a row does."""

    def run(x: dict[str, Any]) -> Results:
        rows, length = x["rewards"].shape
        mask: Tensor = x["mask"]
        rewards, values = (x[k].where(mask, 0.0).reshape(-1).numpy() for k in ("rewards", "values"))
        dones = np.zeros(rows * length, np.float32)
        last = np.zeros(rows, np.float32)
        advantages, returns = module.compute_gae_batched_f32(rewards, values, dones, last, length, GAMMA, LAM)
        return tuple(torch.from_numpy(np.asarray(a)).view(rows, length) * mask for a in (advantages, returns))

    return run


def truth(x: dict[str, Any]) -> Results:
    return loop({k: v.double() if v.is_floating_point() else v for k, v in x.items()})


def cases() -> Iterator[Case]:
    for rows, length in ((64, 1024), (256, 8192), (1, 32768)):

        def limit(m: Machine, tokens: int = rows * length) -> float:
            return m.seconds(read=9 * tokens, written=8 * tokens)

        found: dict[str, Call | str] = {
            OURS: ours,
            "eager loop": no_grad(loop),
            "chunked scan": no_grad(chunked),
            "verl": peer(peers.verl, of_verl),
            "rlox": peer(peers.rlox, of_rlox),
        }
        bars = {"rlox": 1.0} if rows == 1 else {"verl": 100.0, "chunked scan": 20.0}
        name = f"[{rows}, {length}] fp32"
        yield Case("gae", name, partial(make, rows, length), found, truth, limit, bars, memory=False)
