"""Device images: every csrc/cuda/*.cu for every architecture, one fat binary per file, embedded in one library per CUDA major.

Two compilers make the same images. nvcc comes with a toolkit. NVRTC is a library that compiles in this process and needs no more
of its toolkit, not even headers (csrc/common/portable.h): so CUDA 12 can be had from the package index, which has no nvcc 12.
Neither needs a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ROOT / "csrc" / "cuda"
TOOLKITS = Path(os.environ.get("RLHF_FAST_TOOLKITS") or ROOT / ".cache")
"""Holds cuda-<version> folders: toolkits out of pip, which `make wheels` brings."""

DEFAULT_ARCHES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"
"""Of which each compiler takes those that it knows, with PTX for the last."""

NAMED_ARCHES = {"turing": "7.5", "ampere": "8.0 8.6", "ada": "8.9", "hopper": "9.0", "blackwell": "10.0 10.3 12.0 12.1"}
DRIVERS = {12: "525", 13: "580"}
"""The oldest driver of each CUDA major (CUDA Compatibility guide, table "minimum required driver version")."""

OFF = ("0", "off", "no", "false")
"""Values of RLHF_FAST_CUDA for a build without CUDA kernels."""

COMPRESSION = {12: "speed", 13: "size"}
"""Of a fat binary: drivers before 550 read the first alone."""


class Impossible(Exception):
    """A target that cannot be built here; the text says what is missing."""


@dataclass(frozen=True, order=True)
class Arch:
    """An architecture: 90 "" is sm_90, 90 "a" is sm_90a; with `ptx` the driver can compile for later ones."""

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def code(self) -> str:
        return f"{self.number}{self.suffix}"

    def __str__(self) -> str:
        return f"{self.number // 10}.{self.number % 10}{self.suffix}{'+PTX' if self.ptx else ''}"


def arches(text: str) -> tuple[Arch, ...]:
    """From torch's syntax: numbers or names between spaces or semicolons, each with an optional +PTX ("8.0;9.0a;Ada+PTX")."""
    found: dict[str, Arch] = {}
    for word in re.split(r"[;,\s]+", text.strip()):
        name, plus, _ = word.partition("+PTX")
        numbers = NAMED_ARCHES.get(name.lower(), name).split()
        for i, number in enumerate(numbers):
            match = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)", number)
            if not match:
                raise Impossible(f"'{word}' is no architecture (as in TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX')")
            ptx = bool(plus) and i == len(numbers) - 1
            arch = Arch(10 * int(match[1]) + int(match[2]), match[3], ptx or found.get(number, Arch(0)).ptx)
            found[number] = arch
    return tuple(sorted(found.values()))


class Nvcc:
    """A toolkit with a compiler driver."""

    def __init__(self, command: Path) -> None:
        self.command = command
        self.version = _search(r"release (\d+\.\d+)", _output([command, "--version"]), command)
        self.build = _search(r"\bV([\d.]+)", _output([command, "--version"]), command)
        home = _output([command, "--dryrun", "-cubin", "none.cu"], check=False)  # a wrapper lies elsewhere
        self.fatbinary = Path(_search(r"_HERE_=(.+)", home, command)) / "fatbinary"
        self.name = f"nvcc {self.build}"

    def supported(self) -> set[int]:
        return {int(n) for n in re.findall(r"compute_(\d+)\b", _output([self.command, "--list-gpu-arch"]))}

    def compile(self, source: Path, arch: Arch, cubin: Path, ptx: Path | None) -> None:
        """To machine code, and to PTX where a path is given."""
        flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-frandom-seed={source.stem}"]
        if ptx is not None:
            _output([self.command, "-ptx", f"-arch=compute_{arch.code}", *flags, source, "-o", ptx])
            # Names without linkage carry a hash of the source's full path, whatever the seed.
            text = ptx.read_text()
            for path_hash in set(re.findall(rf"_INTERNAL_([0-9a-f]{{8}})_\d+_{source.stem}_cu", text)):
                text = text.replace(f"_{path_hash}_", f"_{zlib.crc32(source.stem.encode()):08x}_")
            ptx.write_text(text)
        _output([self.command, "-cubin", f"-arch=sm_{arch.code}", *flags, ptx or source, "-o", cubin])


