"""The mutation runner makes the damage it names. The mutants of the kernels are run by `cd tests && python -m gpu.tools.mutate`."""

from __future__ import annotations

import ast
import json

import pytest
from gpu.tools import mutate
from gpu.tools.mutants import KINDS, Mutant, dependents, mutants
from gpu.tools.mutate import KERNELS, Barrier, Outcome, Report

SOURCE = """
import triton
import triton.language as tl
from rlhf_fast.kernels.common.scan import add

@triton.jit
def kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = row * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)  # naïve: columns count bytes
    y = tl.load(
        x_ptr + i,
        i < n,
        other=1.0,
    )
    z = tl.load(x_ptr + row)
    tl.debug_barrier()
    tl.store(out_ptr + i, tl.where(x < 0.5, y, z), i < n)
    tl.store(out_ptr, z)

def vector_of(x, width, aligned):
    return width if aligned else 1

def host(a, n):
    return a < n
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "kernel.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "other.py").write_text("from rlhf_fast.kernels import kernel\n")
    (tmp_path / "apart.py").write_text("import triton\n")
    (tmp_path / "common" / "scan.py").write_text("def add(a, b):\n    return a + b\n")
    return tmp_path


def test_every_kind_of_damage_is_made_once_where_it_can_be(root):
    found = mutants(root)
    assert [(m.kind, m.line) for m in sorted(found, key=lambda m: (m.line, m.kind))] == [
        ("int64", 8),
        ("boundary", 10),
        ("mask", 10),
        ("other", 10),
        ("mask", 11),
        ("other", 11),
        ("boundary", 13),
        ("barrier", 17),
        ("boundary", 18),
        ("mask", 18),
        ("alignment", 22),
    ]
    assert {m.kind for m in found} == set(KINDS)
    whole = ast.dump(ast.parse(SOURCE))
    assert all(ast.dump(ast.parse(m.source)) != whole for m in found)
    assert len({m.source for m in found}) == len(found)


@pytest.mark.parametrize(
    ("kind", "line", "before", "after"),
    [
        ("int64", 8, "row = tl.program_id(0).to(tl.int64)", "row = (tl.program_id(0))"),
        ("mask", 10, "tl.load(x_ptr + i, mask=i < n, other=0.0)", "tl.load(x_ptr + i)"),
        ("other", 10, "tl.load(x_ptr + i, mask=i < n, other=0.0)", "tl.load(x_ptr + i, mask=i < n)"),
        ("boundary", 10, "mask=i < n, other=0.0)", "mask=i <= n, other=0.0)"),
        ("barrier", 17, "    tl.debug_barrier()", "    None"),
        ("mask", 18, "tl.where(x < 0.5, y, z), i < n)", "tl.where(x < 0.5, y, z))"),
        ("alignment", 22, "return width if aligned else 1", "return width"),
    ],
)
def test_the_damage_is_what_the_kind_says_and_nothing_else(root, kind, line, before, after):
    (mutant,) = [m for m in mutants(root) if (m.kind, m.line) == (kind, line)]
    assert mutant.source == SOURCE.replace(before, after, 1)
    assert mutant.key.startswith("kernel.py ") and str(mutant).endswith(f", line {line}")


def test_what_uses_a_file_is_found(root):
    assert dependents(root, "kernel.py") == ["kernel", "other"]
    assert dependents(root, "common/scan.py") == ["kernel", "other"]
    assert dependents(root, "apart.py") == ["apart"]


def test_the_report_scores_and_wants_an_explanation(monkeypatch, tmp_path):
    table = tmp_path / "survivors.json"
    row = {"kind": "other", "file": "a.py", "function": "f", "code": "tl.load(x, m, other=0)", "why": "never used"}
    barrier = {"kind": "bar.sync", "file": "a.py", "function": "f", "code": "2 of 3", "why": "of one warp"}
    table.write_text(json.dumps([row, barrier]))
    monkeypatch.setattr(mutate, "SURVIVORS", table)
    of = lambda code: Mutant("a.py", "f", "other", 3, code, "")
    report = Report(
        [
            Outcome(of("tl.load(x, m, other=0)"), None),
            Outcome(of("tl.load(y, m, other=0)"), None),
            Outcome(Barrier("kernel", 1, 3, ("c",)), None),
            Outcome(Barrier("kernel", 2, 3, ("c",)), "compiled: race"),
            Outcome(Barrier("kernel", 0, 3, ("c",)), None),
            Outcome(Barrier("a.f", 1, 3, ("c",)), None),
        ],
        left_out=2,
    )
    assert report.score == pytest.approx(1 / 6)
    assert report.unexplained() == [report.outcomes[1], report.outcomes[2], report.outcomes[4]]
    text = str(report)
    assert "mutation score 16.7%: 1 of 6 noticed, 2 not tried" in text and "bar.sync: 1 of 4" in text
    assert "never used" in text and "of one warp" in text and "NOT EXPLAINED" in text


def test_every_explanation_is_of_a_mutant_that_exists():
    rows = json.loads(mutate.SURVIVORS.read_text(encoding="utf-8"))
    known = {(m.kind, m.file, m.function, m.code) for m in mutants(KERNELS)}
    noticed = json.loads(mutate.NOTICED.read_text(encoding="utf-8"))
    for row in rows:
        assert row["why"]
        if row["kind"] == "bar.sync":  # another barrier of the same code is known
            start = f"{row['file'].removesuffix('.py')}.{row['function']}: bar.sync "
            _, _, count = row["code"].partition(" of ")
            assert any(key.startswith(start) and key.endswith(f" of {count}") for key in noticed), row
            continue
        assert (row["kind"], row["file"], row["function"], row["code"]) in known, row
