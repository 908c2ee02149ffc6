"""One rank of a run of test_preference_splits.py: preference_rank.py RANK WORLD FOLDER, results as FOLDER/RANK.json.

Every rank holds some of the pairs. A kind that looks across them gathers those of all ranks; the others go through in micro-batches.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from preference_batches import CASES, LEAVES, OPTIONS, N, across, across_ranks, kl_logratios, names, pairs, run

from rlhf_fast import (
    Denominators,
    advantages,
    gather_rows,
    gdpo_advantages,
    group_advantages,
    preference_loss,
    running_delta,
    whiten,
)
from rlhf_fast.ops.group_advantages import FORMULAS
from rlhf_fast.preference_kinds import KINDS

SHARES = {0: ([0, 1], [2], [3]), 1: ([4], [5, 6, 7, 8])}
"""Rank: the pairs of its micro-batches."""


def own_rows(rank: int) -> list[int]:
    return [row for rows in SHARES[rank] for row in rows]


def own_places(rank: int) -> slice:
    """Where a rank finds its rows among those of all."""
    start = sum(len(own_rows(r)) for r in range(rank))
    return slice(start, start + len(own_rows(rank)))


def of_parts(case: str, rank: int, tensors: dict) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """(the loss of this rank, its gradients, the same loss averaged over the ranks)."""
    own, everyone = own_rows(rank), dist.group.WORLD
    counts = Denominators.of(tensors["mask"][own][:, None], process_group=everyone)
    mine = {"kl_logratios": gather_rows(kl_logratios()[own], everyone)} if "kto" in names(case) else {}
    loss, averaged = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    grads = {k: torch.zeros(N, dtype=torch.float64) for k in LEAVES}
    for rows in SHARES[rank]:
        part = {k: v[rows] for k, v in tensors.items()}
        found, of_part = run(case, part, normalizer=counts.normalizer("token-mean"), **mine)
        loss += found
        averaged += run(case, part, normalizer=counts.averaged(2).normalizer("token-mean"), **mine)[0]
        for k, grad in of_part.items():
            grads[k][rows] = grad
    dist.all_reduce(loss)
    dist.all_reduce(averaged)
    return loss, {k: g[own] for k, g in grads.items()}, averaged / 2


def of_all(case: str, rank: int, tensors: dict) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """The same of a kind that looks across: the loss of all pairs, on every rank."""
    own = own_rows(rank)
    leaves = {k: tensors[k][own].clone().requires_grad_() for k in LEAVES}
    gathered = {k: gather_rows(leaves.get(k, v[own])) for k, v in tensors.items()}
    options = {o: OPTIONS[o] for o in KINDS[case].options}
    loss = preference_loss(**gathered, kind=case, **options).loss
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, grads, strict=True)), loss.detach()


def main(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    own = own_rows(rank)
    found: dict[str, object] = {"rows": own}
    for case in CASES:
        loss, grads, averaged = (of_all if across(case) else of_parts)(case, rank, pairs(case))
        found[case] = {"loss": loss.item(), "averaged": averaged.item(), **{k: g.tolist() for k, g in grads.items()}}
    scores, ids = torch.linspace(-1, 2, N, dtype=torch.float64).square(), torch.arange(N) % 2  # groups on both ranks
    lengths = torch.arange(N) + 1
    for kind in FORMULAS:
        extra = {"lengths": gather_rows(lengths[own])} if kind == "opo" else {}
        extra |= {"greedy_scores": gather_rows(scores[own]) * 0.5} if kind == "remax" else {}
        leaf = scores[own].clone().requires_grad_()
        everywhere = group_advantages(gather_rows(leaf), gather_rows(ids[own]), kind, **extra)
        (grad,) = torch.autograd.grad((everywhere * torch.linspace(1, 2, N, dtype=torch.float64)).sum(), leaf)
        found[f"group {kind}"] = [everywhere.tolist(), grad.tolist()]
    several, token, mask = across_ranks()
    found["gdpo"] = gdpo_advantages(gather_rows(several[own]), gather_rows(ids[own])).tolist()
    raw = advantages(scores[own], token[own], mask[own], whiten=False).advantages
    found["whitened"] = whiten(gather_rows(raw), gather_rows(mask[own]))[own_places(rank)].tolist()
    zero = torch.zeros((), dtype=torch.float64)
    found["delta"] = running_delta(zero, zero, gather_rows(scores[own]))[0].item()
    x = torch.arange(6.0).view(3, 2)[: 3 * rank].requires_grad_()  # no row on the first rank
    y = gather_rows(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    try:
        first.sum().backward()
        second = "nothing was raised"
    except RuntimeError as error:
        second = str(error)
    found["gathered"] = [y.tolist(), first.tolist(), second]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
