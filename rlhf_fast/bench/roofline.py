"""Least times on GPUs that are not here, from counted bytes and products: a model, not a measurement.

A formulation takes at least as long as its bytes at the peak rate of the memory, and as its products at the peak rate of the tensor
cores. Kernels reach 85 to 93 % of the former (the A100's and H100's own copy kernels); gaps between launches, exponentials and
instructions are not in it. It tells what no implementation of a formulation can beat, not what one takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_fast.bench.traffic import Count


@dataclass(frozen=True)
class Card:
    """Peak rates of one GPU, as its maker states them."""

    name: str
    bandwidth: float
    """Bytes per second of DRAM."""
    products: float
    """Floating-point operations per second of dense bf16 matrix products."""

    def seconds(self, count: Count) -> float:
        """Least time for that much traffic and that many products."""
        return max(count.moved / self.bandwidth, count.flops / self.products)


CARDS = (
    Card("A100 80 GB SXM", 2.039e12, 312e12),
    Card("H100 SXM", 3.35e12, 989e12),
    Card("B200", 8.0e12, 2.25e15),
)
"""NVIDIA's data sheets: A100 80GB (June 2021), H100 (SXM, rates halved to those without sparsity), HGX B200 (per GPU)."""

HEADING = "model prediction, not a measurement: least ms from bytes and products at the peak rates of the data sheets"


def table(counts: Sequence[Count], cards: Sequence[Card] = CARDS) -> str:
    """Markdown in the order of traffic.table; what binds is the memory unless a cell says "products"."""
    lines = ["| " + " | ".join([HEADING, "", *(card.name for card in cards)]) + " |", "| --- " * (2 + len(cards)) + "|"]
    shapes = list(dict.fromkeys(c.shape for c in counts))
    for c in sorted(counts, key=lambda c: (shapes.index(c.shape), c.moved)):
        cells = []
        for card in cards:
            bound = " products" if c.flops / card.products > c.moved / card.bandwidth else ""
            cells.append(f"{1e3 * card.seconds(c):.3g}{bound}")
        lines.append("| " + " | ".join([c.shape, c.name, *cells]) + " |")
    return "\n".join(lines) + "\n"
