"""csrc/cuda/driver.cpp against a driver of the tests (tests/driver/libcuda.cpp), which prints what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "driver"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs calls of main.cpp under a driver ("new", "old", "none"); returns the lines printed."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("driver")

    def compile_(target: Path, *arguments: object) -> None:
        target.parent.mkdir(exist_ok=True)
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT / 'csrc'}",
            *arguments,
            "-o",
            target,
        ]
        subprocess.run(list(map(str, command)), check=True)

    compile_(folder / "main", HERE / "main.cpp", ROOT / "csrc" / "cuda" / "driver.cpp", "-pthread", "-ldl")
    compile_(folder / "new" / "libcuda.so.1", HERE / "libcuda.cpp", "-shared", "-fPIC")
    compile_(folder / "old" / "libcuda.so.1", HERE / "libcuda.cpp", "-shared", "-fPIC", "-DOLD")

    def run(*calls: str, which: str = "new", **settings: object) -> list[str]:
        env = {**os.environ, "LD_LIBRARY_PATH": str(folder / which)}
        env |= {f"FAKE_{name}": str(value) for name, value in settings.items()}
        done = subprocess.run([folder / "main", *calls], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_case_21_without_a_driver_a_launch_says_so_and_how_to_go_on(driver):
    if find_library("cuda"):
        pytest.skip("this machine has a driver")
    launched, checked, count, counted = driver("launch:one:1:0:0", "check", "multiprocessors", which="none")
    for line in (launched, checked):
        assert "libcuda.so.1: cannot open shared object file" in line
        assert "there is no NVIDIA driver; CPU tensors go on working" in line and "525 or newer (CUDA 12.0)" in line
    assert (count, counted) == ("multiprocessors 1", "multiprocessors -> ok")


def test_a_launch_without_blocks_needs_no_driver(driver):
    assert driver("launch:one:0:0:0", which="none") == ["launch -> ok"]


@pytest.mark.parametrize("which", ["new", "old"])
def test_case_21_an_old_driver_is_named_with_the_needed_one(driver, which):
    """By its number, or by the functions that it lacks."""
    (line,) = driver("launch:one:1:0:0", which=which, VERSION=11080 if which == "new" else 12000)
    found = "11.8" if which == "new" else "12.0"
    assert f"too old: it supports CUDA {found}" in line and "need version 525 or newer (CUDA 12.0)" in line


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120, 121, 130])
def test_an_image_serves_its_architecture_and_later_ones_of_its_family(driver, capability):
    """9.0a serves 9.0 alone, and PTX everything that is newer."""
    assert driver("check", CAPABILITY=capability)[-1] == "check -> ok"


@pytest.mark.parametrize("capability", [75, 91, 110])
def test_case_22_a_gpu_without_an_image_is_named_with_those_that_have_one(driver, capability):
    lines = driver("launch:one:1:0:0", CAPABILITY=capability)
    named = f"{capability // 10}.{capability % 10}"
    assert f"compute capability {named}, and the kernels are built for 8.0 9.0a 10.0f 12.0+PTX" in lines[-1]
    assert f"TORCH_CUDA_ARCH_LIST={named}" in lines[-1]
    assert not any("cuLaunchKernel" in line or "cuLibraryLoadData" in line for line in lines)


def test_a_launch_reaches_the_driver_as_it_was_asked_for(driver):
    lines = driver("launch:one:7:0:abc0", "launch:three:7:50000:0", "multiprocessors")
    launches = [line for line in lines if line.startswith("cuLaunchKernel")]
    assert launches[0] == "cuLaunchKernel one grid=7,2,3 block=256,1,1 shared=0 stream=0xabc0 argument=42 mode=0"
    assert launches[1].startswith("cuLaunchKernel three grid=7,2,3 block=256,1,1 shared=50000")
    assert "cuKernelSetAttribute 8=50000 three 0" in lines  # more than the 48 KiB a kernel has unasked
    assert "multiprocessors 132" in lines and lines.count("launch -> ok") == 2


def test_images_are_loaded_once_and_may_be_loaded_while_a_graph_is_captured(driver):
    lines = driver("threads:8:three", "threads:8:one")
    loads = [line for line in lines if line.startswith("cuLibraryLoadData")]
    assert loads == ["cuLibraryLoadData one two mode=2", "cuLibraryLoadData three mode=2"]  # 2: relaxed
    assert [line for line in lines if "GetFunction" in line] == [
        f"cuKernelGetFunction {n} mode=2" for n in ("three", "one")
    ]
    launches = [line for line in lines if line.startswith("cuLaunchKernel")]
    assert len(launches) == 800 and all(line.endswith("mode=0") for line in launches)


def test_a_thread_without_a_context_gets_that_of_its_stream_or_of_the_first_device(driver):
    lines = driver("launch:one:1:0:0", NO_CONTEXT=1)
    assert lines[1:3] == ["cuDevicePrimaryCtxRetain 0", "cuCtxSetCurrent 0x1000"] and lines[-1] == "launch -> ok"
    lines = driver("launch:one:1:0:abc0", "launch:one:1:0:abc0", NO_CONTEXT=1)
    assert (
        lines[1:3] == ["cuStreamGetCtx 0xabc0", "cuCtxSetCurrent 0x2000"] and lines.count("cuStreamGetCtx 0xabc0") == 1
    )


def test_every_device_loads_its_kernels(driver):
    assert driver("launch:one:1:0:0", DEVICE=70)[-1] == "launch -> ok"  # more devices than are kept track of


def test_errors_of_the_driver_keep_their_names(driver):
    assert driver("launch:four:1:0:0")[-1] == "launch -> no device image of this library has such a kernel"
    assert driver("launch:one:1:0:0", FAIL="cuInit=100")[-1] == "launch -> CUDA error 100"
    lines = driver("launch:one:1:0:0", FAIL="cuLaunchKernel=700")
    assert lines[-1] == "launch -> CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"
    text = driver("launch:one:1:0:0", FAIL="cuKernelGetFunction=222", VERSION=12040)[-1]
    assert text.startswith("launch -> CUDA_ERROR_UNSUPPORTED_PTX_VERSION; the kernels are built for 8.0 9.0a")
    assert text.endswith("by CUDA 13.0, the driver supports CUDA 12.4")


def test_after_a_failed_load_the_next_launch_goes_on(driver):
    calls = ["launch:three:1:0:0"] * 3
    lines = driver(*calls, FAIL="cuLibraryLoadData=2x1")
    assert [line for line in lines if line.startswith("launch")] == [
        "launch -> CUDA error 2",
        "launch -> ok",
        "launch -> ok",
    ]
    assert [line for line in lines if "LoadData" in line] == [
        "cuLibraryLoadData one two mode=2",
        "cuLibraryLoadData one two mode=2",
        "cuLibraryLoadData three mode=2",
    ]
