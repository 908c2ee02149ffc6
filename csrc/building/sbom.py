"""The bill of materials of a wheel: CycloneDX 1.6 (ECMA-424), in .dist-info/sboms as PEP 770 has it.

It says what the compiled modules were made from: sources by hash, the headers compiled in, the compilers. It holds no time but
SOURCE_DATE_EPOCH and no random number, so that two builds of one source give the same wheel.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from building.cuda import ROOT, Target

NAME = "rlhf-fast.cdx.json"


def write(dist_info: Path, version: str, compiler: Sequence[str] | None, targets: Sequence[Target]) -> None:
    """compiler: command line of the C++ compiler, or None for a wheel of pure Python."""
    folder = dist_info / "sboms"
    folder.mkdir(exist_ok=True)
    text = json.dumps(document(version, compiler, targets), indent=1, sort_keys=True)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def document(version: str, compiler: Sequence[str] | None, targets: Sequence[Target]) -> dict[str, Any]:
    purl = f"pkg:pypi/rlhf-fast@{version.replace('+', '%2B')}"
    parts = [_package("setuptools", "excluded")]
    if compiler is not None:
        parts += [_package("pybind11", "required"), _tool("c++ compiler", _compiler_version(compiler))]
        parts += [_tool("python headers", platform.python_version())]
        parts += [_tool(t.toolkit.name.split()[0], t.toolkit.build, {"rlhf_fast:arches": _words(t)}) for t in targets]
        parts += [_file(path) for path in sources(bool(targets))]
    made: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": purl,
                "name": "rlhf-fast",
                "version": version,
                "purl": purl,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": parts,
        "dependencies": [{"ref": purl, "dependsOn": sorted(p["bom-ref"] for p in parts)}],
    }
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        made["metadata"]["timestamp"] = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC).isoformat()
    made["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(made, sort_keys=True)).urn
    return made


def sources(with_cuda: bool) -> list[Path]:
    """The files that the compiled modules were made from."""
    found = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    cuda = [p for p in found if p.parent.name == "cuda" or p.name == "bindings_cuda.cpp"]
    return sorted(found if with_cuda else set(found) - set(cuda))


def _words(target: Target) -> str:
    return " ".join(map(str, target.arches))


def _compiler_version(command: Sequence[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return (done.stdout.splitlines() or ["unknown"])[0]


def _package(name: str, scope: str) -> dict[str, Any]:
    version = importlib.metadata.version(name)
    purl = f"pkg:pypi/{name}@{version}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, "scope": scope}


def _tool(name: str, version: str, properties: dict[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "application", "bom-ref": f"{name} {version}", "name": name, "version": version}
    if properties:
        found["properties"] = [{"name": k, "value": v} for k, v in properties.items()]
    return found | {"scope": "excluded"}  # of the build, not of the wheel


def _file(path: Path) -> dict[str, Any]:
    name = path.relative_to(ROOT).as_posix()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "bom-ref": name, "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
