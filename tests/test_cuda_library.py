"""Which CUDA library is loaded, and why none is: rlhf_fast/cuda/__init__.py with modules that stand for CUDA 98 and 99."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_fast
from rlhf_fast import cuda
from rlhf_fast.doctor import report

WORKING = f"ABI = {cuda.ABI}\nTOOLKIT = '99.1'\nARCHES = ['8.0', '9.0+PTX']\ncheck = lambda: 'no driver'\nscale = lambda *a: a\n"


@pytest.fixture
def libraries(monkeypatch, tmp_path):
    """A folder of modules beside those of the package, torch of CUDA 99, and nothing loaded yet."""

    def forget() -> None:
        cuda.load.cache_clear()
        cuda.kernel.cache_clear()
        for name in [n for n in sys.modules if n.startswith(("rlhf_fast._cuda98", "rlhf_fast._cuda99"))]:
            del sys.modules[name]

    monkeypatch.setattr(rlhf_fast, "__path__", [str(tmp_path), *rlhf_fast.__path__])
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "MAJORS", (98, 99))
    monkeypatch.delenv("RLHF_FAST_CUDA_LIB", raising=False)
    forget()
    yield tmp_path
    forget()


def test_the_library_of_torchs_cuda_major_is_loaded(libraries):
    (libraries / "_cuda98.py").write_text("raise AssertionError('of another major')")
    (libraries / "_cuda99.py").write_text(WORKING)
    assert cuda.missing() is None and cuda.load()[0].__name__ == "rlhf_fast._cuda99"
    assert cuda.kernel("scale")(1, 2) == (1, 2)


@pytest.mark.parametrize(
    ("version", "hip", "reason"),
    [
        (None, None, "this torch is built for the CPU alone"),
        (None, "6.4", "this torch is built for ROCm 6.4"),
        ("99.1", None, "rlhf_fast._cuda99 was not built (no CUDA compiler at install time?)"),
    ],
)
def test_a_missing_library_is_missing_with_a_reason(libraries, monkeypatch, version, hip, reason, recwarn):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert cuda.missing() == reason and not recwarn
    with pytest.raises(RuntimeError, match="CUDA kernel 'scale' is not available: "):
        cuda.kernel("scale")


def test_the_libraries_of_other_majors_are_named(libraries):
    (libraries / "_cuda98.py").write_text(WORKING)
    assert cuda.missing() == (
        "rlhf_fast._cuda99 was not built, and torch is of CUDA 99.1; built: CUDA 98 (RLHF_FAST_CUDA_LIB=98 forces it)"
    )


def test_a_major_or_a_file_can_be_forced(libraries, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (libraries / "_cuda98.py").write_text(WORKING)
    for forced in ("98", str(libraries / "_cuda98.py")):
        monkeypatch.setenv("RLHF_FAST_CUDA_LIB", forced)
        cuda.load.cache_clear()
        assert cuda.missing() is None and cuda.load()[0].TOOLKIT == "99.1"
    for forced, reason in (("97", "rlhf_fast._cuda97 was not built"), ("/none/_cuda98.so", "there is no such file")):
        monkeypatch.setenv("RLHF_FAST_CUDA_LIB", forced)
        cuda.load.cache_clear()
        assert cuda.missing().startswith(f"RLHF_FAST_CUDA_LIB={forced}: {reason}")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("other ABI", "has ABI version 999, this package needs"),
        ("raises", "does not load: no such symbol"),
        ("cut off", "is cut off"),
        ("text", "is no library"),
    ],
)
def test_case_20_a_broken_library_falls_back_with_one_warning(libraries, damage, reason):
    if damage in ("cut off", "text"):
        import importlib.machinery

        whole = Path(sys.modules["torch._C"].__file__).read_bytes()
        file = libraries / f"_cuda99{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut off" else b"<html>not found</html>" * 9)
    else:
        text = "ABI = 999\n" if damage == "other ABI" else "raise ImportError('no such symbol')\n"
        (libraries / "_cuda99.py").write_text(text)
    with pytest.warns(RuntimeWarning, match="falling back to other kernels") as warned:
        assert reason in cuda.missing()
        assert reason in cuda.missing()
    assert len(warned) == 1


def test_the_doctor_lists_the_libraries_their_architectures_and_reasons(libraries):
    (libraries / "_cuda99.py").write_text(WORKING)
    (libraries / "_cuda98.py").write_text("ABI = 999\n")
    text = report()
    assert "CUDA 99       built by CUDA 99.1 for 8.0 9.0+PTX" in text
    assert "CUDA 98       rlhf_fast._cuda98 has ABI version 999" in text
    assert "in use        rlhf_fast._cuda99, and cannot launch: no driver" in text


def test_importing_the_package_opens_no_driver_and_no_cuda_library():
    code = "import rlhf_fast, sys; rlhf_fast.backends(); print('libcuda.so' in open('/proc/self/maps').read())"
    code += "; print([m for m in sys.modules if m.startswith('rlhf_fast._cuda')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    if torch.version.cuda is None:  # another torch opens the driver by itself
        assert out == ["False", "[]"]
    else:
        assert out[0] in ("True", "False")
