"""The shape of the project: one row per op, no leaks between instruction sets, nothing heavy at import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast import _env, _native
from rlhf_fast.doctor import grid, report
from rlhf_fast.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
OPS = {path.stem for path in (ROOT / "rlhf_fast" / "ops").glob("[!_]*.py")}
COLUMNS = {
    "reference": ROOT / "rlhf_fast" / "reference",
    "cpu": ROOT / "csrc" / "cpu",
    "cuda": ROOT / "csrc" / "cuda",
    "triton": ROOT / "kernels",
    "tests": ROOT / "tests" / "ops",
    "bench": ROOT / "bench",
}
SHARED = {"dispatch", "driver", "limits", "matmul", "packed_linear", "parallel"}  # pieces of csrc that belong to no op


def rows_of(column: str) -> set[str]:
    names = {p.stem for p in COLUMNS[column].glob("*") if p.suffix in (".py", ".cpp", ".cu")}
    return {n.removeprefix("test_").removeprefix("bench_") for n in names if not n.startswith("_")} - SHARED


@pytest.mark.parametrize("column", ["reference", "cpu", "cuda", "triton"])
def test_every_file_of_a_column_belongs_to_a_row(column):
    assert rows_of(column) <= OPS


def test_every_test_file_of_an_op_begins_with_its_name():
    assert all(any(name.startswith(op) for op in OPS) for name in rows_of("tests"))


@pytest.mark.parametrize("column", ["reference", "tests"])
def test_every_op_has_a_reference_and_tests(column):
    assert rows_of(column) >= OPS


def test_every_public_op_is_exported_and_registered():
    registered = set(rlhf_fast.backends())
    for name in OPS:
        assert hasattr(rlhf_fast, name), name
        assert name in registered, name
    assert set(rlhf_fast.__all__) <= set(dir(rlhf_fast)) | {"SharedModel", "LoraConfig"}


def test_the_readme_shows_the_grid_of_today():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- grid -->\n(.*?)<!-- /grid -->", text, re.S)
    assert table, "README.md has no <!-- grid --> section"
    assert table.group(1).strip() == grid_table().strip()


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_lists_what_the_tables_hold(name):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S)
    assert shown, f"README.md has no <!-- {name} --> section"
    assert shown.group(1).strip() == TABLES[name]().strip()


BACKENDS = {"cpu": "cpp", "triton": "triton", "cuda": "cuda"}


def cells_of(column: str) -> set[str]:
    """Ops with a cell in a column. A head has no file of its own for its backends: it composes those of other rows."""
    if column not in BACKENDS:
        return rows_of(column)
    cells = {
        op: {name for found in devices.values() for name, *_ in found} for op, devices in rlhf_fast.backends().items()
    }
    return {op for op in OPS if BACKENDS[column] in cells[op]}


@pytest.mark.parametrize("column", BACKENDS)
def test_every_kernel_of_a_row_is_a_cell_of_its_op(column):
    assert rows_of(column) <= cells_of(column)


def grid_table() -> str:
    """Markdown table of the rows, made from the files that exist and the backends that are registered."""
    header = ["op", "reference", "C++ CPU", "Triton", "CUDA", "tests", "bench"]
    columns = ["reference", "cpu", "triton", "cuda", "tests", "bench"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    present = {column: cells_of(column) for column in columns}
    for op in sorted(OPS):
        cells = ["yes" if op in present[column] else "" for column in columns]
        lines.append("| " + " | ".join([f"`{op}`", *cells]) + " |")
    return "\n".join(lines)


def test_the_doctor_names_every_op_and_why_a_backend_is_missing():
    text = "\n".join(grid())
    for op in rlhf_fast.backends():
        assert op in text
    full = report()
    assert "C++ kernels" in full and rlhf_fast.__version__ in full


def test_importing_the_package_loads_torch_alone():
    heavy = ["transformers", "triton", "pydantic", "tyro", "rich", "sklearn", "numpy.testing", "safetensors"]
    code = f"import sys, rlhf_fast; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_forced_backend_that_is_missing_raises_with_its_reason():
    import torch

    zeros = torch.zeros(1, 3)
    with (
        rlhf_fast.use_backend("cuda"),
        pytest.raises(RuntimeError, match="gae: backend 'cuda' was forced and is not available"),
    ):
        rlhf_fast.gae(zeros, zeros)
    with pytest.raises(ValueError, match="unknown backend 'fastest'"), rlhf_fast.use_backend("fastest"):
        pass
    assert rlhf_fast.gae(zeros, zeros)[0].sum() == 0


def test_a_backend_that_declines_a_call_leaves_it_to_the_next_and_keeps_the_reason(monkeypatch):
    import torch

    from rlhf_fast._op import OPS, Backend, no_doubles

    op = OPS["gae"]
    picky = Backend("triton", "cpu", lambda *_: pytest.fail("declined"), lambda: None, no_doubles)
    monkeypatch.setattr(op, "backends", (picky, *op.backends))
    monkeypatch.setattr(op, "declined", {})
    x = torch.rand(2, 5, dtype=torch.float64)
    with rlhf_fast.use_backend(None):
        assert torch.equal(rlhf_fast.gae(x, x)[0], torch.ops.rlhf_fast.gae(x, x, None, None, None, 1.0, 0.95, False)[0])
    assert op.declined == {("triton", "fp64 is left to the reference"): 2}
    with (
        rlhf_fast.use_backend("triton"),
        pytest.raises(RuntimeError, match="gae: backend 'triton' was forced and declines this call: fp64"),
    ):
        rlhf_fast.gae(x, x)
    assert op.declined["triton", "fp64 is left to the reference"] == 3


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


CALL = "import torch, rlhf_fast; z = torch.zeros(1, 3); print(rlhf_fast.gae(z, z)[0].sum().item())"


def test_case_19_an_unknown_or_unsupported_instruction_set_is_an_error_of_the_native_part():
    assert run_python("import rlhf_fast", RLHF_FAST_CPU_ISA="avx99").returncode == 0
    failed = run_python(CALL, RLHF_FAST_CPU_ISA="avx99")
    assert failed.returncode != 0 and "unknown instruction set 'avx99', expected one of" in failed.stderr
    module, _ = _native.load()
    assert module is not None
    for name, supported in module.isas():
        if not supported:
            failed = run_python(CALL, RLHF_FAST_CPU_ISA=name)
            assert failed.returncode != 0 and f"this processor lacks {name}" in failed.stderr


def test_each_supported_instruction_set_can_be_forced(native):
    for name, supported in native.isas():
        if supported:
            done = run_python(
                CALL + "; from rlhf_fast import _native; print(_native.load()[0].isa())", RLHF_FAST_CPU_ISA=name
            )
            assert done.stdout.split() == ["0.0", name], done.stderr


def test_an_environment_variable_forces_the_backend():
    code = CALL + "; print(rlhf_fast.gae.__module__, rlhf_fast._op.OPS['gae'].select('cpu').name)"
    assert run_python(code, RLHF_FAST_BACKEND="reference").stdout.split()[-1] == "reference"
    assert "unknown backend 'x'" in run_python(CALL, RLHF_FAST_BACKEND="x").stderr
    with pytest.raises(KeyError):
        _env.get("NO_SUCH_VARIABLE")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("missing", "was not built"), ("truncated", "does not load"), ("other ABI", "has ABI version 999")],
)
def test_case_20_a_missing_broken_or_foreign_native_module_falls_back_with_one_warning(tmp_path, damage, reason):
    package = tmp_path / "rlhf_fast"
    shutil.copytree(ROOT / "rlhf_fast", package, ignore=shutil.ignore_patterns("_cpu*.so", "__pycache__"))
    if damage == "truncated":
        source = next((ROOT / "rlhf_fast").glob("_cpu*.so"), None) or Path(_native.load()[0].__file__)
        (package / source.name).write_bytes(source.read_bytes()[:5000])
    elif damage == "other ABI":
        (package / "_cpu.py").write_text("ABI = 999\n")
    # Without the finder of an editable install, which would find the module that the copy lacks.
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    path += "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"
    code = f"{path}\n{CALL}\n{CALL}\nprint(rlhf_fast._native.load()[1])"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["0.0", "0.0"] and reason in done.stdout
    warned = done.stderr.count("falling back to the PyTorch reference")
    assert warned == (0 if damage == "missing" else 1)


def test_case_18_a_forked_child_completes(native):
    code = """
