"""The committed budget of every kernel, target and specialisation that the audited cases make Triton compile.

    cd tests && python -m gpu.tools.budget            # compare with gpu/compiled/budget.json; says what is worse
    cd tests && python -m gpu.tools.budget --write    # replace it; the diff is what a review looks at

Nothing is launched. A kernel may need fewer registers, instructions or bytes than its budget, but not more; it may not spill; and
a kernel that has no budget, or a budget that has no kernel, is a difference too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu.tools.audit import audit
from gpu.tools.cases import Case, as_arch, cases_of, triton_ops
from gpu.tools.driver import Compiled, install
from gpu.tools.on_cpu import on_cpu

TARGETS: tuple[int | str, ...] = (80, 86, 90, 100, 120, "gfx942")
PATH = Path(__file__).parents[1] / "compiled" / "budget.json"

Budget = dict[str, dict[str, dict[str, float]]]
"""{kernel: {target: {what: number}}}"""

_MORE_IS_WORSE = ("registers", "spills", "shared", "instructions", "exps")
_LESS_IS_WORSE = ("wide", "occupancy")


def target_name(target: int | str) -> str:
    return f"sm_{target}" if isinstance(target, int) else target


def compiled(target: int | str, cases: Iterable[Case]) -> list[Compiled]:
    """Every kernel and specialisation that the cases ask for, forward and backward."""
    with install(target, execute=False) as driver, as_arch(target_name(target)), on_cpu("triton"):
        for case in cases:
            case.results(case.inputs())
    return list(driver.compiled.values())


def measured(kernel: Compiled) -> dict[str, float]:
    """What the budget holds of a kernel. Instructions and exps: per element of its first tensor, in the hottest loop."""
    found = audit(kernel)
    instructions, exps = found.per_element(element_size(kernel))
    numbers = {
        "registers": found.registers,
        "spills": found.spills,
        "shared": found.shared,
        "occupancy": found.occupancy,
        "wide": found.wide,
        "instructions": instructions,
        "exps": exps,
    }
    return {k: round(v, 2) for k, v in numbers.items()}


def element_size(kernel: Compiled) -> int:
    """Bytes of an element of the first tensor argument."""
    first = next(kind for kind in kernel.signature.values() if kind.startswith("*"))
    kind = first.strip("*").removeprefix("k").removesuffix("D")
    bits = "".join(c for c in kind if c.isdigit())
    return max(1, int(bits) // 8)


def audited() -> list[Case]:
    return [case for case in cases_of(*triton_ops()) if case.audited]


def of_target(target: int | str) -> dict[str, dict[str, float]]:
    return {str(kernel): measured(kernel) for kernel in compiled(target, audited())}


def collect(targets: Sequence[int | str] = TARGETS) -> Budget:
    """Two targets at a time."""
    torch.set_num_threads(1)  # a child of a process whose threads have worked would wait for them
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        results = list(pool.map(of_target, targets))
    found: Budget = {}
    for target, kernels in zip(targets, results, strict=True):
        for name, numbers in kernels.items():
            found.setdefault(name, {})[target_name(target)] = numbers
    return {k: found[k] for k in sorted(found)}


def differences(found: Budget, budget: Budget) -> list[str]:
    """What is worse than its budget or missing, one line each."""
    lines = []
    for kernel, target in sorted({(k, t) for of in (found, budget) for k in of for t in of[k]}):
        new, old = found.get(kernel, {}).get(target), budget.get(kernel, {}).get(target)
        if new is None or old is None:
            lines.append(
                f"{kernel} on {target}: {'no such kernel any more' if new is None else f'no budget for {new}'}"
            )
            continue
        worse = [k for k in _MORE_IS_WORSE if new[k] > old[k]] + [k for k in _LESS_IS_WORSE if new[k] < old[k]]
        lines += [f"{kernel} on {target}: {k} {new[k]:g}, budget {old[k]:g}" for k in worse]
        if new["spills"]:
            lines.append(f"{kernel} on {target}: {new['spills']:g} bytes spilled")
    return lines


def read(path: Path = PATH) -> Budget:
    return json.loads(path.read_text(encoding="utf-8"))


def write(budget: Budget, path: Path = PATH) -> None:
    """One line for each kernel and target."""

    def block(of: dict[str, Any]) -> str:
        return ",\n".join(f"    {json.dumps(target)}: {json.dumps(numbers)}" for target, numbers in of.items())

    kernels = ",\n".join(f"  {json.dumps(kernel)}: {{\n{block(of)}\n  }}" for kernel, of in budget.items())
    path.write_text(f"{{\n{kernels}\n}}\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the committed budget")
    write_it = parser.parse_args().write
    found = collect()
    lines = differences(found, read() if PATH.exists() else {})
    print("\n".join(lines) or "within budget")
    if write_it:
        write(found)
    return 1 if lines and not write_it else 0


if __name__ == "__main__":
    sys.exit(main())
