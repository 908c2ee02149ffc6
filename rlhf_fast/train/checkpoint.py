"""Checkpoints that survive a kill at any instant: safetensors and JSON, complete or not there at all.

A save writes `step-N.tmp-<pid>/`, syncs every file and the folder, renames it to `step-N/` and syncs the
parent. The manifest, written last, holds the size and SHA-256 of each file and a hash of itself, so that a
load takes the newest checkpoint that is whole. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from rlhf_fast._version import __version__
from rlhf_fast.train._exact import load_optimizer_tensors, optimizer_tensors, rng_state, set_rng_state
from rlhf_fast.train._run import CheckpointError, RunLock, alive, claim_output, fault_point

__all__ = [
    "SAVE_FAULTS",
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "RunLock",
    "claim_output",
    "fault_point",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "rng_state",
    "set_rng_state",
]

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
MAX_TENSORS = 100_000
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")
# Where RLHF_FAST_FAULT="name[:nth]" can kill a save; the trainers add points of their own, such as
# train.step.
SAVE_FAULTS = (
    "save.begin",
    "save.folder",
    "save.mid_file",
    "save.file",
    "save.before_manifest",
    "save.after_manifest",
    "save.before_sync",
    "save.before_rename",
    "save.after_rename",
    "save.before_prune",
    "save.mid_prune",
    "save.after_prune",
)
_STEP = re.compile(r"step-(0|[1-9]\d{0,17})")
_TEMPORARY = re.compile(r"(step-\d+)\.tmp-(\d+)(-replaced)?")
_STEM = re.compile(r"[A-Za-z0-9_-]{1,100}")
_FILE = re.compile(r"[A-Za-z0-9_-]{1,100}\.safetensors|state\.json")
_log = logging.getLogger(__name__)


class _Damaged(Exception):
    """This checkpoint is not whole; an older one may be."""


@dataclass(frozen=True)
class Checkpoint:
    """tensors: file stem -> name -> tensor, on the CPU. state: as given to `save`, as JSON keeps it."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


