"""One of two ranks that train on half a batch each with LigerGRPOLoss under DDP; prints the gradient as JSON, rank 0 also that of
one process with the whole batch."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from rlhf_fast.integrations.trl import LigerGRPOLoss

WORLD = 2


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 9, bias=False)

    def forward(self, x):
        return self.lm_head(self.body(x))


def redirected(wrapped, model, method, *args):
    """TRL's forward redirection: the method runs as the forward of the wrapped model, between its hooks."""
    original = model.forward

    def once(*inner):
        model.forward = original
        return method(*inner)

    model.forward = once
    return wrapped(*args)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).tolist()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--rank", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{given.store}", rank=given.rank, world_size=WORLD)
    torch.manual_seed(0)
    model = Model()
    x, ids = torch.randn(WORLD, 3, 5, 4), torch.randint(0, 9, (WORLD, 3, 5))
    mask, advantages = torch.rand(WORLD, 3, 5) > 0.3, torch.randn(WORLD, 3)
    loss = LigerGRPOLoss(beta=0.0, loss_type="dapo")

    def compute(x, *rest):
        return loss(model.body(x), model.lm_head.weight, *rest)[0]

    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    redirected(wrapped, model, compute, *(t[given.rank] for t in (x, ids, mask, advantages))).backward()
    print(gradient(model))
    dist.destroy_process_group()
    if given.rank == 0:
        model.zero_grad()
        compute(*(t.flatten(0, 1) for t in (x, ids, mask, advantages))).backward()
        print(gradient(model))


if __name__ == "__main__":
    main()
