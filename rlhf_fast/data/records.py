"""Typed records made from rows: what each kind of data must hold, and what becomes of a row that does not."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from rlhf_fast.data.files import DataError, Row, Source

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]
Conversation = str | list[Message]
Kind = Literal["text", "prompt", "chat", "pair", "label"]


@dataclass(frozen=True)
class TextRecord:
    """A text to learn from. meta: the other fields of the row."""

    text: str
    source: str
    meta: Row = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to complete: a text, or messages of which the last is not the assistant's."""

    prompt: Conversation
    source: str
    meta: Row = field(default_factory=dict)


@dataclass(frozen=True)
class ChatRecord:
    """A conversation with at least one assistant turn."""

    messages: list[Message]
    source: str
    meta: Row = field(default_factory=dict)


@dataclass(frozen=True)
class PairRecord:
    """Two answers to one prompt ("" for whole texts). All three are texts, or all three are message lists."""

    prompt: Conversation
    chosen: Conversation
    rejected: Conversation
    source: str
    margin: float | None = None
    meta: Row = field(default_factory=dict)


@dataclass(frozen=True)
class LabelRecord:
    """One answer to a prompt, judged alone. Both are texts, or both are message lists."""

    prompt: Conversation
    completion: Conversation
    label: bool
    """True = desirable."""
    source: str
    meta: Row = field(default_factory=dict)


Record = TextRecord | PromptRecord | ChatRecord | PairRecord | LabelRecord
R = TypeVar("R", TextRecord, PromptRecord, ChatRecord, PairRecord, LabelRecord)


class Records(Sequence[Any]):
    """Records of one file or dataset, in order.

    skipped: reason -> number of records left out. size, fingerprint: bytes and SHA-256 (hex) of the content,
    to compare at resume.
    """

    def __init__(self, records: list[Any], path: str, skipped: dict[str, int], size: int, fingerprint: str) -> None:
        self._records, self.path, self.skipped = records, path, skipped
        self.size, self.fingerprint = size, fingerprint

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._records[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._records)

    def __repr__(self) -> str:
        return f"Records({self.path!r}, {len(self)} records, skipped={self.skipped})"


# Fields with a meaning; all others are kept as `meta`.
FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "chat": ("messages", "prompt", "completion"),
    "pair": ("chosen", "rejected", "prompt", "margin"),
    "label": ("prompt", "completion", "label"),
}


