from __future__ import annotations

import pytest

from rlhf_fast.data import (
    ChatRecord,
    DataError,
    LabelRecord,
    PairRecord,
    PromptRecord,
    TextRecord,
    encode_chat,
    encode_label,
    encode_pair,
    encode_prompt,
    encode_records,
    encode_text,
)

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, BOS before a text, ChatML-like template with a line break after end-of-turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": special[2:]})
    made.chat_template = TEMPLATE
    return made


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_prompt_of_text_gets_bos_and_no_eos(tokenizer):
    assert text_of(tokenizer, encode_prompt(tokenizer, "hi")) == "<s>hi"
    assert text_of(tokenizer, encode_text(tokenizer, "hi")) == "<s>hi</s>"
    assert text_of(tokenizer, encode_text(tokenizer, "hi", eos=False)) == "<s>hi"
    assert text_of(tokenizer, encode_text(tokenizer, "hi</s>")) == "<s>hi</s>"


def test_prompt_of_messages_is_the_chat_template_with_generation_prompt(tokenizer):
    assert text_of(tokenizer, encode_prompt(tokenizer, [USER])) == "<|user|>q</s>\n<|assistant|>"


def test_messages_without_a_chat_template_are_an_error(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(plain, [USER])
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(DataError, match=r"^f:1: render: the chat template refuses the messages: only users$"):
        encode_records([ChatRecord([USER, REPLY], "f:1")], refusing)


def test_chat_marks_exactly_what_the_assistant_wrote(tokenizer):
    system = {"role": "system", "content": "s"}
    ids, written = encode_chat(tokenizer, [system, USER, REPLY, USER, OTHER, USER])
    rendered = tokenizer.apply_chat_template([system, USER, REPLY, USER, OTHER, USER], tokenize=False)
    assert text_of(tokenizer, ids) == rendered
    marked = [text_of(tokenizer, [t]) for t, w in zip(ids, written, strict=True) if w]
    assert marked == ["a", "</s>", "b", "</s>"]


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    import copy

    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_chat(rewriting, [USER, REPLY])


def test_pair_shares_its_prompt_and_ends_with_eos(tokenizer):
    messages = PairRecord([USER], [REPLY], [OTHER], "f:1")
    chosen, rejected, length = encode_pair(tokenizer, messages)
    assert text_of(tokenizer, chosen) == "<|user|>q</s>\n<|assistant|>a</s>"
    assert text_of(tokenizer, rejected[length:]) == "b</s>"
    assert chosen[:length] == rejected[:length] == encode_prompt(tokenizer, [USER])
    texts = PairRecord("p", "a", "b", "f:1")
    assert [text_of(tokenizer, t) for t in encode_pair(tokenizer, texts)[:2]] == ["<s>pa</s>", "<s>pb</s>"]
    assert text_of(tokenizer, encode_pair(tokenizer, texts, eos=False)[0]) == "<s>pa"
    whole = PairRecord("", "a", "b", "f:1")
    assert [text_of(tokenizer, t) for t in encode_pair(tokenizer, whole)[:2]] == ["<s>a</s>", "<s>b</s>"]
    assert encode_pair(tokenizer, whole)[2] == 0


def test_overlong_policies_stop_skip_or_cut_and_count(tokenizer):
    records = [PromptRecord("abc", "f:1"), PromptRecord("abcdefgh", "f:2")]
    with pytest.raises(DataError, match=r"^f:2: prompt of 9 tokens, expected at most 5$"):
        encode_records(records, tokenizer, max_prompt_tokens=5)
    skipped = encode_records(records, tokenizer, max_prompt_tokens=5, overlong="skip")
    assert [e.record.source for e in skipped] == ["f:1"]
    assert skipped.counts == {"overlong skipped": 1}
    cut = encode_records(records, tokenizer, max_prompt_tokens=5, overlong="truncate")
    assert [text_of(tokenizer, e.input_ids) for e in cut] == ["<s>abc", "defgh"]
    assert cut.counts == {"overlong truncated": 1}
    with pytest.raises(ValueError, match="'overlong' got 'cut'"):
        encode_records(records, tokenizer, overlong="cut")


def test_texts_keep_their_beginning_and_chats_without_an_answer_left_are_skipped(tokenizer):
    texts = encode_records([TextRecord("abcdef", "f:1")], tokenizer, max_tokens=4, overlong="truncate")
    assert text_of(tokenizer, texts[0].input_ids) == "<s>abc"
    assert texts[0].learn == [True] * 4
    long = ChatRecord([{"role": "user", "content": "x" * 20}, REPLY], "f:1")
    chats = encode_records([long], tokenizer, max_tokens=10, overlong="truncate")
    assert (len(chats), chats.counts) == (0, {"overlong skipped": 1})
    whole = encode_records([ChatRecord([USER, REPLY], "f:1")], tokenizer, response_only=False)
    assert all(whole[0].learn)


def test_pairs_cut_the_prompt_from_the_left_then_the_answers_from_the_right(tokenizer):
    pair = PairRecord("abcdef", "xyz", "uvw", "f:1")
    cut = encode_records([pair], tokenizer, max_prompt_tokens=2, max_tokens=4, overlong="truncate")
    assert text_of(tokenizer, cut[0].chosen_ids) == "efxy"
    assert text_of(tokenizer, cut[0].rejected_ids) == "efuv"
    assert cut[0].prompt_length == 2
    assert cut.counts == {"overlong truncated": 1}
    same = PairRecord("p", "xa", "xb", "f:1")
    assert encode_records([same], tokenizer, max_tokens=3, overlong="truncate").counts == {"overlong skipped": 1}


def test_a_labelled_answer_has_the_tokens_of_one_in_a_pair(tokenizer):
    for prompt, answer, other in (("p", "a", "b"), ([USER], [REPLY], [OTHER])):
        chosen, _, length = encode_pair(tokenizer, PairRecord(prompt, answer, other, "f:1"))
        assert encode_label(tokenizer, LabelRecord(prompt, answer, True, "f:1")) == (chosen, length)
    assert text_of(tokenizer, encode_label(tokenizer, LabelRecord("p", "a", True, "f:1"), eos=False)[0]) == "<s>pa"


def test_labelled_answers_are_cut_like_pairs_and_left_out_when_nothing_is_left(tokenizer):
    record = LabelRecord("abcdef", "xyz", False, "f:1")
    cut = encode_records([record], tokenizer, max_prompt_tokens=2, max_tokens=4, overlong="truncate")
    assert text_of(tokenizer, cut[0].input_ids) == "efxy" and cut[0].prompt_length == 2
    assert cut.counts == {"overlong truncated": 1}
    assert encode_records([record], tokenizer, max_tokens=7, overlong="truncate").counts == {"overlong skipped": 1}
    with pytest.raises(DataError, match=r"^f:1: sequence of 11 tokens, expected at most 10$"):
        encode_records([record], tokenizer, max_tokens=10)