class Nvrtc:
    """The run-time compiler of a toolkit, called at build time."""

    def __init__(self, folder: Path) -> None:
        library = next(folder.glob("libnvrtc.so.*"))
        for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))  # the library opens it by name
        self.library = ctypes.CDLL(str(library))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = self.build = f"{major.value}.{minor.value}"
        for info in folder.parents[2].glob("nvidia_cuda_nvrtc*.dist-info"):
            self.build = info.name.removesuffix(".dist-info").partition("-")[2]
        self.name = f"NVRTC {self.build}"
        self.fatbinary = _fatbinary()

    def supported(self) -> set[int]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return set(numbers)

    def compile(self, source: Path, arch: Arch, cubin: Path, ptx: Path | None) -> None:
        """To machine code, and to PTX where a path is given."""
        # A lambda in a device function is one of the device too, which nvcc knows by itself.
        flags = [f"--gpu-architecture=sm_{arch.code}", "-std=c++17", "-default-device", f"-I{ROOT / 'csrc'}"]
        options = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None
        )
        try:
            status = self.library.nvrtcCompileProgram(program, len(flags), options)
            if status:
                log = self._result(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
                raise RuntimeError(f"{self.name} on {source.name} for {arch}:\n{log}")
            cubin.write_bytes(self._result(program, "nvrtcGetCUBIN"))
            if ptx is not None:
                ptx.write_bytes(self._result(program, "nvrtcGetPTX").rstrip(b"\0"))
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _result(self, program: ctypes.c_void_p, name: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(name, program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {self.library.nvrtcGetErrorString(status).decode()}")


Toolkit = Nvcc | Nvrtc


@dataclass(frozen=True)
class Target:
    """One library: its compiler and what it is compiled for."""

    toolkit: Toolkit
    arches: tuple[Arch, ...]

    @property
    def major(self) -> int:
        return int(self.toolkit.version.split(".")[0])

    @property
    def module(self) -> str:
        return f"_cuda{self.major}"


def targets(setting: str | None, arch_list: str | None) -> list[Target]:
    """The libraries to build, from RLHF_FAST_CUDA ("auto", "0" or versions between commas) and TORCH_CUDA_ARCH_LIST.

    Raises Impossible for a version that cannot be built, and under "auto" for a compiler that cannot be used; "auto" without
    one is no target.
    """
    setting = (setting or "auto").strip().lower()
    if setting in OFF:
        return []
    sources = sorted(SOURCES.glob("*.cu"))
    if setting == "auto":
        if not sources or (found := next(_nvccs(), None)) is None:
            return []
        return [_target(found, arch_list)]
    made = [_target(_toolkit(version), arch_list) for version in re.split(r"[,\s]+", setting) if version]
    majors = [target.major for target in made]
    if len(set(majors)) < len(majors):
        raise Impossible("there is one library per CUDA major; name one version of each")
    if not sources:
        raise Impossible("this checkout has no CUDA kernels (csrc/cuda/*.cu)")
    return made


def _target(toolkit: Toolkit, arch_list: str | None) -> Target:
    major = int(toolkit.version.split(".")[0])
    if major not in DRIVERS:
        raise Impossible(
            f"{toolkit.name}: CUDA {toolkit.version} is not supported, only {' and '.join(map(str, DRIVERS))}"
        )
    known = toolkit.supported()
    if not arch_list:
        *others, last = [a for a in arches(DEFAULT_ARCHES) if a.number in known]
        return Target(toolkit, (*others, dataclasses.replace(last, ptx=True)))
    wanted = arches(arch_list)
    lacking = [str(a) for a in wanted if a.number not in known]
    if lacking:
        raise Impossible(f"{toolkit.name} does not compile for {' '.join(lacking)} (TORCH_CUDA_ARCH_LIST)")
    return Target(toolkit, wanted)


def _toolkit(version: str) -> Toolkit:
    if not re.fullmatch(r"\d+\.\d+", version):
        raise Impossible(f"'{version}' is no CUDA version (as in RLHF_FAST_CUDA=13.0,12.9)")
    seen = []
    for nvcc in _nvccs():
        if nvcc.version == version:
            return nvcc
        seen.append(f"{nvcc.name} ({nvcc.command})")
    for folder in _pip_folders("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib"):
        if any(folder.glob("libnvrtc.so.*")):
            nvrtc = Nvrtc(folder)
            if nvrtc.version == version:
                return nvrtc
            seen.append(f"{nvrtc.name} ({folder})")
    raise Impossible(
        f"no compiler of CUDA {version} was found; found: {', '.join(seen) or 'none'}. Looked for nvcc in CUDA_HOME and PATH, "
        f"and for nvcc and NVRTC out of pip in {TOOLKITS}/cuda-* and among the installed packages"
    )


def _nvccs() -> Iterator[Nvcc]:
    """Every nvcc, the most explicit one first."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if os.environ.get("CUDA_HOME") else []
    if on_path := shutil.which("nvcc"):
        places.append(Path(on_path))
    places += [folder / "nvcc" for folder in _pip_folders("nvidia/cu13/bin")]
    for place in dict.fromkeys(places):
        if place.is_file():
            yield Nvcc(place)


def _pip_folders(*inside: str) -> Iterator[Path]:
    for base in (*sorted(TOOLKITS.glob("cuda-*")), *map(Path, dict.fromkeys(p for p in sys.path if p))):
        for name in inside:
            if (base / name).is_dir():
                yield base / name


def _fatbinary() -> Path:
    """The packer, which comes with nvcc alone; one of another version writes the same format."""
    if (nvcc := next(_nvccs(), None)) is None:
        raise Impossible(
            "NVRTC's output is packed by the tool `fatbinary` of an nvcc (any version), and none was found"
        )
    return nvcc.fatbinary


def build(target: Target, folder: Path, in_parallel: Callable[[Sequence[Callable[[], None]]], None]) -> Path:
    """Compiles and packs all images, and writes the C++ file that embeds them; returns its path.

    in_parallel runs independent jobs and waits for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(SOURCES.glob("*.cu"))
    jobs: list[Callable[[], None]] = []
    images: dict[Path, list[tuple[str, Arch, Path]]] = {source: [] for source in sources}
    for source in sources:
        for arch in target.arches:
            cubin = folder / f"{source.stem}.{arch.code}.cubin"
            ptx = cubin.with_suffix(".ptx") if arch.ptx else None
            jobs.append(functools.partial(target.toolkit.compile, source, arch, cubin, ptx))
            images[source] += [("elf", arch, cubin)] + ([("ptx", arch, ptx)] if ptx else [])
    in_parallel(jobs)
    for source, made in images.items():
        listed = [f"--image3=kind={kind},sm={arch.code},file={path}" for kind, arch, path in made]
        compression = ["-compress-all", f"--compress-mode={COMPRESSION[target.major]}"]
        _output([target.toolkit.fatbinary, "-64", *compression, *listed, f"--create={folder / source.stem}.fatbin"])
    embedding = folder / "images.cpp"
    embedding.write_text(_embedding(target, [source.stem for source in sources], folder))
    return embedding


def _embedding(target: Target, names: Sequence[str], folder: Path) -> str:
    # .nv_fatbin is where cuobjdump looks.
    blobs = "".join(
        f'    ".balign 16\\n" "rlhf_fast_image_{name}:\\n" ".incbin \\"{folder / name}.fatbin\\"\\n"\n'
        for name in names
    )
    declared = "".join(
        f'extern "C" __attribute__((visibility("hidden"))) const char rlhf_fast_image_{n}[];\n' for n in names
    )
    rows = [f'    {{"{n}", rlhf_fast_image_{n}}},\n' for n in names]
    suffix = {"": "0", "a": "'a'", "f": "'f'"}
    listed = [f"{{{a.number}, {suffix[a.suffix]}, {str(a.ptx).lower()}}}" for a in target.arches]
    return f"""// Written by csrc/building/cuda.py.
#include "cuda/images.h"

__asm__(
    ".pushsection .nv_fatbin,\\"a\\",@progbits\\n"
{blobs}    ".popsection\\n");
{declared}
namespace rlhf_fast::cuda {{
const Arch kArches[] = {{{", ".join(listed)}}};
const int kArchCount = {len(listed)};
const Image kImages[] = {{
{"".join(rows)}}};
const int kImageCount = {len(rows)};
const char kArchList[] = "{" ".join(map(str, target.arches))}";
const char kToolkit[] = "{target.toolkit.version}";
const int kDriverNeeded = {1000 * target.major};
const char kDriverName[] = "{DRIVERS[target.major]}";
}}  // namespace rlhf_fast::cuda
"""


def _output(command: Sequence[object], check: bool = True) -> str:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{words[0]}: {error}") from None
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _search(pattern: str, text: str, command: object) -> str:
    match = re.search(pattern, text)
    if not match:
        raise Impossible(f"{command}: its output is not that of nvcc: {text[:200]!r}")
    return match[1].strip()