import os, torch, rlhf_fast
x = torch.randn(64, 5000)
rlhf_fast.gae(x, x)
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    out = rlhf_fast.gae(x, x)
    # .item() alone: a parallel operator of torch itself would hang here.
    os._exit(0 if out[0][63, 0].item() == out[0][63, 0].item() else 3)
import time
for _ in range(1200):
    done, status = os.waitpid(child, os.WNOHANG)
    if done: break
    time.sleep(0.05)
else:
    os.kill(child, 9); raise SystemExit("the child hangs")
print("status", status)
"""
    assert run_python(code).stdout.strip() == "status 0"


def test_simd_objects_leak_no_symbol_into_the_baseline_path(tmp_path):
    """A weak symbol from a file built with AVX-512 flags may be the copy that every caller gets: SIGILL elsewhere."""
    if shutil.which("nm") is None or shutil.which("g++") is None:
        pytest.skip("needs nm and g++ to compile and list object files")
    sources = [p for p in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if p.stem not in SHARED]
    for source in sources:
        target = tmp_path / f"{source.stem}.o"
        flags = [
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-mavx2",
            "-mfma",
            "-mf16c",
            "-DRLHF_FAST_ISA=avx2",
            "-DRLHF_FAST_ISA_AVX2",
        ]
        subprocess.run(["g++", *flags, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target], check=True)
        listed = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listed.splitlines() if re.search(r" [WVu] ", line)]
        assert not weak, f"{source.name}: {weak}"


def test_the_source_has_no_unsafe_loading():
    for path in (ROOT / "rlhf_fast").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("torch.load(", "import pickle", "allow_pickle=True", "trust_remote_code=True", "eval(", "exec("):
            found = [m.start() for m in re.finditer(rf"(?<![\w.]){re.escape(word)}", text)]
            assert not found, f"{path.name}: {word}"
