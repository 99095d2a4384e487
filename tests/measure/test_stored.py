"""Stored curves and maps are those that were measured, and a damaged record is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ropewalk
from ropewalk.base.errors import RequestError
from ropewalk.files.embedded import demo_model_path
from ropewalk.measure.compare import compare_perplexity
from ropewalk.measure.retrieval import retrieval_map
from ropewalk.measure.stored import CURVES, MAPS, StoredLab, read_lab, store_curves, store_maps
from ropewalk.measure.tasks import make_task
from ropewalk.model.variants import open_variant, scaling_variant
from ropewalk.text.tokenizer.load import load_tokenizer

LENGTHS, DEPTHS = [96, 192], [0.0, 1.0]


def test_what_is_stored_is_what_was_measured(tmp_path: Path) -> None:
    folder = demo_model_path()
    model, tokenizer = ropewalk.load_model(folder, threads=1, backend="cpu"), load_tokenizer(folder)
    ids = tokenizer.encode("Hemp is laid into strands, strands into rope. " * 60, add_bos=False)[:600]
    variants = [scaling_variant(model, name, 2.0) for name in ("none", "linear")]
    task = make_task("keys", tokenizer, ids, 2)
    store_curves(tmp_path, model, ids, LENGTHS, variants, 400)
    store_maps(tmp_path, model, ids, task, LENGTHS, DEPTHS, variants)
    found = read_lab(tmp_path)
    for stored, curve in zip(found.curves, compare_perplexity(model, ids, LENGTHS, variants, 400), strict=True):
        assert stored.name == curve.name
        assert [(r.length, r.mean_nll, r.nll_error) for r in stored.rows] == [
            (r.length, r.mean_nll, r.nll_error) for r in curve.rows
        ]
    for stored, variant in zip(found.maps, variants, strict=True):
        made, adapters = open_variant(model, variant, max(LENGTHS))
        assert stored.name == variant.name
        assert list(stored.cells) == retrieval_map(made, task, LENGTHS, DEPTHS, adapters=adapters)


def test_nothing_is_stored_in_an_empty_folder(tmp_path: Path) -> None:
    assert read_lab(tmp_path) == StoredLab()


@pytest.mark.parametrize(
    ("file", "kind", "settings", "kept"),
    [
        (CURVES, "perplexity", {"RoPE": "none"}, {"128 0": {"seconds": 1.0}}),
        (CURVES, "perplexity", {"RoPE": "none"}, {"long 0": {"sums": [1.0], "seconds": 1.0}}),
        (CURVES, "perplexity", {}, {}),
        (MAPS, "retrieval", {"depths": [0.0]}, {"128 0": [[0.0, 1]]}),
        (MAPS, "retrieval", {"depths": [0.0]}, {"128 0": 5}),
    ],
)
def test_a_record_that_keeps_something_else_is_named(
    file: str, kind: str, settings: dict, kept: dict, tmp_path: Path
) -> None:
    parts = {"yarn": {"settings": settings, "kept": kept}}
    whole = {"ropewalk": kind, "version": 1, "settings": {}, "parts": parts}
    (tmp_path / file).write_text(json.dumps(whole))
    with pytest.raises(RequestError, match=f"{file}: yarn is not what a record of {kind} keeps"):
        read_lab(tmp_path)
