"""Builds the kernels with a C++ compiler and, where there is one, a CUDA compiler: no torch at build time.

Each csrc/cpu/<op>.cpp is compiled once for every instruction set that changes it, with flags of its own, and what chooses among them
once for the baseline; one pybind11 module holds them all. The CUDA kernels make one more module per CUDA major
(csrc/building/cuda.py), which needs no CUDA library: it launches through the driver. Without a compiler the package installs as pure
Python, with a notice.

Environment: CXX, CXXFLAGS, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST (torch's syntax), SOURCE_DATE_EPOCH;
RLHF_FAST_NO_NATIVE=1 (pure Python), RLHF_FAST_REQUIRE_NATIVE=1 (a failed build is an error),
RLHF_FAST_CUDA=auto (with the nvcc of CUDA_HOME or PATH, if any) | 0 | versions such as 13.0,12.9 (of which each must build),
RLHF_FAST_LOCAL_VERSION=cpu (version 0.1.0+cpu, of wheels alone).
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from building import cuda, sbom  # noqa: E402

CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"
BASELINE = ("dispatch", "parallel")
BF16 = (  # sources of RLHF_FAST_BF16_KERNELS (csrc/cpu/ops.h)
    "cached_attention", "lora_linear", "matmul", "packed_linear", "rms_norm", "rotary", "silu_mul", "token_logprobs",
    "varlen_attention",
)  # fmt: skip
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
    def run(self):
        for old in Path(self.build_lib).glob(
            "rlhf_fast/_c*.so"
        ):  # of an earlier build, which may not be wanted any more
            old.unlink()
        try:
            super().run()
        except CompileError as error:
            if flag("REQUIRE_NATIVE") or explicit_cuda():
                raise
            notice(f"the C++ kernels did not build:\n{error}")
            self.extensions = []

    def build_extensions(self):
        # Before the linked modules are looked for: one that did not build is none.
        self.extensions = [ext for ext in self.extensions if self.built(ext)]

    def built(self, ext):
        try:
            self.build_extension(ext)
        except CompileError as error:
            if ext.name == "rlhf_fast._cpu" or explicit_cuda():
                raise
            print(f"\n*** rlhf_fast: the CUDA kernels did not build, and are left out:\n{error}\n", file=sys.stderr)
            return False
        return True

    def build_extension(self, ext):
        self.module = Path(self.get_ext_fullpath(ext.name)).resolve()
        self.module.parent.mkdir(parents=True, exist_ok=True)
        self.objects = Path(self.build_temp).resolve() / ext.name.rpartition("._")[2]
        self.objects.mkdir(parents=True, exist_ok=True)
        self.cpu() if ext.name == "rlhf_fast._cpu" else self.cuda(ext.target)

    def cpu(self):
        gcc = "clang" not in compiler()[0]
        jobs = [(ROOT / "csrc" / "bindings.cpp", self.objects / "bindings.o", python_headers())]
        for source in sorted(CPU.glob("*.cpp")):
            if source.stem in BASELINE:
                jobs.append((source, self.objects / f"{source.stem}.o", ["-fopenmp"]))
                continue
            for isa, flags in ISAS.items():
                if isa == "avx512bf16" and source.stem not in BF16:
                    continue
                # Contraction off: a fused multiply-add in one place and not in another would make the variants drift apart.
                # Trapping off: nobody reads the floating-point flags, and their order would keep loops from vectorising.
                # Jump threading off (gcc): it splits the paths through choices, and the loop comes out as masks instead of selects.
                strict = ["-ffp-contract=off", "-fno-trapping-math", *(["-fno-thread-jumps"] if gcc else [])]
                extra = [f"-DRLHF_FAST_ISA={isa}", f"-DRLHF_FAST_ISA_{isa.upper()}", *strict, *flags]
                jobs.append((source, self.objects / f"{source.stem}.{isa}.o", extra))
        self.compile_and_link(jobs, ["-fopenmp"])

    def cuda(self, target):
        try:
            images = cuda.build(target, self.objects, in_parallel)
        except RuntimeError as error:
            raise CompileError(str(error)) from None
        module = [f"-DRLHF_FAST_CUDA_MODULE={target.module}", *python_headers()]
        jobs = [(ROOT / "csrc" / "bindings_cuda.cpp", self.objects / "bindings.o", module)]
        jobs += [(source, self.objects / f"{source.stem}.o", []) for source in (*sorted(CUDA.glob("*.cpp")), images)]
        self.compile_and_link(jobs, ["-Wl,--as-needed", "-ldl"])

    def compile_and_link(self, jobs, flags):
        """jobs: (source, object, flags of its own). The assertions of included headers would carry this machine's paths."""
        base = [
            *compiler(), "-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
            "-DNDEBUG", "-fstack-protector-strong", f"-I{ROOT / 'csrc'}", *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]  # fmt: skip
        in_parallel(
            [lambda job=job: run([*base, *job[2], "-c", str(job[0]), "-o", str(job[1])]) for job in jobs],
        )
        link = ["-shared", "-Wl,-z,relro,-z,now", "-s"] if sys.platform == "linux" else ["-shared"]
        run([*base, *(str(job[1]) for job in jobs), *link, *flags, "-o", str(self.module)])


