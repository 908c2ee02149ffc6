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
    DataError,
    TextRecord,
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
    with pytest.raises(DataError, match=r"^owner/name: not a dataset that can be loaded: RuntimeError: no network$"):
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
        ({"kind": "texts"}, "'kind' got 'texts', expected one of text, prompt, chat, pair, label"),
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


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.one_of(st.binary(max_size=40), st.text('{}[]":,\\ud8tex1e-.', max_size=40).map(str.encode))))
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
