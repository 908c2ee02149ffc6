"""The command line under faults: cases 57-59 of the fault list. What a process shows is tested in one."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_tiny

from rlhf_fast import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    (folder / "texts.jsonl").write_text(json.dumps({"text": "the film was good."}) + "\n")
    (folder / "bad.jsonl").write_text('{"text": "x"}\nnonsense\n')
    return folder


def sft(folder: Path, run: Path | str, *more: str) -> list[str]:
    words = f"sft --model.path {folder}/model --data.path {folder}/texts.jsonl --model.dtype float32 --run.threads 1"
    return [*words.split(), "--run.output_dir", str(run), "--micro_batch_size", "1", "--batch_size", "1", *more]


def test_case_59_a_run_that_is_done_exits_with_0_and_tells_where(folder, tmp_path, capsys):
    assert cli.main(sft(folder, tmp_path / "run")) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"{tmp_path}/run/adapter"


USAGE = {
    "unknown command": (["stf"], "unknown command 'stf', expected one of demo, sft"),
    "unknown setting": (["sft", "--optim.learning_rate", "1"], "optim.learning_rate: unknown setting"),
    "missing setting": (["sft"], "missing, expected"),
    "no such settings file": (["sft", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
    "two values": (["sft", "--epochs", "1", "2"], "--epochs: got 2 values (1 2), expected one"),
    "wrong type": (sft(Path("x"), "y", "--epochs", "many"), "epochs: got 'many', expected"),
}


@pytest.mark.parametrize("kind", USAGE)
def test_case_59_what_cannot_be_understood_exits_with_2_and_one_line(kind, capsys):
    arguments, message = USAGE[kind]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("rlhf-fast: ") and message in err


def test_case_59_a_run_that_fails_exits_with_1_and_one_line_or_a_traceback_if_asked(folder, tmp_path, capsys):
    arguments = [a.replace("texts.jsonl", "bad.jsonl") for a in sft(folder, tmp_path / "run")]
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-2].startswith(f"rlhf-fast: {folder}/bad.jsonl:2:1: malformed JSON")
    assert err[-1] == "rlhf-fast: add --debug for the traceback" and not any("Traceback" in line for line in err)
    assert cli.main([*arguments, "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


class Faults:
    """Commands that end in every way a command can."""

    @staticmethod
    def interrupted() -> None:
        raise KeyboardInterrupt

    @staticmethod
    def signalled() -> None:
        raise SystemExit(143)

    @staticmethod
    def told() -> None:
        raise SystemExit("a text")

    @staticmethod
    def piped() -> None:
        raise BrokenPipeError

    @staticmethod
    def silent() -> None:
        raise ValueError

    @staticmethod
    def long() -> None:
        raise ValueError("one\n  two\nthree")


@pytest.mark.parametrize(
    ("name", "status", "line"),
    [
        ("interrupted", 130, ""),
        ("signalled", 143, ""),
        ("told", 1, ""),
        ("piped", 1, ""),
        ("silent", 1, "ValueError"),
        ("long", 1, "one two three"),
    ],
)
def test_case_59_every_end_has_its_status(monkeypatch, capsys, name, status, line):
    fault = getattr(Faults, name)
    monkeypatch.setattr(cli, "_import", lambda *_: lambda rest: fault())
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # given up after a broken pipe
    doctor = dataclasses.replace(cli.COMMANDS["doctor"], settings=None)
    monkeypatch.setitem(cli.COMMANDS, "doctor", doctor)
    assert cli.main(["doctor"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith(f"rlhf-fast: {line}\n") if line else shown == ""


def test_case_57_a_used_folder_is_refused_and_one_that_no_run_made_is_never_emptied(folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for more in ([], ["--run.overwrite"]):
        assert cli.main(sft(folder, tmp_path / "other" / ".." / "mine", *more)) == 1
        assert ("was not made by a run" if more else "is not empty; give") in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert cli.main(sft(folder, tmp_path / "run")) == 0
    assert cli.main(sft(folder, tmp_path / "run")) == 1
    assert "is not empty; give --run.resume, --run.overwrite" in capsys.readouterr().err
    assert cli.main(sft(folder, tmp_path / "run", "--run.overwrite", "--run.resume")) == 2
    assert cli.main(sft(folder, tmp_path / "run", "--run.overwrite")) == 0


def test_case_58_an_output_without_a_reader_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rlhf_fast", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_case_58_an_output_that_cannot_spell_a_name_fails_no_run(folder, tmp_path, monkeypatch):
    run = tmp_path / "\u00e9"
    for status in (0, 1):  # done, and refused as used
        out, err = (io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2))
        with monkeypatch.context() as patch:
            for name, value in {"LANG": "C", "LC_ALL": "C", "TERM": "dumb"}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert cli.main(sft(folder, run)) == status
            out.flush()
            err.flush()
        shown = (out if status == 0 else err).buffer.getvalue().decode("ascii")
        assert (f"{tmp_path}/\\xe9/adapter" if status == 0 else f"{tmp_path}/\\xe9: is not empty") in shown
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