class Wheel(bdist_wheel):
    def write_wheelfile(self, folder, *args, **kwargs):
        super().write_wheelfile(folder, *args, **kwargs)
        extensions = self.distribution.ext_modules or []
        targets = [ext.target for ext in extensions if hasattr(ext, "target")]
        sbom.write(Path(folder), self.distribution.get_version(), compiler() if extensions else None, targets)


def python_headers():
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def in_parallel(jobs):
    with ThreadPoolExecutor(max_workers=max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))) as pool:
        list(pool.map(lambda job: job(), jobs))


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


def explicit_cuda():
    return os.environ.get("RLHF_FAST_CUDA", "auto").strip().lower() not in ("", "auto", *cuda.OFF)


def extensions():
    """The native modules, or nothing, so that a wheel without them is tagged as pure Python."""
    if flag("NO_NATIVE"):
        if flag("REQUIRE_NATIVE"):
            raise SystemExit("RLHF_FAST_NO_NATIVE and RLHF_FAST_REQUIRE_NATIVE contradict each other")
        return []
    if compiler() is None:
        lacking = "no C++ compiler was found (CXX, g++, clang++, c++)"
        if flag("REQUIRE_NATIVE"):
            raise SystemExit(f"RLHF_FAST_REQUIRE_NATIVE=1, and {lacking}")
        if explicit_cuda():
            raise SystemExit(f"RLHF_FAST_CUDA={os.environ['RLHF_FAST_CUDA']}, and {lacking}")
        notice(f"{lacking}.")
        return []
    return [Extension("rlhf_fast._cpu", sources=[]), *cuda_extensions()]


def cuda_extensions():
    try:
        targets = cuda.targets(os.environ.get("RLHF_FAST_CUDA"), os.environ.get("TORCH_CUDA_ARCH_LIST"))
    except (cuda.Impossible, RuntimeError) as error:
        if explicit_cuda():
            raise SystemExit(f"RLHF_FAST_CUDA={os.environ['RLHF_FAST_CUDA']}: {error}") from None
        print(f"\n*** rlhf_fast: no CUDA kernels: {error}\n", file=sys.stderr)
        return []
    made = []
    for target in targets:
        extension = Extension(f"rlhf_fast.{target.module}", sources=[])
        extension.target = target
        made.append(extension)
    return made


def version():
    """That of the package; a local part says which wheel it is, and a source archive is none."""
    number = re.search(r'__version__ = "(.+)"', (ROOT / "rlhf_fast" / "_version.py").read_text(encoding="utf-8"))[1]
    local = os.environ.get("RLHF_FAST_LOCAL_VERSION")
    return f"{number}+{local}" if local and "sdist" not in sys.argv else number


setup(
    version=version(),
    packages=[
        *find_packages(include=["rlhf_fast", "rlhf_fast.*"]),
        *("rlhf_fast." + name for name in find_namespace_packages(include=["kernels*"], exclude=["*.__pycache__"])),
    ],
    package_dir={"rlhf_fast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
