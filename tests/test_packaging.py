"""What pip gets to see: wheels with and without a compiler, and a source archive that can be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fake_toolkit import cuda_home, cxx

from rlhf_fast._version import __version__ as VERSION

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "__pycache__", "*.so", "*.egg-info", ".*cache")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "rlhf_fast", ignore=SKIP)


def wheel(source: Path, out: Path, *, compiler: bool, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pip wheel` without isolation (so without a network), with or without a compiler to be found."""
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | environment
    if not compiler:
        env["PATH"] = str(Path(sys.executable).parent)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", out, source]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so_once(source, tmp_path):
    done = wheel(source, tmp_path, compiler=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(built).namelist()
    python = {f"rlhf_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    python |= {str(p.relative_to(ROOT)) for p in (ROOT / "rlhf_fast").rglob("*.py")}
    assert python | {"rlhf_fast/py.typed"} <= set(names)
    assert len([n for n in names if n.endswith(".dist-info/sboms/rlhf-fast.cdx.json")]) == 1
    assert not any(n.endswith(".so") or n.startswith(("kernels/", "tests/", "building/", "csrc/")) for n in names)
    assert (done.stdout + done.stderr).count("no C++ compiler was found") >= 1


def test_a_required_native_build_without_a_compiler_is_an_error(source, tmp_path):
    done = wheel(source, tmp_path, compiler=False, RLHF_FAST_REQUIRE_NATIVE="1")
    assert done.returncode != 0 and "RLHF_FAST_REQUIRE_NATIVE=1, and no C++ compiler" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_compiler_that_fails_falls_back_unless_native_is_required(source, tmp_path):
    if shutil.which("false") is None:
        pytest.skip("needs the command `false` as a broken compiler")
    done = wheel(source, tmp_path, compiler=True, CXX="false")
    assert done.returncode == 0 and "the C++ kernels did not build" in done.stdout + done.stderr
    assert wheel(source, tmp_path, compiler=True, CXX="false", RLHF_FAST_REQUIRE_NATIVE="1").returncode != 0


@pytest.mark.parametrize(
    ("setting", "fails", "modules"),
    [("auto", False, {"_cpu", "_cuda12"}), ("0", False, {"_cpu"}), ("auto", True, {"_cpu"}), ("12.4", True, None)],
)
def test_cuda_kernels_that_do_not_build_are_left_out_unless_they_are_asked_for(
    source, tmp_path, setting, fails, modules
):
    """With compilers that only say what they are asked; None: no wheel."""
    if not list((source / "csrc" / "cuda").glob("*.cu")):
        pytest.skip("needs CUDA kernels")
    tools = {"CXX": str(cxx(tmp_path / "tools")), "CUDA_HOME": str(cuda_home(tmp_path / "tools", fails))}
    done = wheel(source, tmp_path, compiler=False, RLHF_FAST_CUDA=setting, RLHF_FAST_LOCAL_VERSION="here", **tools)
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == (modules is not None), text
    assert ("nvcc error: cicc died" in text) == fails and ("are left out" in text) == (setting == "auto" and fails)
    built = list(tmp_path.glob("*.whl"))
    if modules is None:
        assert not built
    else:
        assert built[0].name.startswith(f"rlhf_fast-{VERSION}+here-cp3") and len(built) == 1
        names = zipfile.ZipFile(built[0]).namelist()
        assert {Path(n).name.partition(".")[0] for n in names if n.endswith(".so")} == modules


def test_the_source_archive_holds_all_that_the_build_reads(source, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {n.partition("/")[2] for n in opened.getnames()}
    needed = {
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    }
    needed |= {f"csrc/building/{name}" for name in ("__init__.py", "cuda.py", "sbom.py")}
    assert needed | {"kernels/__init__.py", "LICENSE", "MIGRATING.md", "pyproject.toml", "rlhf_fast/_op.py"} <= names
