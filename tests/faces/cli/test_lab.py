"""faces/cli/lab.py and faces/cli/demo.py: the commands compare, retrieval and demo."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest

from ropewalk.faces.cli.main import main


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_compare_writes_a_line_per_scaling_and_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["compare", "--lengths", "64,128", "--scalings", "none, yarn", "--max-tokens", "256", "--csv", "-"]) == 0
    )
    found = rows(capsys.readouterr().out)
    assert [(row["variant"], row["length"]) for row in found] == [
        ("none", "64"),
        ("none", "128"),
        ("yarn", "64"),
        ("yarn", "128"),
    ]
    assert all(1 < float(row["perplexity"]) < 1000 for row in found)


def test_an_adapter_of_the_embedded_model_is_one_more_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lengths", "64", "--scalings", "none", "--lora", "linear-4", "--max-tokens", "64", "--csv", "-"]
    assert main(["compare", *options]) == 0
    assert [row["variant"] for row in rows(capsys.readouterr().out)] == ["none", "linear-4"]


def test_retrieval_writes_table_and_plot_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    table, plot = tmp_path / "map.csv", tmp_path / "map.svg"
    options = ["--lengths", "128", "--depths", "0,1", "--trials", "1", "--csv", str(table), "--plot", str(plot)]
    assert main(["retrieval", *options]) == 0
    shown = capsys.readouterr()
    assert "tokens found" in shown.out and f"wrote {table}" in shown.err and f"wrote {plot}" in shown.err
    assert [row["depth"] for row in rows(table.read_text())] == ["0", "1"]
    assert plot.read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "--scalings", "spiral"], "scaling 'spiral' is not known"),
        (["compare", "--lora", "nobody"], "neither a folder nor an adapter that comes with"),
        (["compare", "--lengths", "999999"], "one window of the longest length needs 999999"),
        (["retrieval", "--lengths", "8"], "a length must be at least"),
        (["retrieval", "--depths", "2", "--lengths", "128"], "a depth is a number from 0"),
        (
            ["retrieval", "--trials", "1", "--lengths", "128", "--csv", "/nowhere/a.csv"],
            "its folder does not exist",
        ),
        (["demo", "/nowhere"], "MODEL: /nowhere is not a folder"),
        (["demo", "--models", "/nowhere"], "--models: /nowhere is not a folder"),
        (["demo", "--auth", "reader"], "--auth takes USER:PASSWORD"),
        (["demo", "--max-running", "0"], "--max-running must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_on_stderr(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "demo":
        pytest.importorskip("gradio", reason="the page needs Gradio, which is not installed")
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_model_without_a_text_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert "name a text with --text FILE" in capsys.readouterr().err


def test_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("ropewalk.gradio_demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    assert 'pip install "ropewalk[demo]"' in capsys.readouterr().err
