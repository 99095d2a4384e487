"""The LoRAs beside the embedded model: small, with a note each, and worth loading."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

import ropewalk
from ropewalk.adapters.config import rope_of_adapters
from ropewalk.faces.cli.main import main
from ropewalk.generate.evaluate import perplexity

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "demo_model"))

from reading import evaluate  # noqa: E402
from reading.measure import PERPLEXITY_TOKENS  # noqa: E402

FOLDER = Path(ropewalk.__file__).resolve().parent / "demo_model"
NOTED = {"linear-4": "linear", "ntk-by-parts-4": "ntk-by-parts", "yarn-8": "yarn"}
TRAINED, EXTENDED = 512, 2048
SCORED_TOKENS = 4 * EXTENDED  # of held_out.txt
# By which the share of exact answers must grow, at the length that a LoRA was made for: the card has all of them.
GAIN = 0.2


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
        assert sum(path.stat().st_size for path in folder.iterdir()) < 1_400_000
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("adapter", NOTED)
def test_with_an_adapter_it_answers_about_texts_of_several_times_its_context(adapter: str) -> None:
    length = EXTENDED * int(adapter.rsplit("-", 1)[-1]) // 4
    plain = evaluate.Setting(FOLDER, (length,), side="names", documents=6, threads=1)
    shares = [
        evaluate.summary(evaluate.evaluate(setting))[str(length)]["answered"]["share"]
        for setting in (plain, replace(plain, adapter=FOLDER / "adapters" / adapter))
    ]
    assert shares[1] - shares[0] > GAIN


def test_one_command_shows_it(held_out_ids: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--lengths", str(EXTENDED), "--max-tokens", str(SCORED_TOKENS), "--threads", "1", "--json"]
    assert main(["perplexity", "--adapter", "linear-4", *limits]) == 0
    shown = capsys.readouterr()
    assert "RoPE scaling: linear, factor 4" in shown.err
    scaling = rope_of_adapters([FOLDER / "adapters" / "linear-4"])
    value = json.loads(shown.out)[0]["perplexity"]
    assert value == pytest.approx(measured(held_out_ids, "linear-4", EXTENDED, rope_scaling=scaling), rel=1e-6)


def test_the_numbers_of_the_card_are_those_of_the_shipped_adapters(held_out_ids: list[int]) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"^\| LoRA linear-4 \| ([\d.]+) \|", card, re.M)
    scaling = rope_of_adapters([FOLDER / "adapters" / "linear-4"])
    model = ropewalk.load_model(FOLDER, max_seq_len=TRAINED, rope_scaling=scaling)
    model.load_adapter(FOLDER / "adapters" / "linear-4", "linear-4")
    value = perplexity(model, held_out_ids, [TRAINED], PERPLEXITY_TOKENS, adapters=["linear-4"])[0].perplexity
    assert value == pytest.approx(float(said), rel=5e-3)
