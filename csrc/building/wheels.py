"""`make wheels`: the source archive, a wheel without and one with CUDA kernels, each in a folder of its own under dist/.

The CUDA compilers come out of pip into .cache, pinned by hash in cuda-<version>.txt. The wheels are built from the source archive,
so that it is known to be complete, and with SOURCE_DATE_EPOCH from the last commit, so that a second run gives the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from building.cuda import ROOT, TOOLKITS

FLAVOURS = {"cpu": "0", "cuda": "13.0,12.9"}
"""Folder under dist and its RLHF_FAST_CUDA."""

PROVIDED = {"libgomp.so.1"}
"""Libraries outside of every manylinux standard that torch, which the package imports first, brings under the same name."""


def bring_toolkits() -> None:
    for pins in sorted((ROOT / "csrc" / "building").glob("cuda-*.txt")):
        folder, mark = TOOLKITS / pins.stem, TOOLKITS / pins.stem / ".pins"
        if mark.is_file() and mark.read_text() == pins.read_text():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        run([*PIP, "install", "--no-deps", "--require-hashes", "--target", folder, "-r", pins])
        mark.write_text(pins.read_text())


def build_sdist(into: Path) -> Path:
    for old in into.glob("*.tar.gz"):
        old.unlink()
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", into, ROOT])
    (made,) = into.glob("*.tar.gz")
    return made


def build_wheel(sdist: Path, flavour: str, into: Path) -> Path:
    """Builds in a temporary folder, and tags the wheel with the oldest manylinux that it fits."""
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(sdist) as archive:
            archive.extractall(temporary, filter="data")
        (source,) = Path(temporary).iterdir()
        settings = {
            "RLHF_FAST_CUDA": FLAVOURS[flavour],
            "RLHF_FAST_REQUIRE_NATIVE": "1",
            "RLHF_FAST_TOOLKITS": str(TOOLKITS),
        }
        if "CUDA_HOME" not in os.environ:  # rather than an nvcc of this machine
            settings["CUDA_HOME"] = str(TOOLKITS / "cuda-13.0" / "nvidia" / "cu13")
        plain = Path(temporary) / "wheel"
        run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", plain, source], **settings)
        (wheel,) = plain.glob("*.whl")
        tagged = run([sys.executable, "-m", "wheel", "tags", "--platform-tag", platform_tag(wheel), wheel]).split()[-1]
        return Path(shutil.copy(plain / tagged, into))


def platform_tag(wheel: Path) -> str:
    """What auditwheel finds the symbols of the compiled modules to be consistent with (PEP 600)."""
    shown = run([sys.executable, "-m", "auditwheel", "show", "--json", wheel])
    found = json.loads(shown[shown.index("{") :])
    foreign = set(found["external_libs"]) - PROVIDED
    if foreign or not found["sym_tag"].startswith("manylinux"):
        raise SystemExit(f"no manylinux tag fits {wheel.name}: {shown}")
    return found["sym_tag"]


def run(command: list[object], **settings: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def describe(path: Path, seconds: float) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{os.path.relpath(path)}  {path.stat().st_size:,} bytes  {seconds:.0f} s  sha256 {digest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make wheels", description=__doc__.partition("\n")[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--only", choices=sorted(FLAVOURS), action="append")
    options = parser.parse_args()
    if "SOURCE_DATE_EPOCH" not in os.environ:
        os.environ["SOURCE_DATE_EPOCH"] = run(["git", "-C", ROOT, "log", "-1", "--format=%ct"]).strip()
    dist = options.dist.resolve()
    dist.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    sdist = build_sdist(dist)
    describe(sdist, time.monotonic() - started)
    flavours = options.only or FLAVOURS
    if "cuda" in flavours:
        bring_toolkits()
    for flavour in flavours:
        started = time.monotonic()
        wheel = build_wheel(sdist, flavour, dist / flavour)
        describe(wheel, time.monotonic() - started)


if __name__ == "__main__":
    main()
