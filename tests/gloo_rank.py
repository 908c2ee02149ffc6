"""One rank of a run of test_loss_splits.py: gloo_rank.py RANK WORLD FOLDER, results as FOLDER/RANK.json.

Every rank holds some rows of the same batch and computes in micro-batches that are trimmed to their own length.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from loss_batches import LEAVES, LENGTHS, OPTIONS, B, T, batch, run

from rlhf_fast import Denominators, covariance_mask, rollout_correction, top_entropy_mask
from rlhf_fast.losses import RECIPES

SHARES = {0: ([0], [3, 4]), 1: ([1, 2], [5], [6])}
"""Rank: the rows of its micro-batches."""


def main(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    everyone = dist.group.WORLD
    own = [row for rows in SHARES[rank] for row in rows]
    found: dict[str, object] = {"rows": own, "recipes": {}}
    for recipe in RECIPES:
        tensors = batch(recipe)
        counts = None if RECIPES[recipe].local else Denominators.of(tensors["mask"][own], None, everyone, horizon=T)
        loss, grads = torch.zeros((), dtype=torch.float64), {k: torch.zeros(B, T, dtype=torch.float64) for k in LEAVES}
        for rows in SHARES[rank]:
            length = max(LENGTHS[row] for row in rows)
            part, part_grads, _ = run(
                recipe, {k: v[rows, :length] for k, v in tensors.items()}, denominators=counts, **OPTIONS
            )
            loss += part
            for k, grad in part_grads.items():
                grads[k][rows, :length] = grad
        if counts is not None:
            dist.all_reduce(loss)
        found["recipes"][recipe] = {"loss": loss.item(), **{k: g[own].tolist() for k, g in grads.items()}}
    tensors = batch("decoupled_ppo")
    mine = {k: v[own] for k, v in tensors.items()}
    found["top_entropy"] = top_entropy_mask(
        mine["entropy"], mine["mask"], fraction=0.3, process_group=everyone
    ).tolist()
    found["kl_cov"] = covariance_mask(
        mine["logprobs"], mine["advantages"], mine["mask"], kind="kl_cov", fraction=0.2, process_group=everyone
    ).tolist()
    clip_cov = covariance_mask(
        mine["logprobs"], mine["advantages"], mine["mask"], kind="clip_cov", fraction=0.1, bounds=(0.0, 5.0),
        generator=torch.Generator().manual_seed(rank), process_group=everyone,
    )  # fmt: skip
    found["clip_cov"] = clip_cov.tolist()
    found["weights"] = rollout_correction(
        mine["old_logprobs"], mine["rollout_logprobs"], mine["mask"], normalize=True, process_group=everyone
    ).weights.tolist()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
