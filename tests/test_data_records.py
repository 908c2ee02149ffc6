from __future__ import annotations

import json

import pytest

from rlhf_fast.data import (
    DataError,
    LabelRecord,
    PairRecord,
    PromptRecord,
    read_records,
)


@pytest.fixture
def write(tmp_path):
    def run(content: bytes | str, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return run


def rows(*objects: object) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


def test_prompts_are_texts_or_messages(write):
    path = write(rows({"prompt": "p", "id": 3}, {"prompt": [USER]}))
    assert list(read_records(path, "prompt")) == [
        PromptRecord("p", f"{path}:1", {"id": 3}),
        PromptRecord([USER], f"{path}:2", {}),
    ]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "field 'prompt' is empty"),
        (" ", "field 'prompt' is empty"),
        ([], "field 'prompt' is empty"),
        ([{"role": "user", "content": ""}], "field 'prompt' is empty"),
        (3, "field 'prompt' got an integer, expected text or a list of messages"),
        (["x"], "prompt[0] got a str, expected {role, content}"),
        ([{"role": "user"}], "prompt[0].content got nothing, expected text"),
        ([{"role": "user", "content": ["x"]}], "prompt[0].content got a list, expected text"),
        ([{"role": "human", "content": "x"}], "prompt[0].role got 'human', expected one of system"),
        (
            [{"role": "user", "content": "x", "contnt": "y"}],
            "prompt[0] got field 'contnt', expected role, content",
        ),
        ([USER, REPLY], "prompt ends with an assistant message"),
    ],
)
def test_malformed_prompt_says_what_is_expected(write, prompt, message):
    with pytest.raises(DataError) as caught:
        read_records(write(rows({"prompt": prompt})), "prompt")
    assert message in str(caught.value)


def test_chats_are_messages_or_prompt_and_completion(write):
    path = write(
        rows(
            {"messages": [USER, REPLY]},
            {"prompt": "q", "completion": "a"},
            {"prompt": [USER], "completion": [REPLY]},
        )
    )
    assert [r.messages for r in read_records(path, "chat")] == [[USER, REPLY]] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [REPLY, USER]}, "begin with the assistant"),
        ({"messages": "x"}, "got a str, expected a list of messages"),
        ({"prompt": "q"}, "field 'messages' is missing"),
    ],
)
def test_malformed_chat_says_what_is_expected(write, row, message):
    with pytest.raises(DataError) as caught:
        read_records(write(rows(row)), "chat")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", "a", "b", None)),
        ({"chosen": "a", "rejected": "b", "margin": 2}, ("", "a", "b", 2.0)),
        ({"prompt": "", "chosen": "a", "rejected": "b", "margin": None}, ("", "a", "b", None)),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}, ([USER], [REPLY], [OTHER], None)),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, ([USER], [REPLY], [OTHER], None)),
        ({"prompt": "q", "chosen": [REPLY], "rejected": [OTHER]}, ([USER], [REPLY], [OTHER], None)),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ([USER], [REPLY], [OTHER], None)),
        (
            {"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, REPLY, USER, OTHER]},
            ([USER, REPLY, USER], [REPLY], [OTHER], None),
        ),
    ],
)
def test_every_form_of_a_preference_pair(write, row, expected):
    path = write(rows(row))
    assert read_records(path, "pair")[0] == PairRecord(*expected[:3], f"{path}:1", expected[3])


def test_csv_pairs_have_numeric_margins(write):
    path = write("prompt,chosen,rejected,margin\np,a,b,0.5\np,a,b,\n", "d.csv")
    assert [r.margin for r in read_records(path, "pair")] == [0.5, None]


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_pairs_without_a_preference_are_skipped_and_counted_in_both_modes(write, mode):
    good = {"chosen": "a", "rejected": "b"}
    bad = [("a", "a"), (None, "b"), ("a", ""), ("a", []), ([USER, REPLY], [USER, REPLY])]
    path = write(rows(good, *({"prompt": "p", "chosen": c, "rejected": r} for c, r in bad)))
    records = read_records(path, "pair", on_error=mode)
    assert len(records) == 1
    assert records.skipped == {"equal answers": 2, "missing answer": 3}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        ({"chosen": 1, "rejected": "b"}, "field 'chosen' got an integer"),
        ({"chosen": [USER], "rejected": [USER, OTHER]}, "chosen does not end with an assistant message"),
        (
            {"chosen": "a", "rejected": "b", "margin": "high"},
            "field 'margin' got a str, expected a finite number",
        ),
        ({"chosen": "a", "rejected": "b", "margin": True}, "field 'margin' got true/false"),
    ],
)
def test_malformed_pair_says_what_is_expected(write, row, message):
    with pytest.raises(DataError) as caught:
        read_records(write(rows(row)), "pair")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "a", "label": True, "id": 7}, ("p", "a", True, {"id": 7})),
        ({"prompt": [USER], "completion": [REPLY], "label": False}, ([USER], [REPLY], False, {})),
        ({"prompt": [USER], "completion": "a", "label": 0}, ([USER], [REPLY], False, {})),
        ({"prompt": "q", "completion": [REPLY], "label": 1.0}, ([USER], [REPLY], True, {})),
    ],
)
def test_every_form_of_a_labelled_answer(write, row, expected):
    path = write(rows(row))
    prompt, completion, label, meta = expected
    found = read_records(path, "label")[0]
    assert found == LabelRecord(prompt, completion, label, f"{path}:1", meta) and found.label is label


def test_labels_of_tables_are_texts_and_columns_may_have_other_names(write):
    path = write("question,answer,good\np,a,True\np,b,false\np,c,1\np,d, 0\n", "d.csv")
    fields = {"prompt": "question", "completion": "answer", "label": "good"}
    assert [r.label for r in read_records(path, "label", fields=fields)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": "a"}, "field 'label' is missing (expected prompt, completion, label; got"),
        ({"prompt": "p", "completion": "a", "label": 2}, "field 'label' got 2, expected true or false"),
        ({"prompt": "p", "completion": "a", "label": "good"}, "field 'label' got 'good', expected true or false"),
        ({"prompt": "p", "completion": "a", "label": None}, "field 'label' got nothing"),
        ({"prompt": "p", "completion": "a", "label": [True]}, "field 'label' got a list"),
        ({"prompt": "p", "completion": " ", "label": True}, "field 'completion' is empty"),
        ({"completion": "a", "label": True}, "field 'prompt' is missing"),
        ({"prompt": [USER], "completion": [USER], "label": True}, "completion does not end with an assistant message"),
    ],
)
def test_malformed_label_says_what_is_expected_and_where(write, row, message):
    path = write(rows({"prompt": "p", "completion": "a", "label": True}, row))
    with pytest.raises(DataError) as caught:
        read_records(path, "label")
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}:2")
    assert sum(read_records(path, "label", on_error="skip").skipped.values()) == 1
