"""Which block barriers of compiled code order anything.

A compiler puts a barrier before it first uses a piece of shared memory, and two in a row around an atomic. Without such a barrier
the code means the same; this is found by looking at all paths, and not by running some.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpu.tools.ptx_parse import Instruction, Kernel, name_of, parse

Accesses = set[tuple[str, bool]]
"""(state space, whether it writes)"""

_SHARED, _GLOBAL = "shared", "global"
_PRIVATE = ("param", "const", "local")
_MEMORY = ("ld", "ldu", "st", "atom", "red", "fence", "membar", "cp", "ldmatrix", "stmatrix", "mbarrier", "call")


def is_barrier(ins: Instruction) -> bool:
    return ins.op in ("bar", "barrier") and "sync" in ins.mods and "warp" not in ins.mods


def idle_barriers(ptx: str) -> set[int]:
    """Numbers, in the order of the text, of the bar.sync without which the code means the same.

    What one could reorder without the barrier lies between the barriers before it and those after it. It is idle when no access
    on one side can meet a write on the other: addresses are not compared, so what is returned is surely idle, and more may be.
    """
    kernel = parse(ptx)
    following = [list(_following(kernel, at)) for at in range(len(kernel.code))]
    preceding: list[list[int]] = [[] for _ in kernel.code]
    for at, targets in enumerate(following):
        for target in targets:
            preceding[target].append(at)
    found = set()
    for number, at in enumerate(at for at, ins in enumerate(kernel.code) if is_barrier(ins)):
        before, after = (_until_barrier(kernel, at, edges) for edges in (preceding, following))
        if not _meet(before, after):
            found.add(number)
    return found


def _following(kernel: Kernel, at: int) -> Iterable[int]:
    ins = kernel.code[at]
    if ins.op == "bra":
        target = kernel.labels[name_of(ins.target)]
        if target < len(kernel.code):
            yield target
    if (ins.op not in ("bra", "ret", "exit") or ins.guard is not None) and at + 1 < len(kernel.code):
        yield at + 1


def _until_barrier(kernel: Kernel, start: int, edges: list[list[int]]) -> Accesses:
    """Of everything that is reached from `start` without passing another barrier."""
    accesses: Accesses = set()
    seen, todo = set(edges[start]), list(edges[start])
    while todo:
        at = todo.pop()
        if is_barrier(kernel.code[at]):
            continue
        accesses |= _accesses(kernel.code[at])
        new = [x for x in edges[at] if x not in seen]
        seen.update(new)
        todo += new
    return accesses


def _accesses(ins: Instruction) -> Accesses:
    if ins.op not in _MEMORY or any(space in ins.mods for space in _PRIVATE):
        return set()
    spaces = [space for space in (_SHARED, _GLOBAL) if any(mod.partition("#")[0] == space for mod in ins.mods)]
    simple = ins.op in ("ld", "ldu", "st", "atom", "red") and len(spaces) == 1
    return {(space, ins.op not in ("ld", "ldu")) for space in (spaces if simple else (_SHARED, _GLOBAL))}


def _meet(one: Accesses, other: Accesses) -> bool:
    return any(x == y and (writes or also) for x, writes in one for y, also in other)
