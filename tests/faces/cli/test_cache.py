"""`ropewalk cache`, and --cache of generate and chat: a text is read once."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_writer import write_checkpoint
from ropewalk.faces.cli.main import main
from tokenizer_writer import write_sentencepiece

TEXT = "A ropewalk is a long straight lane where rope is made. " * 8
GREEDY = ["--temperature", "0", "--max-new-tokens", "8"]
BACKEND = ["--backend", "reference"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, {"vocab_size": 400, "max_position_embeddings": 1024})
    return write_sentencepiece(folder)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "walk.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def saved(folder: Path, text_file: Path, tmp_path: Path, capsys) -> Path:
    out = tmp_path / "walk.safetensors"
    assert main(["cache", "save", str(folder), str(text_file), "--out", str(out), *BACKEND]) == 0
    capsys.readouterr()
    return out


def type_in(monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def test_a_saved_text_is_continued_without_reading_it_again(folder: Path, saved: Path, capsys) -> None:
    options = ["--prompt", " What is it?", *GREEDY, *BACKEND]
    assert main(["generate", str(folder), "--cache", str(saved), *options]) == 0
    cached = capsys.readouterr()
    count = int(cached.err.split("walk.safetensors: ")[1].split()[0])
    assert f"{saved}: {count} of its {count} tokens were not read again" in cached.err
    assert f"({count} reused)" in cached.err
    assert main(["generate", str(folder), "--prompt", TEXT + " What is it?", *GREEDY, *BACKEND]) == 0
    plain = capsys.readouterr()
    assert "(0 reused)" in plain.err
    assert cached.out and plain.out


def test_a_prompt_that_begins_with_the_text_is_taken_as_it_is(folder: Path, saved: Path, capsys) -> None:
    whole = TEXT + "What is it?"
    assert main(["generate", str(folder), "--cache", str(saved), "--prompt", whole, *GREEDY, *BACKEND]) == 0
    cached = capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", whole, *GREEDY, *BACKEND]) == 0
    assert capsys.readouterr().out == cached.out
    assert "(0 reused)" not in cached.err


def test_the_text_is_not_overwritten_by_what_is_kept_of_it(folder: Path, text_file: Path, capsys) -> None:
    before = text_file.read_bytes()
    assert main(["cache", "save", str(folder), str(text_file), "--out", str(text_file), *BACKEND]) == 2
    assert "is the text itself" in capsys.readouterr().err
    assert text_file.read_bytes() == before


def test_without_a_prompt_the_text_itself_is_continued(folder: Path, saved: Path, capsys, monkeypatch) -> None:
    type_in(monkeypatch, "")
    assert main(["generate", str(folder), "--cache", str(saved), *GREEDY, *BACKEND]) == 0
    cached = capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", TEXT, *GREEDY, *BACKEND]) == 0
    assert capsys.readouterr().out == cached.out


def test_show_says_what_a_file_is(folder: Path, saved: Path, capsys) -> None:
    assert main(["cache", "show", str(saved), "--model", str(folder)]) == 0
    shown = capsys.readouterr().out
    for part in ("walk.txt", "a text", "'A ropewalk is", folder.name, "llama", "fp16", "reference", "none, original"):
        assert part in shown
    assert main(["cache", "show", str(saved), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layer order"] == "0-1" and "begins" not in facts  # the embedded model is another one


def test_show_does_without_the_words_where_the_tokenizer_is_another(saved: Path, tmp_path: Path, capsys) -> None:
    assert main(["cache", "show", str(saved), "--model", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "begins" not in captured.out and "the first words are not shown" in captured.err


def test_a_conversation_goes_on_after_a_saved_system_text(
    folder: Path, text_file: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    out, talk = tmp_path / "system", tmp_path / "talk"
    plain = ["--chat-template", "plain", *BACKEND]
    assert main(["cache", "save", str(folder), str(text_file), "--out", str(out), "--system", *plain]) == 0
    saves = f"/save {talk}\n/save {tmp_path / 'none' / 'x'}\n/save ~no-such-person/x\n/save\n"
    type_in(monkeypatch, f"What is it?\n{saves}/exit\n")
    assert main(["chat", str(folder), "--cache", str(out), *GREEDY, *plain]) == 0
    first = capsys.readouterr()
    assert "(0 reused)" not in first.err
    assert f"{talk}: " in first.err and "ropewalk: error: " in first.err and "/save FILE" in first.err
    assert "~no-such-person/x: this machine knows no home folder" in first.err
    type_in(monkeypatch, "And then?\n/exit\n")
    assert main(["chat", str(folder), "--cache", str(talk), *GREEDY, *plain]) == 0
    second = capsys.readouterr()
    assert "(0 reused)" not in second.err
    type_in(monkeypatch, "What is it?\nAnd then?\n/exit\n")
    assert main(["chat", str(folder), "--system", TEXT, *GREEDY, *plain]) == 0
    assert capsys.readouterr().out == first.out + second.out


@pytest.mark.parametrize("module, command", [("main", "generate"), ("chat", "chat")])
def test_a_file_that_is_no_cache_is_refused_before_the_model_is_loaded(
    module: str, command: str, folder: Path, text_file: Path, saved: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"ropewalk.faces.cli.{module}.load", lambda *_, **__: pytest.fail("it was loaded"))
    prompt = ["--prompt", "x"] if command == "generate" else []
    assert main([command, str(folder), "--cache", str(text_file), *prompt]) == 2
    assert "is damaged, truncated, or not a safetensors file" in capsys.readouterr().err
    if command == "chat":
        assert main([command, str(folder), "--cache", str(saved)]) == 2
        assert "holds a text and no conversation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "FOLDER", "--cache", "none", "--prompt", "x"], "none cannot be read: No such file"),
        (["generate", "FOLDER", "--cache", "SAVED", "--prompt", "x", "--rope-theta", "500"], "rotated in another way"),
        (["generate", "--cache", "SAVED", "--prompt", "x"], "was saved with another model or other settings"),
        (["chat", "FOLDER", "--cache", "SAVED"], "holds a text and no conversation"),
        (["chat", "FOLDER", "--cache", "SAVED", "--system", "x"], "cannot be used together"),
        (["cache", "show", "TEXT"], "is damaged, truncated, or not a safetensors file"),
        (["cache", "save", "FOLDER", "EMPTY", "--out", "x"], "holds no text"),
        (["cache", "save", "FOLDER", "TEXT", "--out", "none/x"], "none/x cannot be written: its folder does not exist"),
        (["cache", "save", "FOLDER", "TEXT", "--out", "."], "\\. cannot be written: it is a folder"),
        (["serve", "FOLDER", "--cache-folder-size", "1GiB", "--port", "0"], "--cache-folder-size needs --cache-folder"),
        (["serve", "FOLDER", "--cache-folder", "TEXT", "--port", "0"], "the cache folder .* cannot be made"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], message: str, folder: Path, saved: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "empty").write_text(" \n")
    names = {"FOLDER": folder, "SAVED": saved, "TEXT": text_file, "EMPTY": tmp_path / "empty"}
    filled = [str(names.get(argument, argument)) for argument in arguments]
    assert main([*filled, *([] if arguments[1] == "show" else BACKEND)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said


def test_the_command_works_from_the_outside(text_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ropewalk"]
    out = tmp_path / "walk.safetensors"
    subprocess.run([*command, "cache", "save", text_file, "--out", out], check=True, timeout=300)
    run = subprocess.run(
        [*command, "generate", "--cache", out, "--prompt", "x", "--max-new-tokens", "3"],
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert "tokens were not read again" in run.stderr
