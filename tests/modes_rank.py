"""One of two ranks of a run of test_torch_modes.py: modes_rank.py RANK FOLDER, results as FOLDER/RANK.json."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import rlhf_fast

WORLD, B, T, H, V = 2, 4, 5, 8, 23


class Policy(nn.Module):
    """A head that is trained, and only ever read inside of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, V)

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> rlhf_fast.TokenStats:
        return rlhf_fast.linear_token_logprobs(self.body(x), self.head.weight, ids, bias=self.head.bias, mask=mask)


def policy() -> Policy:
    torch.manual_seed(0)
    return Policy()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, T, H, generator=g),
        torch.randint(0, V, (B, T), generator=g),
        torch.rand(B, T, generator=g) > 0.2,
    )


def logits() -> Tensor:
    z = torch.randn(B, T, V, generator=torch.Generator().manual_seed(2))
    z[0, 0, : V - V // 2] = -torch.inf  # all that the first rank has of a row
    return z


def loss(out: rlhf_fast.TokenStats) -> Tensor:
    return -(out.logprobs.clamp(min=-100.0) + 0.1 * out.entropy).sum()


def gradients(model: nn.Module) -> dict[str, list]:
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = grad.tolist()
    return found


def refused(call) -> str:
    try:
        call()
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def main(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=120))
    found: dict[str, object] = {}
    mine = [t[rank * B // WORLD : (rank + 1) * B // WORLD] for t in batch()]

    model = nn.parallel.DistributedDataParallel(policy())
    loss(model(*mine)).backward()
    found["ddp"] = gradients(model)

    mesh = init_device_mesh("cpu", (WORLD,))
    model = policy()
    fully_shard(model, mesh=mesh)
    loss(model(*mine)).backward()
    found["fsdp2"] = gradients(model)
    x, ids, mask = batch()
    model.reshard()
    found["sharded head"] = refused(lambda: rlhf_fast.linear_token_logprobs(x, model.head.weight, ids))

    sharded = distribute_tensor(logits(), mesh, [Shard(2)])
    found["sharded logits"] = refused(lambda: rlhf_fast.token_logprobs(sharded, ids))
    local, group = sharded.to_local().requires_grad_(), mesh.get_group()
    out = rlhf_fast.token_logprobs(local, ids, mask=mask, process_group=group)
    found["local logits"] = [x.tolist() for x in (out.logprobs, out.entropy)]

    def call(z: Tensor) -> Tensor:
        return loss(rlhf_fast.token_logprobs(z, ids, mask=mask, process_group=group))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    pairs = [(f(local), torch.autograd.grad(f(local), local)[0]) for f in (call, compiled)]
    found["compiled"] = all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
