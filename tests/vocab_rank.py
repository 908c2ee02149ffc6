"""One rank of a run of test_vocab_parallel.py: vocab_rank.py RANK WORLD FOLDER, results as FOLDER/RANK.json."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from vocab_slices import V, cases, cut, loss_cases, loss_results, results

import rlhf_fast


def refused(call) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def second_derivative(kwargs: dict, group: object) -> None:
    z = kwargs["logits"].clone().requires_grad_()
    out = rlhf_fast.token_logprobs(**{**kwargs, "logits": z}, process_group=group)
    (first,) = torch.autograd.grad(out.logprobs.sum(), z, create_graph=True)
    first.square().sum().backward()


def errors(rank: int, world: int, group: object) -> dict[str, str]:
    kwargs, _, _ = cases()["fp64"]
    kwargs = cut(kwargs, rank, world)
    beyond, cold = kwargs["token_ids"].clone(), torch.ones(4, 9, dtype=torch.float64)
    beyond[kwargs["mask"]] = V
    cold[kwargs["mask"]] = 0.0
    single = dist.new_group([0])
    calls = {
        "id": lambda: rlhf_fast.token_logprobs(**{**kwargs, "token_ids": beyond}, process_group=group),
        "temperature": lambda: rlhf_fast.token_logprobs(**kwargs, temperature=cold, process_group=group),
        "type": lambda: rlhf_fast.token_logprobs(**kwargs, process_group="world"),
        "second derivative": lambda: second_derivative(kwargs, group),
        "member": lambda: rank > 0 and rlhf_fast.token_logprobs(**kwargs, process_group=single),
    }
    loss = cut(loss_cases()["loss alone"][0], rank, world)
    calls["loss, id"] = lambda: rlhf_fast.linear_ppo_loss(
        **{**loss, "token_ids": loss["token_ids"] + V}, process_group=group
    )
    calls["loss, coefficient"] = lambda: rlhf_fast.linear_ppo_loss(**loss, kl_coef=0.1, process_group=group)
    calls["loss, type"] = lambda: rlhf_fast.linear_ppo_loss(**loss, process_group="world")
    return {name: refused(call) for name, call in calls.items()}


def invariance(rank: int, world: int, group: object) -> bool:
    """Whether a row alone has the bits that it has in a batch."""
    kwargs, options, trained = cases()["fp32"]
    kwargs = cut(kwargs, rank, world)
    whole = results(kwargs, options, trained, group)
    same = True
    for row in (0, 3):
        alone = results({k: v[row : row + 1] for k, v in kwargs.items()}, options, trained, group)
        same &= all(torch.equal(alone[k][0], whole[k][row]) for k in ("logprobs", "entropy", "logsumexp", "kl"))
    return same


def collectives(rank: int, world: int, group: object) -> dict[str, list[int]]:
    """Collectives and numbers sent by forward and backward of a call with a reference."""
    kwargs, _, _ = cases()["head fp64, frozen"]
    kwargs = cut(kwargs, rank, world)
    kwargs["hidden"] = kwargs["hidden"].clone().requires_grad_()
    sent: list[int] = []
    originals = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda parts, x, **k: (sent.append(x.numel()), originals[0](parts, x, **k))[1]
    dist.all_reduce = lambda x, **k: (sent.append(x.numel()), originals[1](x, **k))[1]
    try:
        out = rlhf_fast.linear_token_logprobs(**kwargs, process_group=group)
        forward = sent.copy()
        (out.logprobs.sum() + out.kl.sum()).backward()
    finally:
        dist.all_gather, dist.all_reduce = originals
    return {"forward": forward, "backward": sent[len(forward) :]}


def main(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    group = dist.group.WORLD
    found: dict[str, object] = {}
    for name, (kwargs, options, trained) in cases().items():
        got = results(cut(kwargs, rank, world), options, trained, group)
        found[name] = {k: [str(v.dtype), v.tolist()] for k, v in got.items()}
    for name, (kwargs, options, trained) in loss_cases().items():
        got = loss_results(cut(kwargs, rank, world), options, trained, group)
        found[name] = {k: [str(v.dtype), v.tolist()] for k, v in got.items()}
    found["errors"] = errors(rank, world, group)
    found["invariance"] = invariance(rank, world, group)
    found["collectives"] = collectives(rank, world, group)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