class CheckpointStore:
    """Checkpoints of one run in one folder, of which the newest `keep` (at least 2) are kept.

    Raises CheckpointError if `folder` is a file, and ValueError for keep < 2.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if isinstance(keep, bool) or keep < 2:
            raise ValueError(f"CheckpointStore: argument 'keep' got {keep!r}, expected at least 2")
        self.folder, self.keep = Path(folder), keep
        if self.folder.suffix.lower() in PICKLES:
            raise CheckpointError(f"{folder}: got a pickle file, expected a folder; pickles are never opened")
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{folder}: got a file, expected a folder of checkpoints")
        self._whole: set[int] = set()
        self._resumed: int | None = None
        self._failures = 0

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or not, oldest first."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {error.strerror}") from None
        return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step}"

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path | None:
        """Write the checkpoint of a step, in place of an earlier one of it, and drop old ones.

        tensors: file stem -> name -> tensor. state: plain JSON values with finite numbers.
        Returns the folder, or None if the disk refused (full, read-only, gone): older checkpoints are
        intact, no rest is left behind, and a warning is logged. Raises CheckpointError for the second
        refusal in a row, and ValueError or TypeError for arguments that cannot be stored, before anything
        is written.
        """
        _check_arguments(step, tensors, state)
        versions = {"rlhf_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
        body = {"step": step, "versions": versions, "state": state}
        files: dict[str, Any] = {f"{stem}.safetensors": named for stem, named in tensors.items()}
        temporary = self.folder / f"step-{step}.tmp-{os.getpid()}"
        try:
            self._make_room(tensors)
            fault_point("save.begin")
            _remove(temporary)
            temporary.mkdir()
            fault_point("save.folder")
            entries = {name: _write(temporary / name, _serialize(named)) for name, named in files.items()}
            entries[STATE] = _write(temporary / STATE, _json(body))
            fault_point("save.before_manifest")
            _write(temporary / MANIFEST, _json(_sealed({"format": FORMAT, "step": step, "files": entries})))
            fault_point("save.after_manifest")
            self._publish(temporary, self.path(step))
        except OSError as error:
            _remove(temporary)
            self._clean()
            self._failures += 1
            reason = f"{self.path(step)}: checkpoint not saved: {error.strerror or error}"
            if self._failures > 1:
                raise CheckpointError(f"{reason} (twice in a row)") from error
            _log.warning("%s; the run goes on, and stops if the next save fails too", reason)
            return None
        except BaseException:
            _remove(temporary)
            raise
        self._failures = 0
        self._whole.add(step)
        fault_point("save.before_prune")
        self._prune()
        fault_point("save.after_prune")
        return self.path(step)

    def load_latest(
        self,
        expect: Mapping[str, Any] | None = None,
        *,
        names: Mapping[str, Iterable[str]] | None = None,
        finite: bool = False,
    ) -> Checkpoint | None:
        """The newest whole checkpoint, or None if the folder holds none at all.

        A damaged one is logged and the next older one is tried. expect: values that fields of `state` must
        have (nested mappings are compared field by field). names: file stem -> exact set of tensor names.
        finite: a checkpoint with NaN or infinite tensors counts as damaged. Raises CheckpointError if all
        are damaged, or if the newest whole one is of another format, or differs from `expect` or `names`;
        the text names the field.
        """
        self._clean()
        steps = self.steps()
        reasons = []
        for step in reversed(steps):
            try:
                checkpoint = _load(self.path(step), step, finite)
            except _Damaged as damage:
                reasons.append(f"step-{step}: {damage}")
                _log.warning("%s is damaged and passed over: %s", self.path(step), damage)
                continue
            _compare(checkpoint, expect, names)
            self._whole.add(step)
            self._resumed = step
            return checkpoint
        if steps:
            raise CheckpointError(
                f"{self.folder}: no whole checkpoint among {len(steps)} ({'; '.join(reasons)}); "
                "not starting from scratch unasked"
            )
        return None

    def _make_room(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self._whole and not self.folder.is_dir():
            _log.warning("%s was deleted while the run was using it; making it again", self.folder)
            self._whole.clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        size = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
        for step in self.steps()[-1:]:
            size = max(size, sum(f.stat().st_size for f in self.path(step).glob("*")))
        free = shutil.disk_usage(self.folder).free
        if free < 2 * size:
            raise OSError(errno.ENOSPC, f"{free} bytes free, {2 * size} wanted (twice the checkpoint)")

    def _clean(self) -> None:
        """Clear away what a killed save left, and put back the checkpoint it was about to replace."""
        try:
            found = [(name, _TEMPORARY.match(name)) for name in os.listdir(self.folder)]
        except OSError:
            return
        for name, match in found:
            if match is None or (int(match[2]) != os.getpid() and alive(int(match[2]))):
                continue
            whole = self.folder / match[1]
            if match[3] and not whole.exists():
                with contextlib.suppress(OSError):
                    os.rename(self.folder / name, whole)
            _remove(self.folder / name)

    def _publish(self, temporary: Path, final: Path) -> None:
        fault_point("save.before_sync")
        _sync(temporary)
        fault_point("save.before_rename")
        replaced = self.folder / f"{final.name}.tmp-{os.getpid()}-replaced"
        if final.exists():
            os.rename(final, replaced)
        os.rename(temporary, final)
        fault_point("save.after_rename")
        _sync(self.folder)
        _remove(replaced)

    def _prune(self) -> None:
        """Keep the newest `keep` whole checkpoints and the one this run resumed from; drop all others.

        Only checkpoints known to be whole count, since a damaged one of a later step must not push out a
        good one.
        """
        steps = self.steps()
        for step in set(steps) - self._whole:
            try:
                _verify(self.path(step), step)
                self._whole.add(step)
            except (_Damaged, CheckpointError) as damage:
                _log.warning("%s does not count as a checkpoint: %s", self.path(step), damage)
        whole = [step for step in steps if step in self._whole]
        if len(whole) < self.keep:
            return
        kept = {*whole[-self.keep :], self._resumed}
        for step in steps:
            if step not in kept:
                # Out of the way in one move, so that a kill while deleting leaves no torn checkpoint.
                doomed = self.folder / f"step-{step}.tmp-{os.getpid()}-pruned"
                try:
                    os.rename(self.path(step), doomed)
                except OSError as error:
                    _log.warning("%s cannot be deleted: %s", self.path(step), error.strerror)
                    continue
                fault_point("save.mid_prune")
                _remove(doomed)
                self._whole.discard(step)


def _check_arguments(step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    op = "CheckpointStore.save: argument"
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{op} 'step' got {step!r}, expected an integer of at least 0")
    for stem, named in tensors.items():
        if not _STEM.fullmatch(stem):
            raise ValueError(f"{op} 'tensors' got key {stem!r}, expected letters and digits")
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                got = f"{type(tensor).__name__} for {stem}[{name!r}]"
                raise TypeError(f"{op} 'tensors' got {got}, expected a dense tensor")
    _check_json(state, "state")


def _check_json(value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"CheckpointStore.save: {place} got key {key!r}, expected text")
            _check_json(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_json(inner, f"{place}[{i}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"CheckpointStore.save: {place} got {value}, expected a finite number")
    elif value is not None and not isinstance(value, str | int | bool):
        raise TypeError(f"CheckpointStore.save: {place} got {type(value).__name__}, expected a JSON value")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _serialize(named: Mapping[str, Tensor]) -> bytes:
    # Copies: safetensors refuses tensors that share memory, and a trainer may go on writing to the originals.
    return format_safetensors({k: t.detach().to("cpu", copy=True).contiguous() for k, t in named.items()})


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Write and sync a new file; its entry in the manifest."""
    with open(path, "xb") as file:
        half = len(content) // 2
        file.write(content[:half])
        file.flush()
        fault_point("save.mid_file")
        file.write(content[half:])
        file.flush()
        os.fsync(file.fileno())
    fault_point("save.file")
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _seal(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "sha256": _seal(manifest)}


