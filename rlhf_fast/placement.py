"""`rlhf-fast ray TRAINER`: the processes of a run on the nodes of a Ray cluster.

Ray finds room for them, one placement group with a bundle for each rank and one for the vLLM server, and tells who died. A rank is the
program that torchrun would start, with torchrun's variables, and the server the one that rank 0 would start; both are children of an
actor that holds their bundle, and end with it, however that ends. Nothing else goes through Ray: gradients go through
torch.distributed, completions over HTTP, adapters through the shared folder.

Every node sees the folder that the command runs in, the model, the data and `run.output_dir` under the same paths.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_fast import _check
from rlhf_fast._guarded import GRACE
from rlhf_fast.cli import COMMANDS
from rlhf_fast.config import ConfigError, RayConfig, config_help, load_config, resolve_dtype
from rlhf_fast.placement_holder import SERVER, End, Holder, Node

SETTLE = 15.0
"""Seconds that the other ranks have, after the first one failed, to say what they know of it."""
NOTICED = 30.0
"""Seconds in which Ray knows that a node is dead, after a connection to it broke: five missed health checks, 3 s apart."""
ANSWER = 300.0
"""Seconds that an actor has for what takes none."""
FORWARDED = ("RLHF_FAST_", "NCCL_", "GLOO_")
"""Beginnings of the names of variables that ranks get from the command's environment; others are those of their node."""


class PlacementError(RuntimeError):
    """The run cannot be placed, or something that was placed has ended; the message says what and on which node."""


@dataclass(frozen=True)
class Placed:
    """The settings of the command that are no trainer's."""

    ray: RayConfig


class _Member(NamedTuple):
    name: str
    actor: Any
    node: Node

    def __str__(self) -> str:
        return f"{self.name} on {self.node}"


