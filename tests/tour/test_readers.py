"""A tour is taken: two ways to read with the same weights, the document read once in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import ropewalk
from ropewalk.base.errors import UnsupportedError
from ropewalk.engine.engine import Engine
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from ropewalk.tour.explanation import why
from ropewalk.tour.readers import Readers, is_right, open_readers
from ropewalk.tour.tour import read_tour
from tours import ADAPTER, SCALING, model_with_a_tour, small_tour

TOUR = small_tour()
NEAR = 24  # tokens: a question and the page of the cache that the document ends in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_a_tour(tmp_path_factory.mktemp("tour") / "model")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Model, Tokenizer]:
    return ropewalk.load_model(folder, threads=1, backend="cpu"), load_tokenizer(folder)


@pytest.fixture(scope="module")
def readers(folder: Path, loaded: tuple[Model, Tokenizer]) -> Readers:
    return open_readers(TOUR, folder, *loaded)


@pytest.mark.parametrize("is_scaled", [True, False])
def test_the_document_is_read_once_for_all_questions(readers: Readers, is_scaled: bool) -> None:
    reader = readers.reader(is_scaled)
    read = []
    for question in TOUR.questions:
        stats = reader.ask(TOUR.document, question.text).stats
        read.append(stats.prompt_tokens - stats.reused_tokens)
    assert read[0] > 1000
    assert max(read[1:]) <= NEAR


@pytest.mark.parametrize("is_scaled", [True, False])
def test_each_reader_says_what_a_model_loaded_like_it_says(readers: Readers, folder: Path, is_scaled: bool) -> None:
    reader = readers.reader(is_scaled)
    scaling = SCALING if is_scaled else {"rope_type": "default"}
    model = ropewalk.load_model(folder, 2048, threads=1, backend="cpu", rope_scaling=scaling)
    if is_scaled:
        model.load_adapter(folder / "adapters" / ADAPTER, ADAPTER)
    question = TOUR.questions[1].text
    engine = Engine(model, load_tokenizer(folder))
    alone = engine.generate(
        reader.prompt_ids(TOUR.document, question), reader.params, adapters=ADAPTER if is_scaled else None
    )
    assert reader.ask(TOUR.document, question).token_ids == alone.token_ids


def test_the_two_ways_differ_and_the_loaded_model_stays_as_it_was(
    readers: Readers, loaded: tuple[Model, Tokenizer]
) -> None:
    asked = TOUR.questions[0].text
    answers = {way: readers.reader(way).ask(TOUR.document, asked).text for way in (True, False)}
    assert answers[True] != answers[False]
    assert loaded[0].rope.method.name == "none" and not loaded[0].adapters
    assert is_right(replace(TOUR.questions[0], answer=answers[True]), answers[True])
    assert not is_right(replace(TOUR.questions[0], answer=answers[True]), answers[False])


def test_it_says_why_in_numbers_of_the_model(readers: Readers) -> None:
    assert "Trained on 512 tokens, the model reads 1,277: linear scaling by 4" in why(TOUR, readers, True, 1277)
    assert "LoRA linear-4" in why(TOUR, readers, True, 1277)
    assert "LoRA" not in why(small_tour(adapter=None), readers, True, 1277)
    assert "positions 512 to 1,276" in why(TOUR, readers, False, 1277)


def test_a_scaling_that_there_is_not_names_the_file(folder: Path, loaded: tuple[Model, Tokenizer]) -> None:
    tour = small_tour(scaling={"rope_type": "rubber"})
    with pytest.raises(UnsupportedError, match="tour.json.*rubber"):
        open_readers(tour, folder, *loaded)


def test_the_embedded_model_answers_its_tour_with_its_scaling_and_not_without() -> None:
    tour = read_tour(demo_model_path())
    assert tour is not None
    model = ropewalk.load_model(demo_model_path(), threads=1, backend="cpu")
    readers = open_readers(tour, demo_model_path(), model, load_tokenizer(demo_model_path()))
    for question in tour.questions:
        assert is_right(question, readers.scaled.ask(tour.document, question.text).text)
        assert not is_right(question, readers.plain.ask(tour.document, question.text).text)
