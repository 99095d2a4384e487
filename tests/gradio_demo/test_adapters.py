"""The LoRAs beside the embedded model: small, with a note each, and worth loading."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from safetensors import safe_open

import ropewalk
from ropewalk.adapters.config import rope_of_adapters
from ropewalk.faces.cli.main import main
from ropewalk.generate.evaluate import perplexity

FOLDER = Path(ropewalk.__file__).resolve().parent / "demo_model"
NOTED = {
    "linear-4": "linear",
    "ntk-by-parts-4": "ntk-by-parts",
    "extrapolation": "default",
    "yarn-4": "yarn",
    "ntk-4": "ntk",
    "dynamic-ntk": "dynamic",
}
TRAINED, EXTENDED = 512, 2048
SCORED_TOKENS = 4 * EXTENDED  # of held_out.txt


@pytest.fixture(scope="module")
def held_out_ids() -> list[int]:
    return ropewalk.load_tokenizer(FOLDER).encode((FOLDER / "held_out.txt").read_text(encoding="utf-8"), add_bos=False)


def measured(ids: list[int], adapter: str | None, length: int, **rope) -> float:
    model = ropewalk.load_model(FOLDER, max_seq_len=length, threads=1, **rope)
    if adapter is not None:
        model.load_adapter(FOLDER / "adapters" / adapter, adapter)
    chosen = None if adapter is None else [adapter]
    return perplexity(model, ids, [length], SCORED_TOKENS, adapters=chosen)[0].perplexity


def test_the_adapters_are_small_and_note_their_rope() -> None:
    folders = sorted((FOLDER / "adapters").iterdir())
    assert {folder.name: rope_of_adapters([folder])["rope_type"] for folder in folders} == NOTED
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("adapter", ["linear-4", "ntk-by-parts-4", "yarn-4"])
def test_an_adapter_makes_the_model_read_four_times_its_context(held_out_ids: list[int], adapter: str) -> None:
    scaling = rope_of_adapters([FOLDER / "adapters" / adapter])
    extended = measured(held_out_ids, adapter, EXTENDED, rope_scaling=scaling)
    assert extended < 0.8 * measured(held_out_ids, None, EXTENDED)
    assert extended < 1.05 * measured(held_out_ids, None, TRAINED)
    assert extended < 0.95 * measured(held_out_ids, None, EXTENDED, rope_scaling=scaling)


def test_one_command_shows_it(held_out_ids: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--lengths", str(EXTENDED), "--max-tokens", str(SCORED_TOKENS), "--threads", "1", "--json"]
    assert main(["perplexity", "--adapter", "linear-4", *limits]) == 0
    shown = capsys.readouterr()
    assert "RoPE scaling: linear, factor 4" in shown.err
    scaling = rope_of_adapters([FOLDER / "adapters" / "linear-4"])
    value = json.loads(shown.out)[0]["perplexity"]
    assert value == pytest.approx(measured(held_out_ids, "linear-4", EXTENDED, rope_scaling=scaling), rel=1e-6)


def test_the_published_numbers_are_those_of_the_shipped_adapters(held_out_ids: list[int]) -> None:
    """The whole text at one length, as in docs/context-extension.csv."""
    path = Path(__file__).resolve().parents[2] / "docs" / "context-extension.csv"
    with path.open(encoding="utf-8", newline="") as file:
        published = {(row["curve"], int(row["length"])): float(row["perplexity"]) for row in csv.DictReader(file)}
    longest = max(length for _, length in published)
    ids = held_out_ids[: len(held_out_ids) // longest * longest]
    scaling = rope_of_adapters([FOLDER / "adapters" / "linear-4"])
    model = ropewalk.load_model(FOLDER, max_seq_len=TRAINED, rope_scaling=scaling)
    model.load_adapter(FOLDER / "adapters" / "linear-4", "linear-4")
    value = perplexity(model, ids, [TRAINED], adapters=["linear-4"])[0].perplexity
    assert value == pytest.approx(published["linear 4 + LoRA", TRAINED], rel=2e-3)
