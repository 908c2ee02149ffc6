"""Random numbers by counter: the stream of a sequence needs no state and knows of no other sequence."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3): four words of 32 bits, in int64.

    counter: four, key: two tensors of words of 32 bits in int64, which broadcast.
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        (low_a, high_a), (low_c, high_c) = _product(_MULTIPLIERS[0], a), _product(_MULTIPLIERS[1], c)
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return a, b, c, d


def counter_uniform(seeds: Tensor, count: int) -> Tensor:
    """(B, count) fp64 in [0, 1) of 53 random bits: row i is the stream of seeds[i] (B,) int64; entry t depends on it and t alone."""
    key = (seeds & _LOW)[:, None], ((seeds >> 32) & _LOW)[:, None]
    t = torch.arange(count, dtype=torch.int64)[None]
    zero = torch.zeros_like(t)
    a, b, _, _ = philox((t & _LOW, t >> 32, zero, zero), key)
    return ((a >> 5 << 26) | (b >> 6)).to(torch.float64) * 2.0**-53


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) words of the 64 bits of factor * x; int64 wraps around, which leaves the bits."""
    product = x * factor
    return product & _LOW, (product >> 32) & _LOW
