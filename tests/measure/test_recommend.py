"""measure/recommend.py: the rule, on numbers made for it, and a recommendation measured on the embedded model."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from gptq_writer import write_checkpoint
from ropewalk.base.errors import RequestError
from ropewalk.files.embedded import demo_model_path
from ropewalk.generate.evaluate import BlockSums
from ropewalk.measure import recommend as module
from ropewalk.measure.recommend import OWN, candidates, recommend, recommendation_csv, recommendation_rows
from ropewalk.measure.record import Record, text_facts
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import load_tokenizer

BLOCKS = 8  # of 512 tokens: one sample each
NOISE = (0.3, -0.2, 0.1, -0.4, 0.2, 0.4, -0.3, -0.1)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(demo_model_path(), max_seq_len=512)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    folder = demo_model_path()
    return load_tokenizer(folder).encode((folder / "held_out.txt").read_text(encoding="utf-8")[:30000], add_bos=False)


def measured(levels: dict[str, float], unsure: dict[str, float] | None = None):
    """Windows for every candidate. levels: their means of -log p; unsure: how their distance from others spreads."""

    def windows(one) -> list[BlockSums]:
        level, spread = levels.get(one.name, 9.0), (unsure or {}).get(one.name, 0.0)
        made = []
        for number in range(BLOCKS):
            per_token = level + NOISE[number] + spread * NOISE[-1 - number]
            made.append(BlockSums(512, tuple(per_token * count for count in BlockSums(512, (0.0,) * 8, 0).counts()), 0))
        return made

    return lambda self, some: [(one, windows(one)) for one in some]


@pytest.mark.parametrize(
    ("levels", "unsure", "chosen", "said"),
    [
        ({"yarn 4": 2.0, "dynamic 4": 2.1, OWN: 3.0}, {}, "yarn 4", "the lowest of all that was measured"),
        ({"yarn 6": 2.0, "yarn 4": 2.1, OWN: 3.0}, {}, "yarn 6", "the lowest of all that was measured"),
        ({"yarn 8": 2.0, "yarn 4": 2.01, OWN: 3.0}, {"yarn 4": 0.5}, "yarn 4", "within the standard error .* simpler"),
        ({"yarn 4": 2.0, OWN: 2.01}, {OWN: 0.5}, OWN, "what the checkpoint declares"),
        ({"yarn 4": 2.0, "linear 4": 2.0}, {}, "linear 4", ""),
        ({"yarn 4": 2.0, OWN: 2.2}, {OWN: 0.1}, "yarn 4", "the checkpoint's own has"),
    ],
    ids=["best", "larger factor", "tie", "own", "equal", "no tie"],
)
def test_the_rule(model: Model, monkeypatch, levels: dict, unsure: dict, chosen: str, said: str) -> None:
    monkeypatch.setattr(module._Run, "measure", measured(levels, unsure))
    found = recommend(model, [5] * 2048, 2048)
    assert found.chosen.candidate.name == chosen
    assert re.search(said, found.reason), found.reason


def test_the_best_methods_are_tried_by_larger_factors(model: Model, monkeypatch) -> None:
    monkeypatch.setattr(module._Run, "measure", measured({"ntk 4": 2.0, "dynamic 4": 2.1}))
    names = [one.candidate.name for one in recommend(model, [5] * 2048, 2048).measured]
    assert names[:6] == [OWN, "linear 4", "ntk 4", "dynamic 4", "ntk-by-parts 4", "yarn 4"]
    assert names[6:] == ["ntk 6", "ntk 8", "dynamic 6", "dynamic 8"]


def test_within_the_trained_length_nothing_else_is_tried(model: Model) -> None:
    assert [one.name for one in candidates(model, 512)] == [OWN]
    assert [one.name for one in candidates(model, 513)][1] == "linear 1.01"  # it must reach


def test_a_checkpoint_with_a_scaling_is_compared_with_none(tmp_path: Path) -> None:
    overrides = {"max_position_embeddings": 512, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    write_checkpoint(tmp_path, overrides)
    scaled = load_model(tmp_path, backend="reference")
    names = [one.name for one in candidates(scaled, 1024)]
    assert names[:2] == [OWN, "none"]
    assert candidates(scaled, 1024)[0].rope.method.name == "linear"


def test_the_embedded_model_is_told_to_take_a_scaling_at_twice_its_length(
    model: Model, ids: list[int], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    record = Record(tmp_path / "record.json", "perplexity", text_facts(ids))
    found = recommend(model, ids, 1024, 4096, lambda *step: seen.append(step), record=record)
    assert found.chosen.candidate.rope_scaling["rope_type"] in ("ntk", "yarn", "ntk-by-parts", "dynamic")
    assert found.options.startswith('--max-seq-len 1024 --rope-scaling \'{"rope_type":')
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    by_name = {one.candidate.name: one for one in found.measured}
    assert by_name[OWN].behind > by_name[OWN].behind_error > 0
    columns, rows = recommendation_rows(found)
    assert rows[0][2] == "" and any(row[0] == f"{found.chosen.candidate.name} *" for row in rows)
    table = list(csv.DictReader(io.StringIO(recommendation_csv(found))))
    assert [row["chosen"] for row in table].count("yes") == 1 and len(table) == len(found.measured) == 10
    before = record.path.stat().st_mtime_ns
    again = recommend(model, ids, 1024, 4096, record=Record(record.path, "perplexity", text_facts(ids)))
    assert again == found and record.path.stat().st_mtime_ns == before


def test_cancelled_it_recommends_nothing_and_has_what_was_measured(model: Model, ids: list[int]) -> None:
    done: list[tuple[int, int]] = []
    found = recommend(model, ids, 1024, 1024, lambda *s: done.append(s), cancelled=lambda: done and done[-1][0] >= 2048)
    assert found.chosen is None and "cancelled" in found.reason and 1 <= len(found.measured) < 10


def test_a_text_shorter_than_the_context_is_refused(model: Model, ids: list[int]) -> None:
    with pytest.raises(RequestError, match="one window of the longest length needs 4096"):
        recommend(model, ids[:100], 4096)
