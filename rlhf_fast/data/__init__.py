"""Readers of texts, prompts, chats and preference pairs, and their tokens."""

from __future__ import annotations

from rlhf_fast.data.encode import (
    Encoded,
    EncodedPair,
    EncodedPrompt,
    EncodedText,
    encode_chat,
    encode_pair,
    encode_prompt,
    encode_records,
    encode_text,
)
from rlhf_fast.data.files import DataError
from rlhf_fast.data.records import (
    ChatRecord,
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
    "EncodedPair",
    "EncodedPrompt",
    "EncodedText",
    "PairRecord",
    "PromptRecord",
    "Record",
    "Records",
    "TextRecord",
    "encode_chat",
    "encode_pair",
    "encode_prompt",
    "encode_records",
    "encode_text",
    "read_records",
]
