"""Every kernel, target and specialisation keeps to the committed budget. `cd tests && python -m gpu.tools.budget --write` renews it."""

from __future__ import annotations

import copy

import pytest
from gpu.tools import budget
from gpu.tools.cases import cases_of, triton_ops


@pytest.fixture(scope="module")
def found():
    return budget.collect()


@pytest.mark.parametrize("target", budget.TARGETS, ids=budget.target_name)
def test_every_kernel_keeps_to_its_budget(found, target):
    name = budget.target_name(target)
    new, old = ({k: {name: of[name]} for k, of in x.items() if name in of} for x in (found, budget.read()))
    lines = budget.differences(new, old)
    assert not lines, "\n".join(["worse than gpu/compiled/budget.json (--write renews it):", *lines])


def test_every_op_with_a_triton_cell_has_cases():
    assert triton_ops()
    for op in triton_ops():
        assert cases_of(op), op


def test_what_is_worse_new_or_gone_is_a_difference():
    one = {"registers": 32, "spills": 0, "shared": 64, "occupancy": 1.0, "wide": 1.0, "instructions": 8.5, "exps": 1.0}
    held = {"k[](x: *fp32) x 4 warps": {"sm_90": one}}
    assert budget.differences(held, held) == []
    for what, worse, better in (
        ("registers", 33, 31),
        ("shared", 65, 0),
        ("occupancy", 0.5, None),
        ("wide", 0.9, None),
        ("instructions", 8.6, 8.4),
        ("exps", 1.1, 0.9),
    ):
        changed = copy.deepcopy(held)
        changed["k[](x: *fp32) x 4 warps"]["sm_90"][what] = worse
        (line,) = budget.differences(changed, held)
        assert f"on sm_90: {what} {worse:g}, budget" in line
        if better is not None:
            changed["k[](x: *fp32) x 4 warps"]["sm_90"][what] = better
            assert budget.differences(changed, held) == []
    assert "no budget for" in budget.differences(held, {})[0]
    assert "no such kernel any more" in budget.differences({}, held)[0]
    spilled = {"k": {"sm_90": {**one, "spills": 8}}}
    assert budget.differences(spilled, spilled) == ["k on sm_90: 8 bytes spilled"]


def test_a_budget_is_written_and_read_back(tmp_path):
    held = {"a": {"sm_80": {"registers": 1}, "sm_90": {"registers": 2}}, "b": {"gfx942": {"registers": 3}}}
    budget.write(held, tmp_path / "budget.json")
    assert budget.read(tmp_path / "budget.json") == held
    assert (tmp_path / "budget.json").read_text().count("\n") == 9
