"""Rows of JSONL, JSON, CSV, TSV and Parquet files and of named datasets, each with its place."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_LINE_BYTES = 16 * 2**20
MAX_JSON_ARRAY_BYTES = 512 * 2**20
MAX_DEPTH = 64
CHUNK_BYTES = 2**20
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_BOM = b"\xef\xbb\xbf"
_UTF16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_SPACE = re.compile(r"[ \t\r\n]*")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
_SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s,\[\]{}"]+')
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')


class DataError(ValueError):
    """A record or a file cannot be used. `str(error)` is "file:line[:column]: what is wrong".

    reason: a short name of the fault, the same for every record that has it.
    """

    def __init__(self, place: str, message: str, reason: str) -> None:
        super().__init__(f"{place}: {message}")
        self.place, self.reason = place, reason


Row = dict[str, Any]
Rows = Generator[tuple[str, Row | DataError], None, None]


class Source:
    """One pass over the rows of a file or of a named dataset.

    After `finish`, size (bytes) and fingerprint (SHA-256, hex) describe the whole content, also what lies
    behind the last row asked for. `rows` yields a DataError for a row that can be skipped and raises one
    where reading ends. Memory stays bounded whatever the file holds.
    """

    def __init__(self, path: str, split: str | None = None) -> None:
        self.path, self.split = path, split
        self.size, self.fingerprint = 0, ""
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._suffix = Path(path).suffix.lower()
        if self._suffix in SUFFIXES:
            if split is not None:
                raise ValueError(f"read_records: argument 'split' got {split!r} for a file, expected None")
        elif os.path.isfile(path):
            kind = self._suffix or "nameless"
            raise DataError(path, f"got a {kind} file, expected one of {', '.join(SUFFIXES)}", "file type")
        elif not os.path.isdir(path) and (path.startswith((".", "~", os.sep)) or path.count("/") > 1):
            raise DataError(path, "no such file or folder", "unreadable")

    def __enter__(self) -> Source:
        if self._suffix in SUFFIXES:
            try:
                self._file = open(self.path, "rb")
            except OSError as error:
                raise DataError(self.path, error.strerror or str(error), "unreadable") from None
            self._before = os.fstat(self._file.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def rows(self) -> Rows:
        """Place and content of each row."""
        if self._file is None:
            return self._dataset_rows()
        lines = _Lines(self.path, self._file, self._hash)
        if self._suffix == ".parquet":
            return _parquet(self.path)
        if self._suffix in (".csv", ".tsv"):
            return _csv(lines)
        # Many .json files hold JSON lines.
        array = self._suffix == ".json" and lines.peek().removeprefix(_BOM).lstrip().startswith(b"[")
        return _json_array(lines) if array else _jsonl(lines)

    def finish(self) -> None:
        """Hash the rest. Raises DataError if the file is not the one that was opened any more."""
        if self._file is not None:
            while chunk := self._file.read(CHUNK_BYTES):
                self._hash.update(chunk)
            try:
                after = os.stat(self.path)
            except OSError:
                raise DataError(self.path, "the file vanished while it was read", "changed") from None
            was, now = ((s.st_size, s.st_mtime_ns, s.st_ino) for s in (self._before, after))
            if was != now:
                raise DataError(self.path, "the file changed while it was read", "changed")
            self.size = after.st_size
        self.fingerprint = self._hash.hexdigest()

    def _dataset_rows(self) -> Rows:
        try:
            import datasets
        except ImportError:
            message = "no such file; datasets by name need `pip install 'rlhf-fast[datasets]'`"
            raise DataError(self.path, message, "unreadable") from None
        try:
            if any(os.path.exists(os.path.join(self.path, f)) for f in ("state.json", "dataset_dict.json")):
                table = datasets.load_from_disk(self.path)
                table = table[self.split or "train"] if isinstance(table, dict) else table
            else:
                table = datasets.load_dataset(self.path, split=self.split or "train")
        except Exception as error:  # whatever the library or its network layer raises
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise DataError(self.path, f"not a dataset that can be loaded: {message}", "unreadable") from None
        for number, row in enumerate(table, start=1):
            encoded = json.dumps(row, sort_keys=True, default=str).encode()
            self.size += len(encoded)
            self._hash.update(encoded)
            yield f"{self.path}:{number}", row


class _Lines:
    """Lines of a file as bytes without the line feed, hashed as they pass; None for one over the limit."""

    def __init__(self, path: str, file: BinaryIO, digest: Any) -> None:
        self.path, self._file, self._digest = path, file, digest

    def peek(self) -> bytes:
        return self._file.peek(4096)[:4096]  # type: ignore[attr-defined]

    def read_all(self, limit: int) -> bytes:
        raw = self._file.read(limit + 1)
        self._digest.update(raw)
        if len(raw) > limit:
            raise DataError(self.path, f"an array of more than {limit} bytes; use JSON lines", "too long")
        return _without_bom(self.path, raw)

    def __iter__(self) -> Iterator[bytes | None]:
        rest, first, too_long = b"", True, False
        while chunk := self._file.read(CHUNK_BYTES):
            self._digest.update(chunk)
            if first:
                chunk, first = _without_bom(self.path, chunk), False
            *lines, last = chunk.split(b"\n")
            for line in lines:
                line, rest = rest + line, b""
                too_long = too_long or len(line) > MAX_LINE_BYTES
                yield None if too_long else line
                too_long = False
            rest = b"" if too_long else rest + last
            if len(rest) > MAX_LINE_BYTES:
                rest, too_long = b"", True
        if rest or too_long:
            yield None if too_long else rest


def _without_bom(path: str, start: bytes) -> bytes:
    if start.startswith(_UTF16_OR_32):
        raise DataError(f"{path}:1:1", "UTF-16 or UTF-32 text, expected UTF-8", "encoding")
    return start.removeprefix(_BOM)


def _text(path: str, number: int, raw: bytes) -> str:
    """Text of bytes that begin at line `number`. Raises DataError."""

    def place(before: str) -> str:
        return f"{path}:{number + before.count(chr(10))}:{len(before) - before.rfind(chr(10))}"

    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        where = place(raw[: error.start].decode())
        raise DataError(where, f"byte 0x{raw[error.start]:02x} is not UTF-8", "invalid UTF-8") from None
    if (at := text.find("\0")) >= 0:
        raise DataError(place(text[:at]), "NUL character", "NUL character")
    return text


class _Fault(Exception):
    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _Fault(f"key {key!r} given twice", "duplicate key")
    return row


def _constant(name: str) -> Any:
    raise _Fault(f"{name} is not JSON", "not a finite number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Fault(f"{digits[:30]} is too large for a number", "not a finite number")
    return value


def _int(digits: str) -> int:
    # int() refuses thousands of digits by itself, but only under the interpreter's adjustable limit.
    if len(digits) > 1000:
        raise _Fault(f"a number of {len(digits)} digits", "not a finite number")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float, parse_int=_int)


def _too_deep(text: str) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for token in _BRACKETS.finditer(text):
        depth += _STEP.get(token[0], 0)
        if depth > MAX_DEPTH:
            return True
    return False


def _decode(path: str, number: int, text: str) -> Row | DataError:
    place = f"{path}:{number}"
    try:
        if _too_deep(text):
            raise _Fault(f"nested deeper than {MAX_DEPTH} levels", "nested too deep")
        row = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"{path}:{number + error.lineno - 1}:{error.colno}"
        return DataError(place, f"malformed JSON: {error.msg}", "malformed JSON")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        return DataError(place, f"lone surrogate \\u{code:04x}, half a character", "lone surrogate")
    except RecursionError:
        return DataError(place, "nested too deep", "nested too deep")
    except _Fault as fault:
        return DataError(place, str(fault), fault.reason)
    if not isinstance(row, dict):
        return DataError(place, f"got a {type(row).__name__}, expected an object {{...}}", "not an object")
    return row


def _jsonl(lines: _Lines) -> Rows:
    for number, line in enumerate(lines, start=1):
        place = f"{lines.path}:{number}"
        row: Row | DataError
        if line is None:
            row = DataError(place, f"a line of more than {MAX_LINE_BYTES} bytes", "line too long")
        elif not line.strip():
            row = DataError(place, "blank line", "blank line")
        else:
            try:
                row = _decode(lines.path, number, _text(lines.path, number, line.removesuffix(b"\r")))
            except DataError as error:
                row = error
        yield place, row


def _json_array(lines: _Lines) -> Rows:
    """Elements of one JSON array, found by counting brackets, so that each has its own line number."""
    text = _text(lines.path, 1, lines.read_all(MAX_JSON_ARRAY_BYTES))
    number, counted = 1, 0

    def skip_space(position: int) -> int:
        nonlocal number, counted
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        number, counted = number + text.count("\n", counted, position), position
        return position

    def fail(position: int, message: str) -> DataError:
        column = position - text.rfind("\n", 0, position)
        return DataError(f"{lines.path}:{number}:{column}", f"malformed JSON: {message}", "malformed JSON")

    position = skip_space(text.index("[") + 1)
    if text[position : position + 1] != "]":
        while True:
            end = _element_end(text, position)
            if end is None:
                raise fail(position, "expected an object")
            yield f"{lines.path}:{number}", _decode(lines.path, number, text[position:end])
            position = skip_space(end)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise fail(position, "expected a comma or the end of the array")
            position = skip_space(position + 1)
    if text[position + 1 :].strip():
        raise fail(position + 1, "text after the array")


def _element_end(text: str, position: int) -> int | None:
    if text[position : position + 1] not in ("{", "["):
        end = _SCALAR.match(text, position)
        return end.end() if end else None
    depth = 0
    for token in _BRACKETS.finditer(text, position):
        depth += _STEP.get(token[0], 0)
        if depth == 0 and token[0] in _STEP:
            return token.end()
    return None


def _csv(lines: _Lines) -> Rows:
    """Rows under a header; quoted fields may hold line breaks."""
    too_long = "\0line too long\0"

    def texts() -> Iterator[str]:
        for line in lines:
            # Faults are marked, not raised, so that the csv reader stays in step with the lines.
            yield (too_long if line is None else line.decode("utf-8", "surrogateescape")) + "\n"

    def check(place: str, cells: list[str]) -> DataError | None:
        for cell in cells:
            if too_long in cell:
                return DataError(place, f"a line of more than {MAX_LINE_BYTES} bytes", "line too long")
            if "\0" in cell:
                return DataError(place, "NUL character", "NUL character")
            if not cell.isascii():
                try:
                    cell.encode()
                except UnicodeEncodeError as error:
                    byte = ord(cell[error.start]) - 0xDC00
                    return DataError(place, f"byte 0x{byte:02x} is not UTF-8", "invalid UTF-8")
        return None

    delimiter = "\t" if lines.path.lower().endswith(".tsv") else ","
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        while True:
            place = f"{lines.path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
                fault = check(place, cells)
            except StopIteration:
                return
            except csv.Error as error:
                cells, fault = [], DataError(place, f"malformed CSV: {error}", "malformed CSV")
            if header is None:
                if fault is None and (not cells or len(set(cells)) < len(cells)):
                    fault = DataError(place, f"got columns {cells}, expected distinct names", "header")
                if fault is not None:
                    raise fault
                header = cells
            elif fault is not None:
                yield place, fault
            elif not cells:
                yield place, DataError(place, "blank line", "blank line")
            elif len(cells) != len(header):
                message = f"got {len(cells)} columns, expected {len(header)}: {', '.join(header)}"
                yield place, DataError(place, message, "wrong number of columns")
            else:
                yield place, dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _parquet(path: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        message = "Parquet files need `pip install 'rlhf-fast[datasets]'`"
        raise DataError(path, message, "unreadable") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        message = f"damaged Parquet file: {' '.join(str(error).split())[:200]}"
        raise DataError(f"{path}:{number + 1}", message, "damaged file") from None
