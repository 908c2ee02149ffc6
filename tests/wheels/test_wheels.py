"""What `make wheels` made: tags, contents, architectures, the same bytes twice, and each file in an environment of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "csrc"))  # csrc/building is no part of the installed package

from building import cuda, wheels  # noqa: E402
from building.elf import CEILINGS, NEEDED, needed, newest_symbols  # noqa: E402

DIST = Path(os.environ.get("RLHF_FAST_DIST", ROOT / "dist")).resolve()
FLAVOURS = ("cpu", "cuda")
ENVIRONMENT = ROOT / ".cache" / "wheels-check"
MODULES = {"cpu": {"_cpu"}, "cuda": {"_cpu", "_cuda12", "_cuda13"}}


def wheel_of(flavour: str) -> Path:
    (found,) = (DIST / flavour).glob("*.whl")
    return found


def sdist() -> Path:
    (found,) = DIST.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module", params=FLAVOURS)
def unpacked(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    zipfile.ZipFile(wheel_of(request.param)).extractall(folder)
    return request.param, folder


def modules(folder: Path) -> dict[str, Path]:
    return {p.name.partition(".")[0]: p for p in (folder / "rlhf_fast").glob("*.so")}


def test_the_tag_is_the_oldest_that_the_symbols_allow(unpacked):
    flavour, folder = unpacked
    assert set(modules(folder)) == MODULES[flavour]
    glibc = int(re.search(r"manylinux_2_(\d+)_", wheel_of(flavour).name)[1])
    newest = [newest_symbols(module) for module in modules(folder).values()]
    assert max(found["GLIBC"] for found in newest) <= (2, glibc) <= CEILINGS["GLIBC"]
    assert max(found["GLIBCXX"] for found in newest) <= CEILINGS["GLIBCXX"]
    for module in modules(folder).values():
        assert needed(module) <= NEEDED


def test_the_wheel_holds_the_package_and_no_more(unpacked):
    flavour, folder = unpacked
    top = {p.name for p in folder.iterdir()}
    assert top == {"rlhf_fast", wheel_of(flavour).name.split("-py")[0].split("-cp")[0] + ".dist-info"}
    python = {p.relative_to(ROOT / "kernels") for p in (ROOT / "kernels").rglob("*.py")}
    assert all((folder / "rlhf_fast" / "kernels" / name).is_file() for name in python)
    python = {p.relative_to(ROOT) for p in (ROOT / "rlhf_fast").rglob("*.py")}
    assert all((folder / name).is_file() for name in python)


def test_the_wheel_says_what_it_was_made_from(unpacked):
    flavour, folder = unpacked
    (bill,) = folder.glob("*.dist-info/sboms/*.cdx.json")
    made = json.loads(bill.read_text())
    assert made["bomFormat"] == "CycloneDX" and made["metadata"]["timestamp"]
    files = {p["name"]: p["hashes"][0]["content"] for p in made["components"] if p["type"] == "file"}
    for name, digest in files.items():
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == digest, name
    assert ("csrc/cuda/driver.cpp" in files) == (flavour == "cuda")
    compilers = {p["name"] for p in made["components"] if p["type"] == "application"}
    assert compilers >= ({"nvcc", "NVRTC"} if flavour == "cuda" else {"c++ compiler"})
    (record,) = folder.glob("*.dist-info/RECORD")
    assert f"sboms/{bill.name},sha256=" in record.read_text()


def test_the_libraries_hold_exactly_the_promised_architectures(tmp_path):
    from test_packaging_cuda import _tool_of_triton, images, promised

    cuobjdump = shutil.which("cuobjdump") or _tool_of_triton("cuobjdump")
    assert cuobjdump, "cuobjdump comes with triton, of the extra dev"
    zipfile.ZipFile(wheel_of("cuda")).extractall(tmp_path)
    sources = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    for name in ("_cuda12", "_cuda13"):
        found = images(cuobjdump, str(modules(tmp_path)[name]))
        assert found == promised(cuda.DEFAULT_ARCHES.split(), sources), name


@pytest.fixture(scope="module")
def python() -> Path:
    """An environment with torch for the CPU alone, without compilers on PATH; kept between runs."""
    executable, mark = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready"
    if not mark.is_file():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        venv.create(ENVIRONMENT, with_pip=True)
        pip(executable, "install", "-c", ROOT / "constraints.txt", "torch", "numpy")
        mark.touch()
    return executable


def pip(executable: Path, *arguments: object, **environment: str) -> str:
    command = [executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_HOME")} | environment
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def outside(executable: Path, code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code where no compiler is found and the checkout is not in the way."""
    env = {"PATH": str(executable.parent), "HOME": str(cwd), **environment}
    return subprocess.run([executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env)


FORWARD = """
import torch, rlhf_fast
from rlhf_fast import _native, cuda
assert "site-packages" in rlhf_fast.__file__, rlhf_fast.__file__
logits = torch.randn(3, 50, requires_grad=True)
ids = torch.tensor([0, 7, 49])
out = rlhf_fast.token_logprobs(logits, ids)
out.logprobs.sum().backward()
truth = torch.log_softmax(logits.detach().double(), -1)[torch.arange(3), ids]
assert (out.logprobs.double() - truth).abs().max() < 1e-5 and logits.grad.isfinite().all()
print(_native.missing(), "|", cuda.missing())
"""
LAUNCH = """
import torch
from rlhf_fast import cuda
x = torch.zeros(2, 3)
try:
    cuda.kernel("gae")(x, x, None, None, None, x, x, 2, 3, 6, 1.0, 0.95, False, 0)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_wheel_runs_in_an_environment_of_its_own(flavour, python, tmp_path):
    pip(python, "install", "--no-deps", "--force-reinstall", wheel_of(flavour))
    done = outside(python, FORWARD, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None | this torch is built for the CPU alone"
    for major, driver in (("12", "525"), ("13", "580")):
        done = outside(python, LAUNCH, tmp_path, RLHF_FAST_CUDA_LIB=major)
        if flavour == "cpu":
            assert f"RLHF_FAST_CUDA_LIB={major}: rlhf_fast._cuda{major} was not built" in done.stderr + done.stdout
        elif not Path("/proc/driver/nvidia").exists():
            assert "CUDA kernel 'gae': libcuda.so.1: cannot open shared object file" in done.stdout, done.stderr
            assert "there is no NVIDIA driver; CPU tensors go on working" in done.stdout
            assert f"version {driver} or newer (CUDA {major}.0)" in done.stdout
    doctor = outside(python, "import rlhf_fast.doctor as d; print(d.report())", tmp_path)
    assert doctor.returncode == 0, doctor.stderr
    if flavour == "cuda":
        for line in ("CUDA 12       built by CUDA 12.9 for ", "CUDA 13       built by CUDA 13.0 for "):
            assert line + cuda.DEFAULT_ARCHES in doctor.stdout


def test_the_source_archive_builds_in_isolation_within_a_minute(python, tmp_path):
    """With a C++ compiler, and without nvcc and torch: what `pip install` does from an index without wheels.

    Processor time of two cores, since other jobs may run beside.
    """
    before = os.times()
    pip(python, "wheel", "--no-deps", "-w", tmp_path, sdist(), RLHF_FAST_CUDA="0", RLHF_FAST_REQUIRE_NATIVE="1")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    (made,) = tmp_path.glob("*.whl")
    pip(python, "install", "--no-deps", "--force-reinstall", made)
    done = outside(python, FORWARD, tmp_path)
    assert done.stdout.startswith("None |"), done.stderr
    assert seconds / 2 < 60, f"{seconds:.0f} s"


def test_an_editable_install_imports_from_its_root_and_from_elsewhere(python, tmp_path):
    with tarfile.open(sdist()) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    pip(python, "uninstall", "-y", "rlhf-fast")
    pip(python, "install", "setuptools", "pybind11", "-c", ROOT / "constraints.txt")
    pip(python, "install", "--no-deps", "--no-build-isolation", "-e", source, RLHF_FAST_NO_NATIVE="1")
    code = "import rlhf_fast, rlhf_fast.kernels, rlhf_fast.cuda; print(rlhf_fast.kernels.__file__)"
    for folder in (source, tmp_path):
        done = outside(python, code, folder)
        assert done.stdout.strip() == str(source / "kernels" / "__init__.py"), done.stderr
    pip(python, "uninstall", "-y", "rlhf-fast")


def test_a_second_build_makes_the_same_file(tmp_path, monkeypatch):
    """In another folder. The larger wheel holds the modules of the smaller one too."""
    epoch = subprocess.run(["git", "-C", ROOT, "log", "-1", "--format=%ct"], capture_output=True, text=True, check=True)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch.stdout.strip())
    again, first = wheels.build_wheel(sdist(), "cuda", tmp_path), wheel_of("cuda")
    assert again.name == first.name and again.read_bytes() == first.read_bytes()
    smaller = zipfile.ZipFile(wheel_of("cpu"))
    for name in smaller.namelist():
        if name.endswith(".so"):
            assert smaller.read(name) == zipfile.ZipFile(first).read(name)
