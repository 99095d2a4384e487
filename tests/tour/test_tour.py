"""The file of a tour: what is written is read again, and whatever is wrong is named with its file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.base.errors import ConfigError
from ropewalk.tour.tour import MAX_DOCUMENT, Measured, Question, Tour, read_tour, tour_file, write_tour
from tours import small_tour

TEXTS = st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text)
PLAIN_JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@st.composite
def tours(draw: st.DrawFn) -> Tour:
    passages = draw(st.lists(TEXTS, min_size=3, max_size=6, unique=True))
    texts = draw(st.lists(TEXTS, min_size=3, max_size=3, unique=True))
    questions = tuple(Question(text, draw(TEXTS), draw(st.sampled_from(passages)), draw(TEXTS)) for text in texts)
    asked = draw(st.integers(3, 10_000))
    right = [draw(st.integers(0, asked)) for _ in range(2)]
    measured = Measured(draw(st.integers(1, 9999)), draw(st.integers(1, 99)), asked, *right)
    return Tour(draw(TEXTS), " ".join(passages), questions, {"rope_type": "linear", "factor": 4.0}, None, measured)


@TMP_PATH
@given(tour=tours())
def test_what_is_written_is_read_again(tour: Tour, tmp_path: Path) -> None:
    write_tour(tour, tmp_path)
    assert read_tour(tmp_path) == tour


def damaged(folder: Path, change: Any) -> Path:
    """A tour whose JSON went through `change`."""
    write_tour(small_tour(adapter=None), folder)
    whole = json.loads(tour_file(folder).read_text())
    change(whole)
    tour_file(folder).write_text(json.dumps(whole))
    return folder


FIELDS = ("ropewalk", "version", "title", "document", "questions", "scaling", "measured")


@TMP_PATH
@given(name=st.sampled_from(FIELDS), value=PLAIN_JSON)
def test_a_field_of_any_other_kind_is_an_error_that_names_it(name: str, value: Any, tmp_path: Path) -> None:
    folder = damaged(tmp_path, lambda whole: whole.update({name: value}))
    try:
        read = read_tour(folder)
    except ConfigError as error:
        assert str(tour_file(folder)) in str(error)
        assert name in str(error) or (name == "document" and "passage" in str(error))
    else:
        assert name in ("title", "scaling") and getattr(read, name) == value


def first_question(**changes: Any) -> Any:
    return lambda whole: whole["questions"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_question(passage="nowhere"), r"questions\[0\].passage must be a sentence of the document"),
        (first_question(answer=" "), r"questions\[0\].answer must be a text that is not empty"),
        (first_question(kind=3), r"questions\[0\].kind must be a string, found 3"),
        (
            lambda whole: whole["questions"].__setitem__(1, whole["questions"][0]),
            r"questions\[1\].text must be a question that no other of the list is",
        ),
        (lambda whole: whole["questions"].pop(), "questions must be a list of 3 objects"),
        (
            lambda whole: whole["measured"].update(right_plain=33),
            "measured.right_plain must be .* from 0 to 32",
        ),
        (lambda whole: whole.update(adapter="absent"), "adapter must be the name of a folder in .*found 'absent'"),
        (lambda whole: whole.update(adapter="../adapters/x"), "adapter must be the name of a folder"),
        (lambda whole: whole.update(document="x" * (MAX_DOCUMENT + 1)), "document has .* at most"),
    ],
)
def test_what_is_wrong_is_named(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_tour(damaged(tmp_path, change))
    assert str(tour_file(tmp_path)) in str(caught.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    tour_file(tmp_path).parent.mkdir()
    tour_file(tmp_path).write_text('{"ropewalk": "tour",')
    with pytest.raises(ConfigError, match="tour.json is not valid JSON"):
        read_tour(tmp_path)


def test_a_model_without_a_tour_has_none(tmp_path: Path) -> None:
    assert read_tour(tmp_path) is None