def main(words: Sequence[str]) -> int:
    """`rlhf-fast ray TRAINER [settings.yaml] [--ray.name value ...] [--dotted.name value ...]`."""
    trainers = [name for name, command in COMMANDS.items() if command.run.startswith("rlhf_fast.train.")]
    if not words or words[0] in ("-h", "--help"):
        print(config_help(Placed, "rlhf-fast ray TRAINER [settings.yaml] [settings of the trainer]", __doc__))
        return 0
    trainer, *rest = words
    if trainer not in trainers:
        raise ConfigError(f"ray: got {trainer!r}, expected one of {', '.join(trainers)}")
    own, rest = _split(rest)
    import rlhf_fast.config as config

    settings = load_config(Placed, None, own).ray
    path, overrides = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else (None, rest)
    loaded = load_config(getattr(config, COMMANDS[trainer].settings or ""), path, overrides)
    if (result := launch(settings, loaded, [trainer, *rest])) is not None:
        print(result)
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those of --ray.*, the others), each name with its values."""
    own: list[str] = []
    others: list[str] = []
    chosen = others
    for word in words:
        if word.startswith("--"):
            chosen = own if word.startswith("--ray.") else others
        chosen.append(word)
    return own, others


def launch(settings: RayConfig, config: Any, words: Sequence[str]) -> str | None:
    """Place a run, wait for its end, and leave nothing of it behind. Returns the last line of rank 0.

    config: settings of the trainer, checked. words: the command line behind `rlhf-fast` that gives the same to every rank.

    SIGINT and SIGTERM end it as they end a trainer: the ranks save after their step, within settings.grace. Raises ValueError for more
    than the cluster has, PlacementError when Ray cannot be reached, has no room in time, or something that was placed ends early.
    """
    ours = not ray.is_initialized()
    if ours:
        _connect(settings)
    serving = getattr(getattr(config, "rollout", None), "engine", None) == "vllm" and config.rollout.vllm.server is None
    try:
        with _sigterm(), _room(settings, serving) as group, contextlib.ExitStack() as stack:
            members = _actors(settings, serving, group, stack)
            return _run(settings, config, list(words), members, serving)
    finally:
        if ours:
            ray.shutdown()


def _connect(settings: RayConfig) -> None:
    address = settings.address or os.environ.get("RAY_ADDRESS") or "auto"
    latest = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        if address == "auto" and latest.is_file():  # where Ray looks as well; a cluster that crashed leaves it behind
            address = latest.read_text().strip()
        if found := re.fullmatch(
            r"\[?([\w.:-]+?)\]?:(\d+)", address
        ):  # Ray itself tries for minutes, and ends the process
            socket.create_connection((found[1], int(found[2])), timeout=10.0).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        where = "on this node" if address == "auto" else f"at {address}"
        raise PlacementError(f"no Ray cluster {where}: start one with `ray start --head` ({_line(error)})") from None


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit in this thread, if it is the main one."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bundles(settings: RayConfig, serving: bool) -> list[dict[str, float]]:
    """What each rank and, as the last one, the server takes."""
    rank = {"CPU": settings.cpus_per_rank, "GPU": settings.gpus_per_rank, **settings.rank_resources}
    server = {"CPU": settings.vllm_cpus, "GPU": settings.vllm_gpus, **settings.vllm_resources}
    bundles = [*[rank] * settings.ranks, *([server] if serving else [])]
    return [{name: float(n) for name, n in bundle.items() if n} for bundle in bundles]


@contextlib.contextmanager
def _room(settings: RayConfig, serving: bool) -> Iterator[PlacementGroup]:
    """A placement group of all bundles: all of them, or an error that says what is missing."""
    bundles = _bundles(settings, serving)
    asked = f"{settings.ranks} rank{'s' * (settings.ranks > 1)} of {_resources(bundles[0])}"
    if serving:
        asked += f" and a vLLM server of {_resources(bundles[-1])}"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for counter, rows in ((total, nodes), (wanted, bundles)):
        for row in rows:
            counter.update(row)
    alone = [b for b in bundles if not any(all(node.get(k, 0) >= n for k, n in b.items()) for node in nodes)]
    named = {name for bundle in bundles for name in bundle} | {"CPU", "GPU"}

    def has(resources: Mapping[str, float]) -> str:
        return _resources({k: resources.get(k, 0.0) for k in sorted(named)})

    if alone or any(total[name] < n for name, n in wanted.items()):
        each = "; ".join(has(node) for node in nodes)
        expected = f"at most what the cluster has: {has(total)} on {len(nodes)} node{'s' * (len(nodes) != 1)} ({each})"
        raise _check.error(ValueError, "ray", "resources", asked, expected)
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(settings.timeout):
            raise PlacementError(
                f"ray: no room for {asked} within ray.timeout = {settings.timeout:g} s: free are {has(ray.available_resources())} "
                f"of {has(total)}"
            )
        yield group
    finally:
        remove_placement_group(group)


def _resources(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{n:g} {name}" for name, n in resources.items()) or "no resources"


def _actors(settings: RayConfig, serving: bool, group: PlacementGroup, stack: contextlib.ExitStack) -> list[_Member]:
    """An actor in each bundle: the ranks, those of a node side by side, and the server last. The stack ends them."""
    remote: Any = ray.remote  # its types are of functions
    kind = remote(max_concurrency=4, max_restarts=0)(Holder)
    bundles = _bundles(settings, serving)
    names = [f"rank {i}" for i in range(settings.ranks)]

    def place(i: int, name: str) -> Any:
        bundle = dict(bundles[i])
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        cpus, gpus = bundle.pop("CPU", 0), bundle.pop("GPU", 0)
        return kind.options(num_cpus=cpus, num_gpus=gpus, resources=bundle, scheduling_strategy=strategy).remote(
            name, os.getcwd()
        )

    table = ray.util.placement_group_table(group)["bundles_to_node_id"]
    order: dict[str, int] = {}
    for i in range(settings.ranks):
        order.setdefault(table[i], len(order))
    bundle_of = sorted(range(settings.ranks), key=lambda i: order[table[i]])
    actors = [place(i, name) for i, name in zip(bundle_of, names, strict=True)]
    if serving:
        names.append(SERVER)
        actors.append(place(settings.ranks, SERVER))
    stack.callback(_end, actors)
    found = []
    for name, actor in zip(names, actors, strict=True):
        try:
            found.append(_Member(name, actor, ray.get(actor.node.remote(), timeout=ANSWER)))
        except ray.exceptions.RayError as error:
            raise PlacementError(f"{name} cannot be placed: {_line(error)}") from None
    return found


def _end(actors: Sequence[Any]) -> None:
    """End what is there, and wait for it."""
    calls = [actor.end.remote() for actor in actors]
    try:
        ray.wait(calls, num_returns=len(calls), timeout=GRACE + 5.0)
    finally:
        for actor in actors:
            ray.kill(actor)


def _run(settings: RayConfig, config: Any, words: list[str], members: list[_Member], serving: bool) -> str | None:
    ranks = members[: settings.ranks]
    common = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    blind = {"CUDA_VISIBLE_DEVICES": ""}
    """Whoever asked for no GPU takes none from those who did."""
    if serving:
        key, server = secrets.token_hex(16), members[-1]
        dtype, context, rank = _served(settings, config)
        vllm = config.rollout.vllm
        if settings.vllm_gpus > 1:
            parallel = f"--tensor-parallel-size={settings.vllm_gpus}"
            vllm = replace(vllm, arguments=(parallel, *vllm.arguments))
        served = replace(config, rollout=replace(config.rollout, vllm=vllm))
        call = server.actor.serve.remote(served, dtype, context, rank, key, {} if settings.vllm_gpus else blind)
        url = _started(server, call, vllm.start_timeout + ANSWER)
        common["RLHF_FAST_VLLM_TOKEN"] = key
        words = [*words, "--rollout.vllm.python", "none", "--rollout.vllm.server", url]
    port = _answer(ranks[0], ranks[0].actor.free_port.remote(), ANSWER)
    starts = []
    for rank, (member, local, size) in enumerate(_locals(ranks)):
        environment = common | ({} if settings.gpus_per_rank else blind)
        environment |= {"MASTER_ADDR": ranks[0].node.address, "MASTER_PORT": str(port)}
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(len(ranks))}
        environment |= {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(size)}
        starts.append(member.actor.start.remote(words, environment))
    for member, start in zip(ranks, starts, strict=True):
        if (fault := _answer(member, start, ANSWER)) is not None:
            raise PlacementError(f"{member} cannot start: {fault}")
    return _watch(settings, members)


def _served(settings: RayConfig, config: Any) -> tuple[str, int, int]:
    """(dtype, longest context, rank of the adapter with the folds) that the server needs, before the trainer has read its data."""
    from rlhf_fast.model.adapters import read_adapter

    device = "cuda" if settings.gpus_per_rank and config.run.device != "cpu" else "cpu"
    dtype = str(resolve_dtype(config.model.dtype, device)).removeprefix("torch.")
    prompt = min(n for n in (config.data.max_prompt_tokens, config.data.max_tokens) if n is not None)
    context = prompt + config.rollout.max_new_tokens
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what has no limit of its own
        known = json.loads((Path(config.model.path) / "config.json").read_text())["max_position_embeddings"]
        context = min(context, int(known))  # vLLM refuses more
    folds = [max(x.a.shape[0] for x in read_adapter(folder).weights.values()) for folder in config.model.fold]
    return dtype, context, config.model.lora.r + sum(folds)


def _locals(ranks: Sequence[_Member]) -> Iterator[tuple[_Member, int, int]]:
    """(rank, its number on its node, how many are on that node)."""
    sizes = Counter(member.node.id for member in ranks)
    seen: Counter[str] = Counter()
    for member in ranks:
        yield member, seen[member.node.id], sizes[member.node.id]
        seen[member.node.id] += 1


def _answer(member: _Member, call: Any, seconds: float) -> Any:
    try:
        return ray.get(call, timeout=seconds)
    except ray.exceptions.RayError as error:
        raise PlacementError(_gone(member, error)) from None


def _started(server: _Member, call: Any, seconds: float) -> str:
    url, fault = _answer(server, call, seconds)
    if fault is not None:
        raise PlacementError(f"{server} cannot start: {fault}")
    return url


def _watch(settings: RayConfig, members: Sequence[_Member]) -> str | None:
    """Wait until all ranks are done. Returns the last line of rank 0; raises PlacementError for what ends before, and why."""
    waiting = {member.actor.wait.remote(): member for member in members}
    by_name = {member.name: member for member in members}
    ends: dict[str, End | str] = {}  # in their order
    ranks = settings.ranks

    def collect(seconds: float | None) -> bool:
        """Take in what ends next; False if nothing does in time."""
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=seconds)
        for call in done:
            member = waiting.pop(call)
            try:
                ends[member.name] = ray.get(call)
            except ray.exceptions.RayError as error:
                ends[member.name] = _gone(member, error)
        return bool(done)

    def over() -> bool:
        return len(ends) - (SERVER in ends) == ranks

    def faults() -> list[tuple[int, str]]:
        """(how far it is from the cause, what happened), the cause first: who died, who failed, who tells of another's end."""
        found = []
        for name, end in ends.items():
            member = by_name[name]
            if isinstance(end, str):
                found.append((0, end))
            elif name == SERVER:
                found.append((0, _how(member, end)))
            elif end.status != 0:
                victim = any(line.startswith(f"rlhf-fast: {name} stops: ") for line in end.words)
                died = end.status is None or end.status < 0
                found.append((2 if victim else 0 if died else 1, _how(member, end)))
        return sorted(found, key=lambda fault: fault[0])

    try:
        while not over() and not faults():
            collect(None)
        if faults():
            deadline = time.monotonic() + SETTLE
            while faults()[0][0] and not over() and collect(max(0.0, deadline - time.monotonic())):
                pass
            told = faults()[0][1]
            # Who only tells of another's end names it by its rank.
            known = dict.fromkeys(int(n) for n in re.findall(r"(?<=\brank )\d+", told))
            places = [str(members[n]) for n in known if n < ranks and str(members[n]) not in told]
            raise PlacementError("; ".join([told, *places]))
    except (KeyboardInterrupt, SystemExit):
        print("rlhf-fast: the ranks end after their step; once more ends them now", file=sys.stderr, flush=True)
        for member in members[:ranks]:
            member.actor.ask_to_end.remote()
        deadline = time.monotonic() + settings.grace
        while not over() and collect(max(0.0, deadline - time.monotonic())):
            pass
        raise
    first = ends[members[0].name]
    words = first.words if isinstance(first, End) else []
    return words[-2] if len(words) > 1 else None  # the last one tells of its end


def _how(member: _Member, end: End) -> str:
    if end.status is None:
        how = "ended, and nobody saw how"
    else:
        how = f"was ended by signal {-end.status}" if end.status < 0 else f"ended with status {end.status}"
    told = [line.removeprefix("rlhf-fast: ") for line in end.words if line.startswith("rlhf-fast: ")]
    words = told[-1:] or end.words[-3:]
    return f"{member} {how}" + (": " + " / ".join(words) if words else "")


def _gone(member: _Member, error: Exception) -> str:
    """What became of an actor that does not answer."""
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"{member} does not answer"
    deadline = time.monotonic() + NOTICED
    while time.monotonic() < deadline:
        if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == member.node.id):
            return f"{member} is gone: its node died"
        if isinstance(error, ray.exceptions.ActorDiedError):
            break
        time.sleep(0.2)
    return f"{member} is gone: the process that held it died ({_line(error)})"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
