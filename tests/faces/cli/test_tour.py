"""`ropewalk tour`: what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from ropewalk.faces.cli.main import main
from tours import HOUSES, model_with_a_tour


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_a_tour(tmp_path_factory.mktemp("tour") / "model")


def said(folder: Path, *options: str, capsys: pytest.CaptureFixture) -> str:
    assert main(["tour", str(folder), "--threads", "1", *options]) == 0
    return capsys.readouterr().out


def test_it_asks_every_question_in_both_ways_and_says_why(folder: Path, capsys: pytest.CaptureFixture) -> None:
    text = said(folder, capsys=capsys)
    for house in HOUSES:
        assert text.count(f"How long is the walk of house {house}?") == 2
    assert text.index("With linear scaling by 4 and the LoRA linear-4") < text.index("Without, as the model was")
    assert text.count("✓") + text.count("✗") == 6
    assert f"Right: {text.split('Without, as')[0].count('✓')} of 3 with the scaling" in text
    assert "Trained on 512 tokens" in text and "never saw" in text
    assert "chosen among 4; of 32 questions" in " ".join(text.split())
    assert f"ropewalk demo {folder}" in text and "\x1b" not in text


def test_a_question_of_ones_own_has_answers_and_no_verdict(folder: Path, capsys: pytest.CaptureFixture) -> None:
    text = said(folder, "--question", "What is made here?", capsys=capsys)
    assert text.count("What is made here?") == 2
    assert not set("✓✗") & set(text) and "Right:" not in text


def test_a_document_of_ones_own_is_asked_about(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "hemp.txt").write_text("Rope is made of hemp. " * 20)
    text = said(folder, "--document", str(tmp_path / "hemp.txt"), "--question", "What is it made of?", capsys=capsys)
    assert "hemp.txt" in text and "│ Rope is made of hemp." in text and "fathoms long" not in text
    assert "Without scaling, all" in " ".join(text.split())


def refused(*options: str, capsys: pytest.CaptureFixture) -> str:
    assert main(["tour", *options]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_done_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "ask something about it with --question" in refused(str(folder), "--document", "x", capsys=capsys)
    assert "absent.txt cannot be read" in refused(
        *(str(folder), "--document", "absent.txt", "--question", "What?"), capsys=capsys
    )
    (tmp_path / "long.txt").write_text("Rope is made of hemp. " * 2000)
    long = (str(folder), "--threads", "1", "--document", str(tmp_path / "long.txt"), "--question", "What?")
    said = refused(*long, capsys=capsys)
    assert "--question is too long" in refused(
        str(folder), "--threads", "1", "--question", "rope " * 5000, capsys=capsys
    )
    assert "long.txt is too long" in said and "than the 2,048 that the scaling of the tour covers" in said


def test_a_model_without_a_tour_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert f"{tmp_path} brings no tour (tour/tour.json)" in refused(str(tmp_path), capsys=capsys)
    assert "model folder absent does not exist" in refused("absent", capsys=capsys)


def test_it_fits_a_narrow_terminal_and_asks_for_no_colour(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = said(folder, capsys=capsys)
    commands = text.partition("What to try next")[2]
    assert max(map(len, text.removesuffix(commands).splitlines())) <= 40
    assert "--question TEXT\n    ask something else about it" in commands
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[1m" in said(folder, "--question", "What?", capsys=capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in said(folder, "--question", "What?", capsys=capsys)


def test_the_embedded_model_takes_its_tour(capsys: pytest.CaptureFixture) -> None:
    assert main(["tour", "--threads", "1"]) == 0
    assert "Right: 3 of 3 with the scaling, 0 without." in capsys.readouterr().out
