"""The compiled modules of this environment, and how setup.py chooses what to build; the wheels themselves: tests/wheels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_toolkit import cuda_home

import rlhf_fast
from rlhf_fast import _extension, cuda

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "csrc"))  # csrc/building is no part of the installed package

from building import cuda as build  # noqa: E402
from building import sbom  # noqa: E402
from building.elf import CEILINGS, NEEDED, needed, newest_symbols, undefined  # noqa: E402

MODULES = sorted(Path(rlhf_fast.__file__).parent.glob("_c*.so"))
linux = pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs readelf on Linux")


@linux
@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.name.partition(".")[0])
def test_a_module_needs_the_systems_libraries_alone(module):
    """Neither torch, nor Python, nor CUDA: one module serves every torch, and loads where there is no driver."""
    assert needed(module) <= NEEDED
    assert not [s for s in undefined(module) if re.search(r"3c10|2at|aoti_|^cu[A-Z]|^cuda[A-Z]", s)]
    for family, version in newest_symbols(module).items():
        assert version <= CEILINGS.get(family, version), (family, version)


@linux
@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.name.partition(".")[0])
def test_a_module_is_hardened_and_tells_nothing_of_the_machine_that_built_it(module):
    assert not re.search(rb"/site-packages/|/include/python3|/csrc/", module.read_bytes())
    headers = subprocess.run(["readelf", "-lW", module], capture_output=True, text=True, check=True).stdout
    dynamic = subprocess.run(["readelf", "-dW", module], capture_output=True, text=True, check=True).stdout
    assert "GNU_RELRO" in headers and "BIND_NOW" in dynamic
    (stack,) = [line for line in headers.splitlines() if "GNU_STACK" in line]
    assert "RWE" not in stack


@pytest.fixture(params=cuda.MAJORS)
def library(request):
    module = _extension.load(f"_cuda{request.param}", cuda.ABI)
    if module is None:
        pytest.skip(f"no CUDA {request.param} library in this environment")
    return module


def test_the_library_holds_exactly_the_promised_architectures(library):
    cuobjdump = shutil.which("cuobjdump") or _tool_of_triton("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    assert images(cuobjdump, library.__file__) == promised(
        library.ARCHES, len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    )


def images(cuobjdump: str, module: str) -> list[str]:
    """Every image of a module: sm_90 for machine code, compute_90 for PTX."""
    found = []
    for kind, prefix in (("--list-elf", "sm_"), ("--list-ptx", "compute_")):
        listed = subprocess.run([cuobjdump, kind, module], capture_output=True, text=True, check=True).stdout
        found += [prefix + number for number in re.findall(r"\bsm_(\d+[af]?)\.", listed)]
    return sorted(found)


def promised(arches: list[str], sources: int) -> list[str]:
    made = build.arches(" ".join(arches))
    each = [f"sm_{a.code}" for a in made] + [f"compute_{a.code}" for a in made if a.ptx]
    return sorted(each * sources)


def _tool_of_triton(name: str) -> str | None:
    spec = __import__("importlib.util").util.find_spec("triton")
    found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec else None
    return str(found) if found and found.is_file() else None


def test_case_21_a_launch_without_a_driver_raises_the_documented_text(library):
    if torch.cuda.is_available() or Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a driver")
    x, out = torch.zeros(2, 3), torch.empty(2, 3)
    with pytest.raises(TypeError, match=r"gae: got 1 fields, expected \d+"):
        library.gae(x)
    with pytest.raises(
        RuntimeError, match=r"CUDA kernel 'gae': libcuda\.so\.1: .* there is no NVIDIA driver; CPU tensors"
    ):
        library.gae(x, x, None, None, None, out, out, 2, 3, 6, 1.0, 0.95, False, 0)
    assert "there is no NVIDIA driver" in library.check()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8.0", ["8.0"]),
        ("9.0;8.0 8.6", ["8.0", "8.6", "9.0"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0 9.0+PTX", ["9.0+PTX"]),
        ("9.0+PTX 9.0", ["9.0+PTX"]),
        ("9.0a;10.0f;12.0", ["9.0a", "10.0f", "12.0"]),
        ("Ampere+PTX;Hopper", ["8.0", "8.6+PTX", "9.0"]),
    ],
)
def test_architectures_have_torchs_syntax(text, found):
    assert [str(a) for a in build.arches(text)] == found


@pytest.mark.parametrize("text", ["9", "sm_90", "Fermi", "9.0+SASS", "8.0;;x", "9.0b"])
def test_a_word_that_is_no_architecture_is_refused(text):
    with pytest.raises(build.Impossible, match="is no architecture"):
        build.arches(text)


def configure(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py up to the choice of what to build."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "setup.py", *command], cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RLHF_FAST_CUDA": "11.3"}, "RLHF_FAST_CUDA=11.3: no compiler of CUDA 11.3 was found; found: "),
        ({"RLHF_FAST_CUDA": "new"}, "RLHF_FAST_CUDA=new: 'new' is no CUDA version"),
        ({"RLHF_FAST_CUDA": "13.0", "CXX": "", "PATH": "/none"}, "RLHF_FAST_CUDA=13.0, and no C++ compiler was found"),
    ],
)
def test_a_target_that_is_asked_for_and_cannot_be_built_is_an_error(environment, reason):
    done = configure("--name", **environment)
    assert done.returncode != 0 and reason in done.stderr


def test_an_architecture_that_the_compiler_lacks_is_an_error_when_cuda_is_asked_for():
    nvcc = next(iter(build._nvccs()), None)
    if nvcc is None or not list(build.SOURCES.glob("*.cu")):
        pytest.skip("needs nvcc and CUDA kernels")
    done = configure("--name", RLHF_FAST_CUDA=nvcc.version, TORCH_CUDA_ARCH_LIST="3.5")
    assert done.returncode != 0 and f"{nvcc.name} does not compile for 3.5 (TORCH_CUDA_ARCH_LIST)" in done.stderr
    done = configure("--name", RLHF_FAST_CUDA="auto", TORCH_CUDA_ARCH_LIST="3.5")
    assert done.returncode == 0 and "no CUDA kernels" in done.stderr
    twice = configure("--name", RLHF_FAST_CUDA=f"{nvcc.version},{nvcc.version}")
    assert twice.returncode != 0 and "one library per CUDA major" in twice.stderr


@pytest.fixture
def old_nvcc(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(cuda_home(tmp_path)))


def test_a_compiler_of_cuda_home_comes_first_and_serves_the_architectures_that_it_knows(old_nvcc, tmp_path):
    if not list(build.SOURCES.glob("*.cu")):
        pytest.skip("needs CUDA kernels")
    for setting in ("auto", "12.4", None):
        (target,) = build.targets(setting, None)
        assert (target.module, target.toolkit.name) == ("_cuda12", "nvcc 12.4.131")
        assert [str(a) for a in target.arches] == ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]
    assert build.targets("0", None) == []
    (target,) = build.targets("12.4", "8.0+PTX;9.0a")
    embedding = build.build(target, tmp_path / "images", lambda jobs: [job() for job in jobs]).read_text()
    packed = (tmp_path / "images" / "gae.fatbin").read_text().splitlines()
    assert "--compress-mode=speed" in packed  # the drivers of CUDA 12.0 read no other
    assert [re.sub(r"file=.*/", "file=", word) for word in packed if word.startswith("--image3")] == [
        "--image3=kind=elf,sm=80,file=gae.80.cubin",
        "--image3=kind=ptx,sm=80,file=gae.80.ptx",
        "--image3=kind=elf,sm=90a,file=gae.90a.cubin",
    ]
    assert "{80, 0, true}, {90, 'a', false}" in embedding and "kDriverNeeded = 12000" in embedding
    assert '"8.0+PTX 9.0a"' in embedding and embedding.count(".incbin") == len(list(build.SOURCES.glob("*.cu")))


def test_only_wheels_have_a_local_version():
    plain = configure("--version").stdout.split()[-1]
    assert plain == rlhf_fast.__version__
    assert configure("--version", RLHF_FAST_LOCAL_VERSION="cpu").stdout.split()[-1] == f"{plain}+cpu"


def test_the_bill_of_materials_names_sources_headers_and_compilers(monkeypatch):
    class Toolkit:
        name, version, build = "nvcc 13.0.88", "13.0", "13.0.88"

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    targets = [build.Target(Toolkit(), build.arches("8.0;9.0+PTX"))]
    made = sbom.document("0.1.0+cuda", [sys.executable], targets)
    assert made == sbom.document("0.1.0+cuda", [sys.executable], targets)
    assert made["metadata"]["timestamp"] == "1970-01-02T00:00:00+00:00"
    assert made["metadata"]["component"]["purl"] == "pkg:pypi/rlhf-fast@0.1.0%2Bcuda"
    parts = {part["bom-ref"]: part for part in made["components"]}
    assert {"csrc/bindings.cpp", "csrc/cuda/driver.cpp", "csrc/cpu/gae.cpp", "nvcc 13.0.88"} <= set(parts)
    assert parts["nvcc 13.0.88"]["properties"] == [{"name": "rlhf_fast:arches", "value": "8.0 9.0+PTX"}]
    assert re.fullmatch("[0-9a-f]{64}", parts["csrc/bindings.cpp"]["hashes"][0]["content"])
    assert made["dependencies"][0]["dependsOn"] == sorted(parts)
    without = {part["bom-ref"] for part in sbom.document("0.1.0", [sys.executable], [])["components"]}
    assert not [name for name in without if "cuda" in name] and "csrc/bindings.cpp" in without
    assert json.loads(json.dumps(made)) == made
