"""Builds the CPU kernels with a C++ compiler alone: no torch and no CUDA toolkit at build time.

Each csrc/cpu/<op>.cpp is compiled once per instruction set with flags of its own and once for the baseline, and one pybind11
module holds them all. Without a compiler the package installs as pure Python, with a notice.

Environment: CXX, CXXFLAGS, MAX_JOBS, RLHF_FAST_NO_NATIVE=1 (pure Python), RLHF_FAST_REQUIRE_NATIVE=1 (a failed build is an error).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPU = ROOT / "csrc" / "cpu"
BASELINE = ("dispatch", "parallel")
ISAS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx2",
        "-mfma",
        "-mf16c",
        *(f"-mavx512{x}" for x in ("f", "dq", "bw", "vl")),
        "-mprefer-vector-width=512",
    ],
}
ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"scalar": []}


def flag(name):
    return os.environ.get(f"RLHF_FAST_{name}", "0").lower() not in ("", "0", "false", "no")


def compiler():
    """The C++ compiler's command line, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    return None


class BuildKernels(build_ext):
    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve() / "cpu"
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        base = [
            *compiler(), "-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
            "-fstack-protector-strong", f"-I{ROOT / 'csrc'}", *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]  # fmt: skip
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        gcc = "clang" not in compiler()[0]
        jobs = [(ROOT / "csrc" / "bindings.cpp", objects / "bindings.o", python)]
        for source in sorted(CPU.glob("*.cpp")):
            if source.stem in BASELINE:
                jobs.append((source, objects / f"{source.stem}.o", ["-fopenmp"]))
                continue
            for isa, flags in ISAS.items():
                # Contraction off: a fused multiply-add in one place and not in another would make the variants drift apart.
                # Trapping off: nobody reads the floating-point flags, and their order would keep loops from vectorising.
                # Jump threading off (gcc): it splits the paths through choices, and the loop comes out as masks instead of selects.
                strict = ["-ffp-contract=off", "-fno-trapping-math", *(["-fno-thread-jumps"] if gcc else [])]
                extra = [f"-DRLHF_FAST_ISA={isa}", f"-DRLHF_FAST_ISA_{isa.upper()}", *strict, *flags]
                jobs.append((source, objects / f"{source.stem}.{isa}.o", extra))
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            list(pool.map(lambda job: run([*base, *job[2], "-c", str(job[0]), "-o", str(job[1])]), jobs))
        link = ["-shared", "-fopenmp", "-Wl,-z,relro,-z,now", "-s"] if sys.platform == "linux" else ["-shared"]
        run([*base, *(str(job[1]) for job in jobs), *link, "-o", str(target)])

    def run(self):
        try:
            super().run()
        except CompileError as error:
            if flag("REQUIRE_NATIVE"):
                raise
            notice(f"the C++ kernels did not build:\n{error}")
            self.extensions = []


def run(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


def notice(why):
    print(
        f"\n*** rlhf_fast: {why}\n*** Installing pure Python: every op runs on its PyTorch reference, correct but slow. "
        "Install a C++ compiler and reinstall to get the kernels.\n",
        file=sys.stderr,
    )


def extensions():
    """The native module, or nothing, so that a wheel without it is tagged as pure Python."""
    if flag("NO_NATIVE"):
        if flag("REQUIRE_NATIVE"):
            raise SystemExit("RLHF_FAST_NO_NATIVE and RLHF_FAST_REQUIRE_NATIVE contradict each other")
        return []
    if compiler() is None:
        if flag("REQUIRE_NATIVE"):
            raise SystemExit("RLHF_FAST_REQUIRE_NATIVE=1, and no C++ compiler was found (CXX, g++, clang++, c++)")
        notice("no C++ compiler was found (CXX, g++, clang++, c++).")
        return []
    return [Extension("rlhf_fast._cpu", sources=[])]


setup(
    packages=[*find_packages(include=["rlhf_fast", "rlhf_fast.*"]), "rlhf_fast.kernels"],
    package_dir={"rlhf_fast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)
