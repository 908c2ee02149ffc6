"""One command as one process or as ranks of a trainer on the CPU, under the wrappers of accelerate."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

RANKS = 2
PARALLEL: dict[str, dict[str, str]] = {
    "none": {},
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    },
}  # fmt: skip
"""{--parallel: what accelerate reads of it}."""


def run(command: Sequence[str], environment: Mapping[str, str], parallel: str) -> list[dict[str, Any]]:
    """What every process printed last, as JSON: one of them for "none". Exits with the complaint of the first that failed."""
    shared = {**environment, **PARALLEL[parallel]}
    each: list[dict[str, str]] = [{}]
    if parallel != "none":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared |= {
            "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
        }  # fmt: skip
        each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=shared | own, **pipes) for own in each]
    with concurrent.futures.ThreadPoolExecutor(
        len(processes)
    ) as pool:  # a full pipe would stop a rank, and so the others
        said = list(pool.map(lambda process: process.communicate(), processes))
    for process, (_, complaint) in zip(processes, said, strict=True):
        if process.returncode:
            sys.exit(complaint)
    return [json.loads(printed.splitlines()[-1]) for printed, _ in said]


def merged(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run of several ranks: losses and data of all of them, the slowest step, the highest peak.

    Raises ValueError where the ranks have other gradient norms: their gradients were not reduced.
    """
    if any(r["norms"] != ranks[0]["norms"] for r in ranks):
        raise ValueError(f"merged: norms must be those of every rank, got {[r['norms'] for r in ranks]}")
    found = {**ranks[0]}
    for name in ("losses", "sizes", "data"):
        found[name] = [x for r in ranks for x in r[name]]
    for name in ("seconds", "generation"):
        found[name] = [max(step) for step in zip(*(r[name] for r in ranks), strict=True)]
    for name, reduce in {"peak": max, "first peak": max, "reached": sum, "fell through": sum}.items():
        found[name] = reduce(r[name] for r in ranks)
    return found


def held_by(model: Any) -> str:
    """The value of --parallel under which a model is trained."""
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    if all(isinstance(p, DTensor) for p in model.parameters()):
        return "fsdp2"
    return "ddp" if isinstance(model, DistributedDataParallel) else "none"


def shard_on_the_cpu() -> None:
    """After the configuration, which makes the state: accelerate 1.15 takes FSDP from its environment on accelerators alone, so it is
    told that these ranks are some. The model, its gradients and gloo stay where they are."""
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