def read_records(
    path: str | Path,
    kind: Kind = "text",
    *,
    on_error: Literal["raise", "skip"] = "raise",
    fields: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Records:
    """Records of a .jsonl, .json, .csv, .tsv or .parquet file, or of a dataset known to `datasets`.

    kind and the fields of a row:
      "text"    text
      "prompt"  prompt: a text or a list of {"role", "content"}
      "chat"    messages; or prompt and completion
      "pair"    chosen, rejected, and optionally prompt and margin; without a prompt, the messages that both
                lists begin with are the prompt (whole texts have the empty prompt)
      "label"   prompt, completion, label: true or false (0, 1 and their texts too), for a desirable answer or another;
                TRL's columns of unpaired preference data
    Other fields go to `meta`. fields: expected name -> name in the file. limit: stop after so many records.
    on_error "raise" stops at the first malformed record; "skip" leaves it out and counts it. Pairs whose
    answers are equal, or of which one is empty, carry no preference: both modes skip and count them.

    Raises DataError ("file:line[:column]: ...") for a malformed record, an unreadable file, or no records at
    all, and ValueError for a wrong argument.
    """
    if kind not in FIELDS:
        raise ValueError(f"read_records: argument 'kind' got {kind!r}, expected one of {', '.join(FIELDS)}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"read_records: argument 'on_error' got {on_error!r}, expected raise or skip")
    if limit is not None and limit < 1:
        raise ValueError(f"read_records: argument 'limit' got {limit}, expected at least 1")
    names = dict(fields or {})
    if unknown := [name for name in names if name not in FIELDS[kind]]:
        expected = ", ".join(FIELDS[kind])
        raise ValueError(f"read_records: argument 'fields' got {unknown[0]!r}, expected one of {expected}")

    records: list[Record] = []
    skipped: dict[str, int] = {}
    make = _MAKERS[kind]
    with Source(str(path), split) as source, contextlib.closing(source.rows()) as rows:
        for place, row in rows:
            try:
                if isinstance(row, DataError):
                    raise row
                records.append(make(place, _Fields(place, row, names, FIELDS[kind])))
            except DataError as error:
                if on_error == "raise" and not isinstance(error, _NoPreference):
                    raise
                skipped[error.reason] = skipped.get(error.reason, 0) + 1
            if limit is not None and len(records) >= limit:
                break
        source.finish()
    if not records:
        counted = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(str(path), f"no records (skipped: {counted})" if skipped else "no records", "empty")
    return Records(records, str(path), skipped, source.size, source.fingerprint)


class _NoPreference(DataError):
    """A well-formed pair that teaches nothing."""


class _Fields:
    """Fields of one row by their expected names, with errors that say what is expected and what is there."""

    def __init__(self, place: str, row: Row, names: Mapping[str, str], expected: Sequence[str]) -> None:
        self.place, self._row, self._names, self._expected = place, row, names, expected
        used = {names.get(name, name) for name in expected}
        self.meta = {name: value for name, value in row.items() if name not in used}

    def __contains__(self, name: str) -> bool:
        return self._names.get(name, name) in self._row

    def fail(self, message: str, reason: str) -> DataError:
        return DataError(self.place, message, reason)

    def get(self, name: str) -> Any:
        actual = self._names.get(name, name)
        if actual not in self._row:
            close = difflib.get_close_matches(actual, self._row, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise self.fail(
                f"field {actual!r} is missing{hint} (expected {', '.join(self._expected)}; "
                f"got {', '.join(map(str, self._row))[:200] or 'nothing'})",
                f"missing field {name}",
            )
        return self._row[actual]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.wrong_type(name, value, "text")
        if not value.strip():
            raise self.fail(f"field {name!r} is empty", f"empty {name}")
        return value

    def wrong_type(self, name: str, value: Any, expected: str) -> DataError:
        return self.fail(f"field {name!r} got {_type(value)}, expected {expected}", f"wrong type of {name}")

    def messages(self, name: str, value: Any) -> list[Message]:
        if not isinstance(value, list):
            raise self.wrong_type(name, value, "a list of messages")
        for i, message in enumerate(value):
            where, reason = f"{name}[{i}]", f"malformed message in {name}"
            if not isinstance(message, dict):
                raise self.fail(f"{where} got {_type(message)}, expected {{role, content}}", reason)
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise self.fail(f"{where}.{key} got {_type(message.get(key))}, expected text", reason)
            if message["role"] not in ROLES:
                raise self.fail(f"{where}.role got {message['role']!r}, expected one of {', '.join(ROLES)}", reason)
            if extra := [key for key in message if key not in ("role", "content", "name")]:
                raise self.fail(f"{where} got field {extra[0]!r}, expected role, content, name", reason)
        return [dict(message) for message in value]

    def conversation(self, name: str) -> Conversation:
        value = self.get(name)
        if isinstance(value, list):
            messages = self.messages(name, value)
            if not any(m["content"].strip() for m in messages):
                raise self.fail(f"field {name!r} is empty", f"empty {name}")
            return messages
        if not isinstance(value, str):
            raise self.wrong_type(name, value, "text or a list of messages")
        return self.text(name)


def _type(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "true/false", int: "an integer", float: "a number"}.get(
        type(value), "nothing" if value is None else f"a {type(value).__name__}"
    )


def _text(place: str, row: _Fields) -> TextRecord:
    return TextRecord(row.text("text"), place, row.meta)


def _prompt(place: str, row: _Fields) -> PromptRecord:
    prompt = row.conversation("prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise row.fail("prompt ends with an assistant message, expected one to be answered", "answered prompt")
    return PromptRecord(prompt, place, row.meta)


def _chat(place: str, row: _Fields) -> ChatRecord:
    if "messages" not in row and "prompt" in row and "completion" in row:
        messages = [
            *_turn(row.conversation("prompt"), "user"),
            *_turn(row.conversation("completion"), "assistant"),
        ]
    else:
        messages = row.messages("messages", row.get("messages"))
    if messages and messages[0]["role"] == "assistant":
        raise row.fail("messages begin with the assistant, expected a turn to answer first", "no first turn")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise row.fail("messages hold no assistant turn to learn", "no assistant turn")
    return ChatRecord(messages, place, row.meta)


def _turn(said: Conversation, role: str) -> list[Message]:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _pair(place: str, row: _Fields) -> PairRecord:
    answers: list[Conversation] = []
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise _NoPreference(place, f"field {name!r} is empty", "missing answer")
        answers.append(row.conversation(name))
    chosen, rejected = answers
    if chosen == rejected:
        raise _NoPreference(place, "chosen and rejected are equal", "equal answers")
    prompt: Conversation | None = None
    if "prompt" in row and row.get("prompt") not in (None, "", []):
        prompt = row.conversation("prompt")
    if any(isinstance(part, list) for part in (prompt, chosen, rejected)):
        chosen, rejected = _turn(chosen, "assistant"), _turn(rejected, "assistant")
        if prompt is None:
            shared = _shared_length(chosen, rejected)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        else:
            prompt = _turn(prompt, "user")
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer or answer[-1]["role"] != "assistant":
                raise row.fail(f"{name} does not end with an assistant message", f"unanswered {name}")
    return PairRecord(prompt or "", chosen, rejected, place, _margin(row), row.meta)


def _shared_length(chosen: list[Message], rejected: list[Message]) -> int:
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    return length


def _margin(row: _Fields) -> float | None:
    value = row.get("margin") if "margin" in row else None
    if value is None or value == "":
        return None
    try:
        margin = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise row.wrong_type("margin", value, "a finite number")
    return margin


def _label(place: str, row: _Fields) -> LabelRecord:
    prompt, completion = row.conversation("prompt"), row.conversation("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt, completion = _turn(prompt, "user"), _turn(completion, "assistant")
        if completion[-1]["role"] != "assistant":
            raise row.fail("completion does not end with an assistant message", "unanswered completion")
    value = row.get("label")
    key = value.strip().lower() if isinstance(value, str) else value
    # 1.0 == 1 == True, so this takes columns of any of these types; a list is no key.
    label = _LABELS.get(key) if isinstance(key, str | int | float) else None
    if label is None:
        got = repr(value) if isinstance(value, str | int | float) else _type(value)
        raise row.fail(f"field 'label' got {got}, expected true or false", "wrong label")
    return LabelRecord(prompt, completion, label, place, row.meta)


_LABELS: dict[object, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}

_MAKERS: dict[str, Callable[[str, _Fields], Record]] = {
    "text": _text,
    "prompt": _prompt,
    "chat": _chat,
    "pair": _pair,
    "label": _label,
}
