from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data import (
    ChatRecord,
    DataError,
    PairRecord,
    PromptRecord,
    TextRecord,
    encode_chat,
    encode_pair,
    encode_prompt,
    encode_records,
    encode_text,
    read_records,
)
from rlhf_fast.data.files import MAX_DEPTH, MAX_LINE_BYTES

GOOD = b'{"text": "one"}\n'


@pytest.fixture
def write(tmp_path):
    def run(content: bytes | str, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return run


def rows(*objects: object) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


def test_jsonl_records_carry_text_place_and_other_fields(write):
    path = write(rows({"text": "a", "label": 1}, {"text": "b\n"}))
    records = read_records(path)
    assert list(records) == [TextRecord("a", f"{path}:1", {"label": 1}), TextRecord("b\n", f"{path}:2")]
    assert records[1:] == [records[1]]
    assert records.skipped == {}


@pytest.mark.parametrize(
    ("line", "where", "message", "reason"),
    [
        (b'{"text": "x"', "2:13", "malformed JSON", "malformed JSON"),
        (b'{"text": "x"} {}', "2:15", "malformed JSON", "malformed JSON"),
        (b"nonsense", "2:1", "malformed JSON", "malformed JSON"),
        (b"", "2", "blank line", "blank line"),
        (b"  \t\r", "2", "blank line", "blank line"),
        (b'{"text": "\xc3\xa9\xff"}', "2:12", "byte 0xff is not UTF-8", "invalid UTF-8"),
        (b'{"text": "a\x00b"}', "2:12", "NUL character", "NUL character"),
        (b'{"text": "\\ud800"}', "2", "lone surrogate \\ud800", "lone surrogate"),
        (b'{"text": "x", "meta": ["\\uDC00x"]}', "2", "lone surrogate \\udc00", "lone surrogate"),
        (b'{"text": "x", "n": NaN}', "2", "NaN is not JSON", "not a finite number"),
        (b'{"text": "x", "n": -Infinity}', "2", "-Infinity is not JSON", "not a finite number"),
        (b'{"text": "x", "n": 1e999}', "2", "1e999 is too large", "not a finite number"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "2", "a number of 5000 digits", "not a finite number"),
        (b'{"text": "x", "text": "y"}', "2", "key 'text' given twice", "duplicate key"),
        (b'{"text": "x", "m": {"a": 1, "a": 2}}', "2", "key 'a' given twice", "duplicate key"),
        (b"[1]", "2", "got a list, expected an object", "not an object"),
        (b'"text"', "2", "got a str, expected an object", "not an object"),
        (b"[" * 100_000, "2", f"nested deeper than {MAX_DEPTH} levels", "nested too deep"),
        (b'{"a":' * 100_000, "2", f"nested deeper than {MAX_DEPTH} levels", "nested too deep"),
        (b'{"txet": "x"}', "2", "field 'text' is missing; did you mean 'txet'?", "missing field text"),
        (b"{}", "2", "(expected text; got nothing)", "missing field text"),
        (b'{"text": 5}', "2", "field 'text' got an integer, expected text", "wrong type of text"),
        (b'{"text": null}', "2", "field 'text' got nothing, expected text", "wrong type of text"),
        (b'{"text": ["x"]}', "2", "field 'text' got a list, expected text", "wrong type of text"),
        (b'{"text": " \\n"}', "2", "field 'text' is empty", "empty text"),
    ],
)
def test_malformed_line_stops_with_place_or_is_counted(write, line, where, message, reason):
    path = write(GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:{where}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400 + len(path)
    records = read_records(path, on_error="skip")
    assert [r.source for r in records] == [f"{path}:1", f"{path}:3"]
    assert records.skipped == {reason: 1}


def test_surrogate_pairs_and_escaped_backslashes_are_fine(write):
    assert read_records(write(b'{"text": "\\ud83d\\ude00"}'))[0].text == "\N{GRINNING FACE}"
    assert read_records(write(b'{"text": "C:\\\\udata"}'))[0].text == "C:\\udata"


def test_bom_crlf_and_missing_last_line_end_are_accepted_without_loss(write):
    records = read_records(write(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b\\r\\n"}'))
    assert [r.text for r in records] == ["a", "b\r\n"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_other_encodings_are_refused_in_both_modes(write, encoding, name, mode):
    text = "text\nhello\n" if name == "d.csv" else '{"text": "hello"}\n'
    raw = text.encode(encoding)
    raw = b"\xfe\xff" + raw if encoding == "utf-16-be" else raw
    with pytest.raises(DataError, match=r":1:1: UTF-16 or UTF-32 text, expected UTF-8"):
        read_records(write(raw, name), on_error=mode)


@pytest.mark.parametrize(
    ("name", "content"), [("e.jsonl", b""), ("e.csv", b"text\n"), ("e.json", b"[]"), ("e.csv", b"")]
)
def test_empty_file_is_an_error(write, name, content):
    with pytest.raises(DataError, match=r"no records$"):
        read_records(write(content, name), on_error="skip")


def test_file_with_only_malformed_records_says_what_was_skipped(write):
    with pytest.raises(DataError, match=r"no records \(skipped: 2 malformed JSON\)"):
        read_records(write(b"x\ny\n"), on_error="skip")


def test_line_over_16_mb_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"text": "')
        file.seek(300 * 2**20, os.SEEK_CUR)  # a hole: no disk space, but 300 MB to read
        file.write(b'"}\n' + GOOD)
    code = (
        "import resource, sys; from rlhf_fast.data import read_records\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "r = read_records(sys.argv[1], on_error='skip'); print(len(r), r.skipped, r[1].source)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    counts, grown = done.stdout.splitlines()
    assert counts == f"2 {{'line too long': 1}} {path}:3"
    assert int(grown) < 120
    with pytest.raises(DataError, match=rf"huge\.jsonl:2: a line of more than {MAX_LINE_BYTES} bytes"):
        read_records(path)


def test_line_just_under_the_limit_is_read(write):
    text = "x" * (MAX_LINE_BYTES - 20)
    assert read_records(write(json.dumps({"text": text}) + "\n"))[0].text == text


def test_deep_nesting_inside_strings_does_not_count(write):
    assert read_records(write(rows({"text": "[" * 1000 + '"{'})))[0].text == "[" * 1000 + '"{'


def test_json_array_gives_line_numbers(write):
    path = write('[\n {"text": "a"},\n\n {"text":\n "b [,] \\" "} ]\n', "data.json")
    assert [(r.text, r.source) for r in read_records(path)] == [("a", f"{path}:2"), ('b [,] " ', f"{path}:4")]
    path = write('{"text": "lines"}\n{"text": "in .json"}\n', "data.json")
    assert [r.text for r in read_records(path)] == ["lines", "in .json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', ":1:16: malformed JSON: expected a comma"),
        ('[{"text": "a"},]', ":1:16: malformed JSON: expected an object"),
        ('[{"text": "a"}', ":1:15: malformed JSON: expected a comma"),
        ('[{"text": "a"}] x', ":1:16: malformed JSON: text after the array"),
        ('[\n{"text": "a"},\n{"text": ', ":3:1: malformed JSON: expected an object"),
        ('[\n{"text": "a"},\n{"text": \n x}]', ":4:2: malformed JSON: Expecting value"),
        ("[1]", ":1: got a int, expected an object"),
        ("[" * 100_000, ":1:2: malformed JSON"),
        ("[" * 100_000 + "]" * 100_000, ":1: nested deeper"),
    ],
)
def test_malformed_json_array_names_line_and_column(write, text, message):
    path = write(text, "data.json")
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(path + message)


def test_invalid_utf8_in_a_json_array_names_line_and_column(write):
    with pytest.raises(DataError, match=r"data\.json:2:2: byte 0x80 is not UTF-8"):
        read_records(write(b'[\n"\x80"]', "data.json"))


def test_csv_reads_quotes_line_breaks_and_exact_content(write, tmp_path):
    path = tmp_path / "d.csv"
    texts = ["plain", 'a "quoted", one', "two\nlines", "two\r\nlines", "\N{GRINNING FACE}", "x" * 200_000]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows([["1", t] for t in texts])
    before = csv.field_size_limit()
    records = read_records(path)
    assert [r.text for r in records] == texts
    assert [int(r.source.rsplit(":", 1)[1]) for r in records] == [2, 3, 4, 6, 8, 9]
    assert records[0].meta == {"label": "1"}
    assert csv.field_size_limit() == before
    assert read_records(write("a\ttext\n1\tx, y\n", "d.tsv"))[0].text == "x, y"


@pytest.mark.parametrize(
    ("row", "message", "reason"),
    [
        (b"1", "got 1 columns, expected 2: n, text", "wrong number of columns"),
        (b"1,x,y", "got 3 columns, expected 2: n, text", "wrong number of columns"),
        (b"", "blank line", "blank line"),
        (b"1,\xff", "byte 0xff is not UTF-8", "invalid UTF-8"),
        (b"1,a\x00b", "NUL", "NUL character"),
        (b'1,"x"y', "malformed CSV", "malformed CSV"),
        (b"1,", "field 'text' is empty", "empty text"),
    ],
)
def test_malformed_csv_row_stops_with_line_or_is_counted(write, row, message, reason):
    path = write(b"n,text\n1,a\n" + row + b"\n1,b\n", "d.csv")
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    records = read_records(path, on_error="skip")
    assert [r.text for r in records] == ["a", "b"]
    assert records.skipped == {reason: 1}


def test_csv_with_an_open_quote_or_twofold_column_is_refused(write):
    with pytest.raises(DataError, match=r"d\.csv:2: malformed CSV"):
        read_records(write('text\n"never closed\n\n', "d.csv"))
    for mode in ("raise", "skip"):
        with pytest.raises(DataError, match=r"d\.csv:1: got columns \['text', 'text'\], expected distinct"):
            read_records(write("text,text\na,b\n", "d.csv"), on_error=mode)


def test_parquet_rows_and_damage(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    table = pyarrow.table({"text": ["a", "b"], "messages": [[{"role": "user", "content": "q"}]] * 2})
    pyarrow.parquet.write_table(table, path)
    records = read_records(path)
    assert [(r.text, r.source) for r in records] == [("a", f"{path}:1"), ("b", f"{path}:2")]
    assert records.size == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged Parquet file"):
        read_records(path)


def test_saved_dataset_folder_is_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = str(tmp_path / "saved")
    part = datasets.Dataset.from_dict
    datasets.DatasetDict(train=part({"text": ["a"]}), test=part({"text": ["b", "c"]})).save_to_disk(folder)
    assert [r.text for r in read_records(folder)] == ["a"]
    assert [r.text for r in read_records(folder, split="test")] == ["b", "c"]
    assert read_records(folder).fingerprint != read_records(folder, split="test").fingerprint
    with pytest.raises(DataError, match="not a dataset that can be loaded"):
        read_records(folder, split="nope")


def test_dataset_by_name_goes_through_load_dataset_without_remote_code(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_records("owner/name")[0] == TextRecord("a", "owner/name:1")
    assert calls == [(("owner/name",), {"split": "train"})]

    def fail(*arguments, **options):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"^owner/name: not a dataset that can be loaded: RuntimeError: no network$"
    ):
        read_records("owner/name")


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.pkl", "m.txt", "noname"])
def test_file_of_another_type_is_refused_unopened(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04.")
    path.chmod(0)
    with pytest.raises(DataError, match=r"expected one of \.jsonl"):
        read_records(path)


def test_missing_file_is_named_and_not_looked_up_as_a_dataset(tmp_path):
    for name in ("absent.jsonl", "absent"):
        with pytest.raises(DataError, match=r"absent.*: [Nn]o such file"):
            read_records(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "texts"}, "'kind' got 'texts', expected one of text, prompt, chat, pair"),
        ({"on_error": "ignore"}, "'on_error' got 'ignore'"),
        ({"limit": 0}, "'limit' got 0"),
        ({"split": "train"}, "'split' got 'train' for a file"),
        ({"fields": {"txt": "review"}}, "'fields' got 'txt', expected one of text"),
    ],
)
def test_wrong_argument_is_named(write, options, message):
    with pytest.raises(ValueError, match="read_records") as caught:
        read_records(write(GOOD), **options)
    assert message in str(caught.value)


def test_fields_rename_and_limit_stops_early(write):
    path = write(rows({"review": "a"}, {"review": "b"}, "broken"))
    records = read_records(path, fields={"text": "review"}, limit=2)
    assert [r.text for r in records] == ["a", "b"]
    assert records[0].meta == {}


def test_fingerprint_is_the_sha256_of_the_whole_file(write):
    import hashlib

    content = GOOD * 3
    path = write(content)
    whole, part = read_records(path), read_records(path, limit=1)
    assert whole.fingerprint == part.fingerprint == hashlib.sha256(content).hexdigest()
    assert whole.size == part.size == len(content)
    assert read_records(write(content + GOOD)).fingerprint != whole.fingerprint


@pytest.mark.parametrize("change", ["grow", "shrink", "replace", "remove"])
def test_file_that_changes_while_read_is_an_error(tmp_path, monkeypatch, change):
    from rlhf_fast.data import files

    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD * 10)
    original = files._text

    def text(*arguments):
        if arguments[1] == 5:
            if change == "grow":
                path.open("ab").write(GOOD)
            elif change == "shrink":
                os.truncate(path, 7 * len(GOOD))
            elif change == "remove":
                path.unlink()
            else:
                other = tmp_path / "other"
                other.write_bytes(GOOD * 10)
                os.replace(other, path)
        return original(*arguments)

    monkeypatch.setattr(files, "_text", text)
    with pytest.raises(DataError, match="while it was read"):
        read_records(path)


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


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(
        st.one_of(st.binary(max_size=40), st.text('{}[]":,\\ud8tex1e-.', max_size=40).map(str.encode))
    )
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_any_bytes_give_records_or_one_data_error(tmp_path_factory, suffix, lines):
    path = tmp_path_factory.mktemp("data") / f"d{suffix}"
    path.write_bytes(b"text\n" * (suffix == ".csv") + b"\n".join(lines))
    for mode in ("raise", "skip"):
        try:
            records = read_records(path, on_error=mode)
        except DataError as error:
            assert str(error).startswith(str(path))
            assert len(str(error).splitlines()) == 1
        else:
            assert all(r.text.strip() and r.text.encode() for r in records)


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
    assert encode_records([same], tokenizer, max_tokens=3, overlong="truncate").counts == {
        "overlong skipped": 1
    }
