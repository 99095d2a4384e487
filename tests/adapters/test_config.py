"""Adapters that lie beside a model, and the RoPE scaling that they ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.adapters.config import find_adapter, rope_of_adapters
from ropewalk.base.errors import CheckpointError, ConfigError
from ropewalk.faces.cli.main import main
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json

LINEAR = {"rope_type": "linear", "factor": 4.0}
RUN = ["--backend", "reference", "--compute", "exact"]


def noted(folder: Path, rope_scaling: dict[str, Any] | None) -> Path:
    """An adapter folder with a note, and no weights."""
    folder.mkdir(parents=True)
    note = {} if rope_scaling is None else {"rope_scaling": rope_scaling}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | note))
    return folder


def test_a_name_is_found_beside_the_model_and_a_folder_comes_first(tmp_path: Path, monkeypatch) -> None:
    beside = noted(tmp_path / "model" / "adapters" / "storm", None)
    assert find_adapter(tmp_path / "model", "storm") == beside
    assert find_adapter(tmp_path / "model", str(tmp_path / "model")) == tmp_path / "model"
    assert find_adapter(tmp_path / "model", "poet") is None
    noted(tmp_path / "storm", None)
    monkeypatch.chdir(tmp_path)
    assert find_adapter(tmp_path / "model", "storm") == Path("storm")


def test_the_note_of_the_adapters_is_theirs_together(tmp_path: Path) -> None:
    plain, first, second = (
        noted(tmp_path / name, note) for name, note in (("plain", None), ("first", LINEAR), ("second", dict(LINEAR)))
    )
    assert rope_of_adapters([]) is rope_of_adapters([plain]) is None
    assert rope_of_adapters([plain, first, second]) == LINEAR


def test_adapters_for_different_scalings_are_not_mixed_unasked(tmp_path: Path) -> None:
    first = noted(tmp_path / "first", LINEAR)
    second = noted(tmp_path / "second", {"rope_type": "default"})
    with pytest.raises(ConfigError, match=r"first and .*second were trained for different RoPE scalings.*rope_scaling"):
        rope_of_adapters([first, second])


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        rope_of_adapters([tmp_path])
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        rope_of_adapters([tmp_path / "nowhere"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the adapter `scaled` beside it, which notes linear scaling."""
    path = write_byte_level_json(tmp_path_factory.mktemp("model"))
    exact = write_checkpoint(path, {"vocab_size": load_tokenizer(path).vocab_size}, dense=True)
    config = write_adapter(path / "adapters" / "scaled", path, exact) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_scaling": LINEAR}))
    (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    return path


def perplexity(model: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[float, str]:
    command = ["perplexity", str(model), str(model / "text.txt"), "--lengths", "32", "--json", *RUN, *options]
    assert main(command) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out)[0]["perplexity"], shown.err


def test_the_command_line_loads_the_model_as_the_note_says(model: Path, capsys) -> None:
    by_note, notes = perplexity(model, capsys, "--adapter", "scaled")
    assert "RoPE scaling as the adapter asks" in notes and "RoPE scaling: linear, factor 4" in notes
    said = perplexity(model, capsys, "--adapter", "scaled:1.0", "--rope-scaling", json.dumps(LINEAR))[0]
    assert by_note == said


def test_an_option_of_the_command_line_overrules_the_note(model: Path, capsys, caplog) -> None:
    _, notes = perplexity(model, capsys, "--adapter", "scaled", "--alpha-value", "2")
    assert "as the adapter asks" not in notes and "alpha 2" in notes
    assert "made for another RoPE" in caplog.text


def test_a_model_of_ones_own_needs_a_text_to_measure(model: Path, capsys) -> None:
    assert main(["perplexity", str(model), *RUN]) == 2
    assert "there is no text to measure on" in capsys.readouterr().err
