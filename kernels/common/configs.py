"""Launch sizes of the kernels, checked in: nothing is tuned at run time.

A row is chosen by op, architecture, dtype and vocabulary, never by the number of rows: the order of a sum follows from it, and
a row of logits must have the same bits in any batch. The sizes come from the audit of the machine code (no spills, 128-bit
loads, instructions per logit) and a model of the latency that the loads in flight cover; none has been timed on a GPU yet.
`rlhf-fast bench --device cuda --tune` times them on one and writes its rows to tuned.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from rlhf_fast.kernels.common.tuned import TUNED


class Config(NamedTuple):
    """Threads of one program and the width of its tile."""

    lanes: int
    """Elements of one tile, a power of two: accumulators of a row. A program walks four tiles at a time."""
    num_warps: int


_NARROW, _WIDE = "16-bit", "32-bit"
_SMALL, _LARGE = "V <= 4096", "V > 4096"

_DEFAULT: dict[tuple[str, str, str], Config] = {
    ("token_logprobs", _NARROW, _SMALL): Config(256, 1),
    ("token_logprobs", _NARROW, _LARGE): Config(2048, 8),
    ("token_logprobs", _WIDE, _SMALL): Config(256, 2),
    ("token_logprobs", _WIDE, _LARGE): Config(2048, 8),
    ("token_logprobs_backward", _NARROW, _SMALL): Config(256, 1),
    ("token_logprobs_backward", _NARROW, _LARGE): Config(2048, 8),
    ("token_logprobs_backward", _WIDE, _SMALL): Config(128, 1),
    ("token_logprobs_backward", _WIDE, _LARGE): Config(1024, 8),
}
"""{(op, width of the logits, vocabulary class): sizes} for an architecture without rows of its own."""

_WAVE_64 = {key: Config(lanes, max(1, warps // 2)) for key, (lanes, warps) in _DEFAULT.items()}
"""AMD's data-centre GPUs: a wave has 64 threads, so half as many make the same program."""

_BY_ARCH: dict[str, dict[tuple[str, str, str], Config]] = {
    **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), _WAVE_64),
    **{arch: {key: Config(*sizes) for key, sizes in rows.items()} for arch, rows in TUNED.items()},
}


def config(op: str, arch: str, dtype: torch.dtype, vocab: int) -> Config:
    """The sizes for `op` on logits of `dtype` with `vocab` classes; arch as launch.arch_of gives it."""
    key = (op, _NARROW if dtype.itemsize == 2 else _WIDE, _SMALL if vocab <= 4096 else _LARGE)
    return _BY_ARCH.get(arch, _DEFAULT).get(key, _DEFAULT[key])


def configs(op: str, arch: str) -> dict[tuple[str, str, str], Config]:
    """Every row of the table that `op` may use on `arch`: what an audit compiles."""
    found = {**_DEFAULT, **_BY_ARCH.get(arch, {})}
    return {key: row for key, row in found.items() if key[0] == op}