def _read_manifest(folder: Path, step: int) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise _Damaged(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _Damaged(f"{MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _seal(manifest):
        raise _Damaged(f"{MANIFEST} does not match its own SHA-256")
    if manifest.get("format") != FORMAT:
        found = manifest.get("format")
        raise CheckpointError(f"{folder}: field 'format' is {found}, this version reads {FORMAT}")
    if manifest.get("step") != step:
        raise _Damaged(f"{MANIFEST} is of step {manifest.get('step')}")
    return manifest


def _verify(folder: Path, step: int) -> dict[str, bytes]:
    """Content of each file of a whole checkpoint. Raises _Damaged; CheckpointError for another format."""
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if name.lower().endswith(PICKLES):
            raise _Damaged(f"holds the pickle file {name}, which is not opened")
    files = _read_manifest(folder, step).get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise _Damaged(f"{MANIFEST} lists no {STATE}")
    contents = {}
    for name, entry in files.items():
        if not _FILE.fullmatch(name):  # also keeps a path from leading out of the folder
            raise _Damaged(f"{MANIFEST} lists {name!r}, which is not a file of a checkpoint")
        try:
            size = os.stat(folder / name).st_size
            if size != entry["size"]:
                raise _Damaged(f"{name} has {size} bytes, expected {entry['size']}")
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise _Damaged(f"{name}: {error.strerror}") from None
        if hashlib.sha256(contents[name]).hexdigest() != entry["sha256"]:
            raise _Damaged(f"{name} does not match its SHA-256")
    return contents


def _load(folder: Path, step: int, finite: bool) -> Checkpoint:
    contents = _verify(folder, step)
    body = json.loads(contents.pop(STATE))
    tensors = {}
    for name, content in contents.items():
        try:
            named = parse_safetensors(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise _Damaged(f"{name}: {error}") from None
        if len(named) > MAX_TENSORS:
            raise _Damaged(f"{name} holds {len(named)} tensors, expected at most {MAX_TENSORS}")
        if finite:
            for key, tensor in named.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise _Damaged(f"{name}: tensor {key!r} is not finite")
        tensors[name.removesuffix(".safetensors")] = named
    if body["versions"].get("torch") != torch.__version__:
        _log.warning(
            "%s was written with torch %s, this is %s: results may differ in the last bits",
            *(folder, body["versions"].get("torch"), torch.__version__),
        )
    return Checkpoint(step, tensors, body["state"], folder)


def _compare(
    checkpoint: Checkpoint, expect: Mapping[str, Any] | None, names: Mapping[str, Iterable[str]] | None
) -> None:
    wanted = json.loads(json.dumps(dict(expect or {})))
    difference = _difference(checkpoint.state, wanted, "")
    if difference is not None:
        field, found, expected = difference
        raise CheckpointError(f"{checkpoint.path}: field '{field}' is {found}, expected {expected} for this run")
    if names is None:
        return
    if set(names) != set(checkpoint.tensors):
        got, expected = sorted(checkpoint.tensors), sorted(names)
        raise CheckpointError(f"{checkpoint.path}: got tensor files {got}, expected {expected}")
    for stem, expected_names in names.items():
        difference_of_names = set(expected_names) ^ set(checkpoint.tensors[stem])
        if difference_of_names:
            name = min(difference_of_names)
            state = "is unknown to this run" if name in checkpoint.tensors[stem] else "is missing"
            raise CheckpointError(f"{checkpoint.path}: tensor '{name}' of {stem} {state}")


def _difference(found: Any, expected: Any, field: str) -> tuple[str, Any, Any] | None:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            inner = _difference(found.get(key, "absent"), value, f"{field}.{key}" if field else key)
            if inner is not None:
                return inner
        return None
    same = found == expected and isinstance(found, bool) == isinstance(expected, bool)
    return None if same else (field, found, expected)
