"""A cursor over a short notation: numbers as they stand, and errors that point at the character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.base.errors import RequestError
from ropewalk.base.notation import TOO_LARGE, TextCursor, plain_number

SPACE = st.text(alphabet=" \t\r\n", max_size=3)


def cursor(text: str) -> TextCursor:
    return TextCursor(text, "order", RequestError, '"0-3"')


@given(SPACE, st.integers(0, 10**9 - 1), st.text(alphabet="0", max_size=12))
def test_integers_are_read_past_space_and_leading_zeros(space: str, value: int, zeros: str) -> None:
    read = cursor(f"{space}{zeros}{value},")
    assert read.integer("a number") == (len(space), value)
    assert read.accepts(",") and read.at_end


def test_an_integer_of_too_many_digits_is_too_large_and_costs_nothing() -> None:
    assert cursor("9" * 100_000).integer("a number") == (0, TOO_LARGE)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_printed_number_reads_back_as_the_same(value: float) -> None:
    text = plain_number(value)
    assert cursor(text).decimal("a number is needed") == (0, value)
    assert not text.endswith(".0")


@given(st.text(max_size=100), st.data())
def test_the_caret_stands_below_the_character(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    with pytest.raises(RequestError) as caught:
        cursor(text).fail(at, "a comma is needed")
    first, line, caret = str(caught.value).split("\n")
    assert first.startswith(f"order: a comma is needed at column {at + 1}, found ")
    place = caret.index("^")
    assert caret.strip() == "^" and len(line) <= 70
    meant = text[at : at + 1]
    plain = meant.isascii() and meant.isprintable()
    assert line[place : place + 1] == (meant if plain else "?")


@pytest.mark.parametrize("text", ["", "  ", "x", "-1", "٣"])
def test_what_is_no_integer_is_named(text: str) -> None:
    with pytest.raises(RequestError, match="order: a layer number is needed at column"):
        cursor(text).integer("a layer number")
