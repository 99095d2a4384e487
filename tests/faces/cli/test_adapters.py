"""The options that name adapters, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.faces.cli.main import main
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json

RUN = ["--backend", "reference", "--compute", "exact"]
GENERATE = ["--prompt", "The quick", "--temperature", "0", "--max-new-tokens", "6", "--ignore-eos", *RUN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_byte_level_json(tmp_path_factory.mktemp("model"))
    exact = write_checkpoint(path, {"vocab_size": load_tokenizer(path).vocab_size}, dense=True)
    for seed, name in enumerate(("storm", "poet", "odd:name")):
        write_adapter(path / name, path, exact, seed)
    return path


def generated(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main(["generate", str(folder), *GENERATE, *options])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_adapters_change_the_text_and_weights_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storm, poet = str(folder / "storm"), str(folder / "poet")
    plain = generated(folder, capsys)[1]
    assert generated(folder, capsys, "--adapter", f"{storm}:0")[1] == plain
    alone = generated(folder, capsys, "--adapter", storm)[1]
    both = generated(folder, capsys, "--adapter", f"{storm}:1.0", "--adapter", f"{poet}:0.5")
    assert both[0] == 0
    assert len({plain, alone, both[1]}) == 3
    assert generated(folder, capsys, "--adapter", str(folder / "odd:name"))[0] == 0


def test_the_choice_by_perplexity_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [part for name in ("storm", "poet") for part in ("--adapter", str(folder / name))]
    code, _, notes = generated(folder, capsys, *options, "--adapters", "auto")
    assert code == 0
    assert "routed to " in notes and "storm " in notes and "poet " in notes


def test_perplexity_is_that_under_the_adapters(folder: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)

    def value(*options: str) -> float:
        assert main(["perplexity", str(folder), str(text), "--lengths", "16", "--json", *RUN, *options]) == 0
        return json.loads(capsys.readouterr().out)[0]["perplexity"]

    assert value() == value("--adapter", f"{folder / 'storm'}:0") != value("--adapter", str(folder / "storm"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--adapter", "{}/storm:much"], "the weight after the colon must be a number at column"),
        (["--adapter", "{}/storm:1e999"], "must be a finite number"),
        (["--adapter", "{}/nowhere"], "does not exist"),
        (["--adapter", "{}/storm", "--adapter", "{}/storm"], "'storm' is named twice"),
        (["--adapters", "auto"], "name each with --adapter FOLDER"),
        (["--adapter", "{}/storm:0.5", "--adapters", "auto"], "auto runs each with weight 1"),
        (["--adapter", "{}/storm@1", "--adapters", "auto"], "on all layers: give folders alone"),
        (["--adapter", "{}/storm@x"], "the number of a layer instance is needed"),
    ],
)
def test_wrong_options_are_explained(folder: Path, capsys, options: list[str], message: str) -> None:
    code, _, notes = generated(folder, capsys, *(option.format(folder) for option in options))
    assert code == 2 and message in notes


def test_chat_uses_adapters(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(*options: str) -> str:
        lines = iter(["hello", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        chosen = ["--chat-template", "vicuna", "--temperature", "0", "--max-new-tokens", "5", "--ignore-eos"]
        assert main(["chat", str(folder), *chosen, *RUN, *options]) == 0
        shown = capsys.readouterr()
        assert ("routed to" in shown.err) == ("auto" in options)
        return shown.out

    assert reply() != reply("--adapter", str(folder / "storm"))
    assert reply("--adapter", str(folder / "storm"), "--adapters", "auto")


def test_instances_are_given_behind_an_at_sign(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storm, order = str(folder / "storm"), ["--layer-order", "0,1,1"]
    plain = generated(folder, capsys, *order)[1]
    texts = [
        generated(folder, capsys, *order, "--adapter", f"{storm}{suffix}")[1] for suffix in ("", "@0-2", "@1", "@2")
    ]
    assert texts[0] == texts[1] and len({plain, *texts}) == 4
    apart = [f"--adapter={storm}:1@0-1", f"--adapter={storm}@2"]  # one folder, two uses
    assert generated(folder, capsys, *order, *apart)[1] == texts[0]
    code, _, notes = generated(folder, capsys, *order, "--adapter", f"{storm}@2-3")
    assert code == 2 and "there is no layer instance 3" in notes
