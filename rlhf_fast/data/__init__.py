"""Readers of texts, prompts, chats, preference pairs and labelled answers, and their tokens."""

from __future__ import annotations

from rlhf_fast.data.encode import (
    Encoded,
    EncodedLabel,
    EncodedPair,
    EncodedPrompt,
    EncodedText,
    encode_chat,
    encode_label,
    encode_pair,
    encode_prompt,
    encode_records,
    encode_text,
)
from rlhf_fast.data.files import DataError
from rlhf_fast.data.records import (
    ChatRecord,
    LabelRecord,
    PairRecord,
    PromptRecord,
    Record,
    Records,
    TextRecord,
    read_records,
)

__all__ = [
    "ChatRecord",
    "DataError",
    "Encoded",
    "EncodedLabel",
    "EncodedPair",
    "EncodedPrompt",
    "EncodedText",
    "LabelRecord",
    "PairRecord",
    "PromptRecord",
    "Record",
    "Records",
    "TextRecord",
    "encode_chat",
    "encode_label",
    "encode_pair",
    "encode_prompt",
    "encode_records",
    "encode_text",
    "read_records",
]
