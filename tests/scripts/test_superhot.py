"""The pieces of the SuperHOT experiment that could be wrong without anyone noticing, on the model of today."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import ropewalk
from ropewalk.adapters.config import rope_of_adapters

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts" / "demo_model"))

from corpus import Document  # noqa: E402
from first.training import BOS_ID, EOS_ID, TrainingPlan  # noqa: E402
from superhot import curves, report  # noqa: E402
from superhot import training as superhot  # noqa: E402

FOLDER = Path(ropewalk.__file__).resolve().parent / "demo_model"
LENGTH = 10
DOCUMENTS = [  # each of one letter, so that a token says which document it is from
    Document("long.py", "a" * 35),
    Document("test/test_long.py", "b" * 35),
    Document("exact.py", "c" * (LENGTH - 1)),
    Document("short.py", "d" * (LENGTH - 2)),
]


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return superhot.long_windows(Letters(), DOCUMENTS, LENGTH, seed=1)


def test_a_window_holds_one_document_and_short_documents_give_none(windows: np.ndarray) -> None:
    letters = [set(row.tolist()) - {BOS_ID, EOS_ID} for row in windows]
    assert windows.shape[1] == LENGTH + 1
    assert all(len(found) == 1 for found in letters)
    counts = {letter: sum(found == {ord(letter)} for found in letters) for letter in "abcd"}
    assert counts == {"a": 2 * 3, "b": 3, "c": 2, "d": 0}  # library documents twice, tests once


def test_the_windows_of_a_document_predict_every_token_once() -> None:
    text = "".join(map(chr, range(97, 97 + 3 * LENGTH - 1)))  # with <s> and </s>: three windows and their last target
    windows = superhot.long_windows(Letters(), [Document("test/test_x.py", text)], LENGTH, seed=3)
    assert sorted(windows[:, 1:].flatten().tolist()) == sorted([*map(ord, text), EOS_ID])


def test_training_goes_on_with_the_batch_that_follows(windows: np.ndarray) -> None:
    batches = list(islice(superhot.batches(windows, 2, 0), 12))
    assert torch.equal(next(superhot.batches(windows, 2, 5)), batches[5])
    epoch = torch.cat(batches)[: len(windows)]
    assert torch.equal(epoch, torch.from_numpy(windows.astype(np.int64)))
    assert torch.equal(torch.cat(batches)[len(windows)], epoch[0])


def test_windows_that_are_cut_predict_the_same_tokens(windows: np.ndarray) -> None:
    whole = islice(superhot.batches(windows, 2, 3), 3)
    cut = islice(superhot.batches(windows, 2, 3, (5, 2, 1)), 3)
    for uncut, batch, pieces in zip(whole, cut, (5, 2, 1), strict=True):  # step 3 begins the row again
        assert batch.shape == (2 * pieces, LENGTH // pieces + 1)
        assert torch.equal(batch[:, 1:].flatten(), uncut[:, 1:].flatten())
        assert torch.equal(batch[:, 0], uncut[:, :-1].flatten()[:: LENGTH // pieces])


def test_each_length_has_its_own_frequencies_under_dynamic_ntk() -> None:
    variant = next(variant for variant in superhot.VARIANTS if variant.name == "dynamic-ntk")
    model = superhot.scaled_model(FOLDER, variant.rope_scaling)
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    seen = {}
    for length in (superhot.LENGTH // pieces for pieces in variant.pieces):
        with torch.inference_mode():
            model(100 + torch.arange(length)[None] % 1000)
        seen[length] = model.model.rotary_emb.inv_freq.clone()
    for length, scaling in ((512, {"rope_type": "default"}), (2048, superhot.NTK)):
        expected, _ = ropewalk.resolve_rope(config, rope_scaling=scaling).inverse_frequencies(length)
        assert torch.equal(seen[length], torch.tensor(expected, dtype=torch.float32))
    assert seen[512][-1] > seen[1024][-1] > seen[2048][-1]


def test_by_parts_is_what_a_config_with_an_original_length_means() -> None:
    raw = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    airophin = {key: value for key, value in raw.items() if key != "rope_parameters"}
    airophin |= {"max_position_embeddings": superhot.LENGTH, "original_max_position_embeddings": 512}
    by_config = ropewalk.resolve_rope(airophin)
    by_note = ropewalk.resolve_rope(raw, rope_scaling=superhot.BY_PARTS)
    assert by_config.method == by_note.method
    assert by_note.covers == superhot.LENGTH


@pytest.mark.parametrize("variant", superhot.VARIANTS, ids=lambda variant: variant.name)
@torch.inference_mode()
def test_a_lora_is_trained_on_the_model_that_the_engine_runs(variant: superhot.Variant) -> None:
    ids = ropewalk.load_tokenizer(FOLDER).encode((FOLDER / "held_out.txt").read_text()[:4000], add_bos=False)
    theirs = superhot.scaled_model(FOLDER, variant.rope_scaling)(torch.tensor([ids])).logits[0]
    model = ropewalk.load_model(FOLDER, len(ids), compute="exact", rope_scaling=variant.rope_scaling)
    ours = model.forward(ids, model.new_cache(), logits="all")
    assert len(ids) > 1000
    assert (ours - theirs).abs().max() < 2e-2 * theirs.std()  # the cache of keys and values is float16


def test_a_trained_lora_is_saved_with_its_note_and_runs(tmp_path: Path) -> None:
    variant, length = superhot.VARIANTS[1], 32
    ids = np.arange(100, 100 + 4 * (length + 1), dtype=np.uint16)
    plan = TrainingPlan(6 * length, 60.0, seed=1, batch=2, threads=1, compiled=False, vector_lr=0.05, length=length)
    model, numbers = superhot.train_adapter(FOLDER, variant, ids.reshape(4, -1), ids, plan, tmp_path)
    assert numbers["steps"] == 3
    with torch.inference_mode():
        theirs = model.eval()(torch.tensor([ids[:length].tolist()])).logits[0]
    superhot.save_adapter(model, variant, tmp_path / "lora")
    assert rope_of_adapters([tmp_path / "lora"]) == variant.rope_scaling
    engine = ropewalk.load_model(FOLDER, length, compute="exact", rope_scaling=variant.rope_scaling)
    engine.load_adapter(tmp_path / "lora", "lora")
    with torch.inference_mode():
        ours = engine.forward(ids[:length].tolist(), engine.new_cache(), logits="all", adapters=["lora"])
        plain = engine.forward(ids[:length].tolist(), engine.new_cache(), logits="all")
    assert (ours - theirs).abs().max() < 2e-2 * theirs.std() < (plain - theirs).abs().max()


POINTS = [curves.Point("linear 4", 512, 45.678, 0.5), curves.Point("linear 4", 2048, 50.0, 0.25)]
TABLE = "| RoPE scaling | 512 | 2,048 |\n|---|--:|--:|\n| linear 4 | 45.68 | 50.00 |"


def test_the_table_has_a_row_per_curve_and_stands_between_the_marks(tmp_path: Path) -> None:
    assert report.table(POINTS) == TABLE
    guide = tmp_path / "guide.md"
    guide.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_table(POINTS, guide)
        assert TABLE in guide.read_text() and "old" not in guide.read_text()
        assert guide.read_text().startswith("before\n") and guide.read_text().endswith("\nafter\n")
    guide.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the line"):
        report.write_table(POINTS, guide)


def test_numbers_come_back_from_their_file(tmp_path: Path) -> None:
    curves.write_csv(POINTS, tmp_path / "numbers.csv")
    assert curves.read_csv(tmp_path / "numbers.csv") == POINTS


def test_a_curve_measured_anew_takes_its_place_among_the_others() -> None:
    anew = [curves.Point("NTK 4", 512, 9.0, 0.5), curves.Point("linear 4", 512, 44.0, 0.5)]
    assert curves.in_order(POINTS, anew) == anew[::-1]
    assert curves.in_order(POINTS, anew[:1]) == [*POINTS, anew[0]]


def test_the_guide_shows_the_numbers_of_its_file() -> None:
    points = curves.read_csv(REPOSITORY / "docs" / "context-extension.csv")
    guide = (REPOSITORY / "docs" / "context-extension.md").read_text(encoding="utf-8")
    assert report.table(points) in guide and report.commands() in guide
    assert {point.curve for point in points} == {curve.label for curve in curves.CURVES}


def test_a_curve_with_a_lora_has_the_scaling_that_the_lora_was_trained_under() -> None:
    noted = {variant.name: variant.rope_scaling for variant in superhot.VARIANTS}
    adapted = [curve for curve in curves.CURVES if curve.adapter is not None]
    assert {curve.adapter: curve.rope_scaling for curve in adapted} == noted
