"""measure/retrieval.py: what is hidden is found by a model that finds it and by no other, in any order of asking."""

from __future__ import annotations

import csv
import io
import weakref

import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.base.errors import RequestError
from ropewalk.files.embedded import demo_model_path
from ropewalk.measure.retrieval import RetrievalCell, cells_csv, retrieval_map
from ropewalk.measure.tasks import Question, Trial, make_task
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import load_tokenizer

FILLER = list(range(10, 40))


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


class Hidden:
    """A task of token ids: 3 and 4 follow 1 and 2, at a depth of the filler. With `together`, one context is asked at
    every depth."""

    facts = {"task": "hidden"}

    def __init__(self, answers: tuple[tuple[int, ...], ...] = ((3, 4),), together: bool = False) -> None:
        self._answers, self._together = answers, together

    def least(self, depths) -> int:
        return 10

    def trials(self, length: int, depths) -> list[Trial]:
        if self._together:
            context = self._context(length, 0.5, self._answers[0])
            return [Trial("0", context, tuple(Question(depth, (1, 2), self._answers[0]) for depth in depths))]
        return [
            Trial(f"{depth} {number}", self._context(length, depth, answer), (Question(depth, (1, 2), answer),))
            for depth in depths
            for number, answer in enumerate(self._answers)
        ]

    def _context(self, length: int, depth: float, answer: tuple[int, ...]) -> tuple[int, ...]:
        filler = (FILLER * 5)[: length - 9]
        place = round(depth * len(filler))
        return (*filler[:place], 1, 2, *answer, 5, *filler[place:])


def test_a_model_that_knows_the_keys_finds_all_and_another_one_none(model: Model) -> None:
    knowing = Knowing.__new__(Knowing)
    knowing.__dict__.update(model.__dict__)
    seen: list[tuple[int, int]] = []
    cells = retrieval_map(knowing, Hidden(), [20, 60], [0.0, 1.0], lambda *step: seen.append(step))
    assert [(cell.length, cell.depth) for cell in cells] == [(20, 0.0), (20, 1.0), (60, 0.0), (60, 1.0)]
    assert all(cell.found == cell.tokens_found == 1.0 and cell.all_found is None for cell in cells)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert any(cell.found < 1.0 for cell in retrieval_map(model, Hidden(), [20, 60], [0.0, 1.0]))
    for answers, all_found in (((3, 4), 1.0), ((9, 4), 0.0)):
        cells = retrieval_map(knowing, Hidden((answers,), together=True), [20], [0.0, 1.0])
        assert [cell.all_found for cell in cells] == [all_found, all_found]
        assert all(cell.tokens_found == (1.0 if all_found else 0.0) for cell in cells)  # 10 follows 9, never 4


def test_reusing_what_trials_have_in_common_changes_no_cell(model: Model) -> None:
    answers = ((3, 4), (6, 7))
    together = retrieval_map(model, Hidden(answers), [40], [0.0, 0.5, 1.0])
    expected = {cell.depth: 0.0 for cell in together}
    for trial in Hidden(answers).trials(40, [0.0, 0.5, 1.0]):
        (asked,) = trial.questions
        ids = [*trial.context, *asked.ids, *asked.answer]
        said = model.forward(ids[:-1], model.new_cache(), logits="all").argmax(1)[-2:].tolist()
        expected[asked.depth] += sum(a == b for a, b in zip(said, asked.answer, strict=True)) / 2 / len(answers)
    assert {cell.depth: cell.tokens_found for cell in together} == expected


def test_what_was_kept_is_not_asked_again_and_gives_the_same_map(model: Model) -> None:
    kept: dict = {}
    whole = retrieval_map(model, Hidden(), [20, 60], [0.0, 1.0], kept=kept)
    half = dict(list(kept.items())[:2])
    asked = []

    class Counting(Model):
        def forward(self, token_ids, cache, logits="last", **options):
            asked.append(logits)
            return super().forward(token_ids, cache, logits, **options)

    counting = Counting.__new__(Counting)
    counting.__dict__.update(model.__dict__)
    counting.new_cache = lambda *a: _owned(model, counting, *a)
    assert retrieval_map(counting, Hidden(), [20, 60], [0.0, 1.0], kept=half) == whole
    assert asked.count("all") == 2 and half == kept


def _owned(model: Model, owner: Model, *arguments):
    cache = model.new_cache(*arguments)
    cache._owner = weakref.ref(owner)
    return cache


def test_a_cancelled_map_has_the_cells_so_far(model: Model) -> None:
    calls = iter([False] * 20 + [True] * 1000)
    cells = retrieval_map(model, Hidden(), [20, 40, 60], [0.0, 0.5, 1.0], cancelled=lambda: next(calls))
    assert 0 < len(cells) < 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": []}, "needs lengths"),
        ({"depths": []}, "needs depths"),
        ({"depths": [1.5]}, "a depth is a number from 0 .* got 1.5"),
        ({"lengths": [9]}, "a length must be at least 10, .* got 9"),
        ({"lengths": [129]}, "a length must be at most 128, .* got 129"),
    ],
)
def test_what_cannot_be_mapped_is_refused(model: Model, change: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        retrieval_map(model, Hidden(), **{"lengths": [20], "depths": [0.5], **change})


def test_the_embedded_model_finds_keys_beyond_its_context_with_yarn_and_not_without() -> None:
    folder = demo_model_path()
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode((folder / "held_out.txt").read_text(encoding="utf-8")[:8000], add_bos=False)
    found = {}
    for name, scaling in (("none", {"rope_type": "default"}), ("yarn", {"rope_type": "yarn", "factor": 4})):
        model = load_model(folder, max_seq_len=1024, rope_scaling=scaling)
        (cell,) = retrieval_map(model, make_task("keys", tokenizer, ids, 4), [1024], [0.5])
        found[name] = cell.tokens_found
    assert found["yarn"] > 0.6 > 0.4 > found["none"]  # a digit is guessed one time in ten


def test_the_table_has_a_line_per_cell() -> None:
    table = list(csv.DictReader(io.StringIO(cells_csv([RetrievalCell(256, 0.25, 4, 0.5, 0.75, 0.25)]))))
    shares = {"keys_found": "0.5000", "tokens_found": "0.7500", "all_found": "0.2500"}
    assert table == [{"length": "256", "depth": "0.25", "trials": "4", **shares}]
