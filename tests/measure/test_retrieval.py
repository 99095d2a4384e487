"""measure/retrieval.py: keys hidden where they should be, found by a model that finds them and by no other."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_writer import write_checkpoint
from ropewalk.base.errors import RequestError
from ropewalk.files.embedded import demo_model_path
from ropewalk.measure import retrieval
from ropewalk.measure.retrieval import Probe, RetrievalCell, cells_csv, make_probes, retrieval_map
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import load_tokenizer

FILLER = list(range(10, 40))
PROBE = Probe((1, 2, 3, 4, 5), (1, 2), (3, 4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, {"vocab_size": 64, "max_position_embeddings": 128})
    return load_model(folder, backend="reference", compute="exact", cache_type="fp32")


class Knowing(Model):
    """Says each token of the key after the one before: what a model that retrieves would do."""

    def forward(self, token_ids, cache, logits="last", **options):
        computed = super().forward(token_ids, cache, logits, **options)
        if computed is not None:
            computed = torch.zeros_like(computed)
            for row, token in enumerate(list(token_ids)[-len(computed) :]):
                computed[row, min(token + 1, 63)] = 1.0
        return computed


@given(st.integers(10, 100), st.floats(0, 1))
def test_the_needle_stands_at_its_depth_in_a_text_of_that_length(length: int, depth: float) -> None:
    ids = retrieval._hidden(FILLER, PROBE, length, depth)
    assert len(ids) == length and ids[-4:] == [1, 2, 3, 4]
    place = ids.index(1)
    assert ids[place : place + 5] == [1, 2, 3, 4, 5]
    assert place == round(depth * (length - PROBE.length))
    rest = ids[:place] + ids[place + 5 : -4]
    assert rest == (FILLER * 4)[: len(rest)]


def test_a_model_that_knows_the_keys_finds_all_and_another_one_none(model: Model) -> None:
    knowing = Knowing.__new__(Knowing)
    knowing.__dict__.update(model.__dict__)
    seen: list[tuple[int, int]] = []
    cells = retrieval_map(knowing, FILLER, [PROBE], [20, 60], [0.0, 1.0], lambda *step: seen.append(step))
    assert [(cell.length, cell.depth) for cell in cells] == [(20, 0.0), (20, 1.0), (60, 0.0), (60, 1.0)]
    assert all(cell.found == cell.tokens_found == 1.0 for cell in cells)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert any(cell.found < 1.0 for cell in retrieval_map(model, FILLER, [PROBE], [20, 60], [0.0, 1.0]))


def test_reusing_what_trials_have_in_common_changes_no_cell(model: Model) -> None:
    other = Probe((1, 2, 6, 7, 5), (1, 2), (6, 7))
    together = retrieval_map(model, FILLER, [PROBE, other], [40], [0.0, 0.5, 1.0])
    for number, probe in enumerate((PROBE, other)):
        for cell in together:
            ids = retrieval._hidden(FILLER, probe, 40, cell.depth)
            right = model.forward(ids[:-1], model.new_cache(), logits="all").argmax(1)[-2:].tolist() == list(
                probe.answer
            )
            alone = retrieval_map(model, FILLER, [probe], [40], [cell.depth])[0]
            assert alone.found == float(right), number


def test_a_cancelled_map_has_the_cells_so_far(model: Model) -> None:
    calls = iter([False] * 20 + [True] * 1000)
    cells = retrieval_map(model, FILLER, [PROBE], [20, 40, 60], [0.0, 0.5, 1.0], cancelled=lambda: next(calls))
    assert 0 < len(cells) < 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"filler": []}, "needs filler text"),
        ({"probes": []}, "needs pass keys"),
        ({"lengths": []}, "needs lengths"),
        ({"depths": []}, "needs depths"),
        ({"depths": [1.5]}, "a depth is a number from 0 .* got 1.5"),
        ({"lengths": [9]}, "a length must be from 10, .* got 9"),
        ({"lengths": [129]}, "to the 128 positions"),
    ],
)
def test_what_cannot_be_mapped_is_refused(model: Model, change: dict, said: str) -> None:
    arguments = {"filler": FILLER, "probes": [PROBE], "lengths": [20], "depths": [0.5], **change}
    with pytest.raises(RequestError, match=said):
        retrieval_map(model, **arguments)


def test_keys_are_the_same_for_the_same_seed_and_read_as_they_are_written() -> None:
    tokenizer = load_tokenizer(demo_model_path())
    probes = make_probes(tokenizer, 3, seed=5)
    assert probes == make_probes(tokenizer, 3, seed=5) != make_probes(tokenizer, 3, seed=6)
    for probe in probes:
        key = tokenizer.decode(probe.question + probe.answer).strip().removeprefix("The pass key is ")
        assert key.isdigit() and len(key) == 5
        assert tokenizer.decode(probe.needle).count(key) == 2


def test_the_embedded_model_finds_keys_beyond_its_context_with_yarn_and_not_without() -> None:
    folder = demo_model_path()
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode((folder / "held_out.txt").read_text(encoding="utf-8")[:8000], add_bos=False)
    found = {}
    for name, scaling in (("none", {"rope_type": "default"}), ("yarn", {"rope_type": "yarn", "factor": 4})):
        model = load_model(folder, max_seq_len=1024, rope_scaling=scaling)
        (cell,) = retrieval_map(model, ids, make_probes(tokenizer, 4), [1024], [0.5])
        found[name] = cell.tokens_found
    assert found["yarn"] > 0.6 > 0.2 > found["none"]


def test_the_table_has_a_line_per_cell() -> None:
    table = list(csv.DictReader(io.StringIO(cells_csv([RetrievalCell(256, 0.25, 4, 0.5, 0.75)]))))
    assert table == [
        {"length": "256", "depth": "0.25", "trials": "4", "keys_found": "0.5000", "tokens_found": "0.7500"}
    ]
