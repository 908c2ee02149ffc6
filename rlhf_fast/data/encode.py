"""Tokens of records. Conversations are rendered by the tokenizer's own chat template and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rlhf_fast.data.files import DataError
from rlhf_fast.data.records import (
    ChatRecord,
    Conversation,
    LabelRecord,
    Message,
    PairRecord,
    PromptRecord,
    Record,
    TextRecord,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "skip", "truncate"]


@dataclass(frozen=True)
class EncodedText:
    """One sequence to learn from. learn[t]: token t counts in the loss."""

    input_ids: list[int]
    learn: list[bool]
    record: TextRecord | ChatRecord


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, ready to be continued."""

    input_ids: list[int]
    record: PromptRecord


@dataclass(frozen=True)
class EncodedPair:
    """Prompt followed by each of the two answers; answers begin at prompt_length."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_length: int
    record: PairRecord


@dataclass(frozen=True)
class EncodedLabel:
    """Prompt followed by an answer that begins at prompt_length."""

    input_ids: list[int]
    prompt_length: int
    record: LabelRecord


@dataclass
class Encoded(Sequence[Any]):
    """Encoded records in order. counts: "overlong skipped" and "overlong truncated" -> number of records."""

    items: list[Any]
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Text of a conversation by the tokenizer's chat template. Raises ValueError without a working one."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("render: argument 'tokenizer' got no chat template, expected one to render messages")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise jinja2's own errors for roles they do not know
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"render: the chat template refuses the messages: {message}") from None
    return str(text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _closed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _until_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """`ids` up to the last end-of-sequence, or all of them if there is none.

    What a template puts after a turn's end (often a line break) is not written by the model.
    """
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return ids[: ends[-1] + 1] if ends else ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Conversation) -> list[int]:
    """Tokens of a prompt, up to where the answer begins. Raises ValueError if there are none.

    A text gets the special tokens the tokenizer puts before a text (BOS) but none behind it; messages are
    rendered with the generation prompt of the chat template.
    """
    if isinstance(prompt, str):
        ids = _ids(tokenizer, prompt, special=True)
        end = tokenizer.eos_token_id
        while len(ids) > 1 and ids[-1] == end and not prompt.endswith(tokenizer.eos_token or "\0"):
            ids.pop()
    else:
        ids = _ids(tokenizer, render(tokenizer, prompt, add_generation_prompt=True), special=False)
    if not ids:
        raise ValueError("encode_prompt: argument 'prompt' got no tokens, expected at least one")
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, eos: bool = True) -> list[int]:
    """Tokens of a whole text, closed by end-of-sequence if asked for."""
    ids = encode_prompt(tokenizer, text)
    return _closed(tokenizer, ids) if eos else ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them the assistant wrote (its end-of-turn token included).

    A turn is what the template adds to the conversation before it with its generation prompt; each piece is
    tokenized by itself, as in generation. Raises ValueError for a template that rewrites earlier turns, since
    turns cannot be told apart then.
    """
    ids: list[int] = []
    written: list[bool] = []
    done = ""

    def add(text: str, learn: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise ValueError("encode_chat: the chat template rewrites earlier turns when a turn is added")
        piece = _ids(tokenizer, text[len(done) :], special=False)
        spoken = len(_until_eos(tokenizer, piece))
        ids.extend(piece)
        written.extend(learn and i < spoken for i in range(len(piece)))
        done = text

    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            add(render(tokenizer, messages[:i], add_generation_prompt=True), False)
            add(render(tokenizer, messages[: i + 1]), True)
    if messages and messages[-1]["role"] != "assistant":
        add(render(tokenizer, messages), False)
    return ids, written


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, pair: PairRecord, *, eos: bool = True
) -> tuple[list[int], list[int], int]:
    """Tokens of prompt + chosen, of prompt + rejected, and the length of the prompt they share (0 for none).

    A reward model reads its score at the last token. That is the end-of-turn token of the chat template for
    messages; for texts it is end-of-sequence, or the last token of the text where eos is False.
    """
    if not pair.prompt and isinstance(pair.chosen, str) and isinstance(pair.rejected, str):
        chosen, rejected = (encode_text(tokenizer, text, eos=eos) for text in (pair.chosen, pair.rejected))
        return chosen, rejected, 0
    prompt, answers = _answered("encode_pair", tokenizer, pair.prompt, (pair.chosen, pair.rejected), eos)
    chosen, rejected = ([*prompt, *ids] for ids in answers)
    return chosen, rejected, len(prompt)


def encode_label(tokenizer: PreTrainedTokenizerBase, record: LabelRecord, *, eos: bool = True) -> tuple[list[int], int]:
    """Tokens of prompt + completion, and the length of the prompt; ends as in `encode_pair`."""
    prompt, (answer,) = _answered("encode_label", tokenizer, record.prompt, (record.completion,), eos)
    return [*prompt, *answer], len(prompt)


def _answered(
    op: str, tokenizer: PreTrainedTokenizerBase, asked: Conversation, given: Sequence[Conversation], eos: bool
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt, and of each of the answers to it: all are texts, or all are message lists."""
    if isinstance(asked, str) and all(isinstance(answer, str) for answer in given):
        answers = [_ids(tokenizer, str(text), special=False) for text in given]
        return encode_prompt(tokenizer, asked), [_closed(tokenizer, ids) for ids in answers] if eos else answers
    messages = [m for m in asked if isinstance(m, dict)]
    before = render(tokenizer, messages, add_generation_prompt=True) if messages else ""
    answers = []
    for answer in given:
        text = render(tokenizer, [*messages, *(m for m in answer if isinstance(m, dict))])
        if not text.startswith(before):
            raise ValueError(f"{op}: the chat template rewrites the prompt when an answer is added")
        answers.append(_until_eos(tokenizer, _ids(tokenizer, text[len(before) :], special=False)))
    return _ids(tokenizer, before, special=False), answers


def encode_records(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    overlong: Overlong = "error",
    response_only: bool = True,
    eos: bool = True,
) -> Encoded:
    """EncodedText, EncodedPrompt, EncodedPair or EncodedLabel for each record.

    overlong: what happens over a limit. "error" raises DataError, "skip" leaves the record out, "truncate"
    keeps the last max_prompt_tokens of a prompt and the first max_tokens of a sequence; both are counted. A
    sequence with nothing left to learn after truncation is skipped. response_only: of chats, only the
    assistant's turns are learned. eos: plain texts and answers end with end-of-sequence, unless they were truncated.
    """
    if overlong not in ("error", "skip", "truncate"):
        got = f"argument 'overlong' got {overlong!r}"
        raise ValueError(f"encode_records: {got}, expected error, skip or truncate")
    fit = _Limits(max_prompt_tokens, max_tokens, overlong)
    result = Encoded([], fit.counts)
    for record in records:
        fit.truncated = False
        try:
            item = _ENCODERS[type(record)](record, tokenizer, fit, response_only, eos)
        except _Skip:
            fit.count("overlong skipped")
            continue
        except DataError:
            raise
        except ValueError as error:
            raise DataError(record.source, str(error), "not encodable") from None
        if fit.truncated:
            fit.count("overlong truncated")
        result.items.append(item)
    return result


class _Skip(Exception):
    pass


class _Limits:
    def __init__(self, max_prompt_tokens: int | None, max_tokens: int | None, overlong: Overlong) -> None:
        self.max_prompt_tokens, self.max_tokens, self.overlong = max_prompt_tokens, max_tokens, overlong
        self.counts: dict[str, int] = {}
        self.truncated = False

    def count(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def exceeded(self, source: str, name: str, length: int, limit: int | None) -> bool:
        """True if the excess has to be cut off."""
        if limit is None or length <= limit:
            return False
        if self.overlong == "error":
            raise DataError(source, f"{name} of {length} tokens, expected at most {limit}", "overlong")
        if self.overlong == "skip":
            raise _Skip
        self.truncated = True
        return True

    def cut(self, source: str, prompt_length: int) -> int:
        """Tokens to take off the beginning of a prompt."""
        over = self.exceeded(source, "prompt", prompt_length, self.max_prompt_tokens)
        return prompt_length - (self.max_prompt_tokens or 0) if over else 0


def _encode_prompt(record: PromptRecord, tokenizer: PreTrainedTokenizerBase, fit: _Limits, *_: bool) -> EncodedPrompt:
    ids = encode_prompt(tokenizer, record.prompt)
    limit = min((n for n in (fit.max_prompt_tokens, fit.max_tokens) if n is not None), default=None)
    if fit.exceeded(record.source, "prompt", len(ids), limit) and limit is not None:
        ids = ids[-limit:]
    return EncodedPrompt(ids, record)


def _encode_sequence(
    record: TextRecord | ChatRecord,
    tokenizer: PreTrainedTokenizerBase,
    fit: _Limits,
    response_only: bool,
    eos: bool,
) -> EncodedText:
    if isinstance(record, ChatRecord):
        ids, written = encode_chat(tokenizer, record.messages)
        learn = written if response_only else [True] * len(ids)
    else:
        ids = encode_text(tokenizer, record.text, eos=eos)
        learn = [True] * len(ids)
    if fit.exceeded(record.source, "sequence", len(ids), fit.max_tokens):
        ids, learn = ids[: fit.max_tokens], learn[: fit.max_tokens]
        if not any(learn[1:]):
            raise _Skip
    return EncodedText(ids, learn, record)


def _encode_pair(
    record: PairRecord, tokenizer: PreTrainedTokenizerBase, fit: _Limits, _: bool, eos: bool
) -> EncodedPair:
    chosen, rejected, length = encode_pair(tokenizer, record, eos=eos)
    cut = fit.cut(record.source, length)
    chosen, rejected, length = chosen[cut:], rejected[cut:], length - cut
    if fit.exceeded(record.source, "pair", max(len(chosen), len(rejected)), fit.max_tokens):
        chosen, rejected = chosen[: fit.max_tokens], rejected[: fit.max_tokens]
        if chosen == rejected or length >= min(len(chosen), len(rejected)):
            raise _Skip
    return EncodedPair(chosen, rejected, length, record)


def _encode_label(
    record: LabelRecord, tokenizer: PreTrainedTokenizerBase, fit: _Limits, _: bool, eos: bool
) -> EncodedLabel:
    ids, length = encode_label(tokenizer, record, eos=eos)
    cut = fit.cut(record.source, length)
    ids, length = ids[cut:], length - cut
    if fit.exceeded(record.source, "sequence", len(ids), fit.max_tokens):
        ids = ids[: fit.max_tokens]
    if length >= len(ids):  # nothing of the answer is left
        raise _Skip
    return EncodedLabel(ids, length, record)


_ENCODERS: dict[type, Callable[..., Any]] = {
    TextRecord: _encode_sequence,
    ChatRecord: _encode_sequence,
    PromptRecord: _encode_prompt,
    PairRecord: _encode_pair,
    LabelRecord: _encode_label,
}
