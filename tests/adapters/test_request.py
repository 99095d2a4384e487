"""Adapter requests as text and as values: read, printed in one spelling, mistakes pointed at."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.adapters.request import (
    MAX_TEXT,
    AdapterUse,
    checked_request,
    format_request,
    parse_request,
    parse_suffix,
)
from ropewalk.base.errors import RequestError
from ropewalk.config.layer_order import MAX_INSTANCES


@pytest.mark.parametrize(
    "text, expected",
    [
        ("storm", [AdapterUse("storm")]),
        (" storm : 0.5 + poet ", [AdapterUse("storm", 0.5), AdapterUse("poet")]),
        ("storm:-.5e1@10-11", [AdapterUse("storm", -5.0, (10, 11))]),
        ("storm@8, 3-5,4", [AdapterUse("storm", 1.0, (3, 4, 5, 8))]),
        ("storm:2@0+storm@1", [AdapterUse("storm", 2.0, (0,)), AdapterUse("storm", 1.0, (1,))]),
        ('"a+b:1@\\u00e9":0', [AdapterUse("a+b:1@é", 0.0)]),
        ("my storm/v1.2-x:1e+3+poet", [AdapterUse("my storm/v1.2-x", 1000.0), AdapterUse("poet")]),
    ],
)
def test_requests_are_read(text: str, expected: list[AdapterUse]) -> None:
    assert list(parse_request(text)) == expected


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("storm:1.0", "storm"),
        (" storm:0.50 @ 11,10,3 ", "storm:0.5@3,10-11"),
        ('"storm"@2-2', "storm@2"),
        ('"a+b"+" x"', '"a+b"+" x"'),
        ("storm:1e2", "storm:100"),
    ],
)
def test_requests_are_printed_in_one_spelling(text: str, canonical: str) -> None:
    assert format_request(parse_request(text)) == canonical


uses = st.builds(
    AdapterUse,
    st.text(min_size=1, max_size=8),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none() | st.sets(st.integers(0, MAX_INSTANCES - 1), min_size=1, max_size=6).map(lambda s: tuple(sorted(s))),
)


@given(st.lists(uses, min_size=1, max_size=4, unique_by=lambda use: use.name))
def test_what_is_printed_reads_as_it_was(request_uses: list[AdapterUse]) -> None:
    assert list(parse_request(format_request(request_uses))) == request_uses
    assert list(checked_request(request_uses)) == request_uses


@given(st.text(alphabet='ab01:@+-,." e\\\n', max_size=20))
def test_any_text_is_a_request_or_a_request_error(text: str) -> None:
    try:
        parsed = parse_request(text)
    except RequestError:
        return
    assert parse_request(format_request(parsed)) == parsed


@pytest.mark.parametrize(
    "text, column, message",
    [
        ("", 1, "the name of an adapter is needed"),
        ("storm+", 7, "the name of an adapter is needed"),
        ("storm:much", 7, "the weight after the colon must be a number"),
        ("storm:1e999", 7, "the weight must be a finite number"),
        ("storm@", 7, "the number of a layer instance is needed"),
        ("storm@3-", 9, "the number of a layer instance is needed"),
        ("storm@5-3", 9, "a range counts up: 3 comes before 5"),
        ("storm@2:0.5", 8, "a plus sign is needed"),
        ("storm:1 poet", 9, "a plus sign is needed"),
        (f"storm@{MAX_INSTANCES}", 7, f"never more than {MAX_INSTANCES} instances"),
        (f"storm@1-{'9' * 30}", 9, f"never more than {MAX_INSTANCES} instances"),
        ('"storm', 1, "a name in quotes must be a JSON string"),
    ],
)
def test_a_mistake_is_pointed_at(text: str, column: int, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(text, "model")
    first, _, caret = str(caught.value).splitlines()
    assert first.startswith("model: ") and message in first and f"at column {column}," in first
    assert "storm:0.5@10-11" in first  # what is accepted
    assert caret.index("^") == 2 + column - 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("storm+storm:0.5", "'storm' is named twice: give it once, with one weight, or each time with the instances"),
        ("storm+storm@3", "'storm' is named twice"),
        ("storm@3-9+poet+storm@1-4", "'storm' is named twice for the instances 3-4"),
        ("s" * (MAX_TEXT + 1), f"has {MAX_TEXT + 1} characters, at most {MAX_TEXT}"),
    ],
)
def test_one_adapter_counts_once_for_an_instance(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_request(text)


def test_requests_are_taken_in_every_form() -> None:
    expected = (AdapterUse("storm", 1.0, (10, 11)), AdapterUse("poet", 0.5))
    assert checked_request("storm@10-11+poet:0.5") == expected
    assert checked_request([("storm", 1, "10-11"), ("poet", 0.5)]) == expected
    assert checked_request([AdapterUse("storm", 1, [11, 10, 11]), ["poet", 0.5, None]]) == expected
    assert checked_request((("storm", 1.0, range(10, 12)), AdapterUse("poet", 0.5))) == expected
    assert checked_request(["a+b"]) == (AdapterUse("a+b"),)  # names in a list are names
    assert checked_request(None) == checked_request([]) == ()


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"storm": 1.0}, "must be a list such as"),
        ([("storm", 1.0, [])], "the instances of 'storm' must be None, a list of numbers, or text"),
        ([("storm", 1.0, 3)], "the instances of 'storm' must be None, a list of numbers, or text"),
        ([("storm", 1.0, [-1])], f"numbers from 0 to {MAX_INSTANCES - 1}, got -1"),
        ([("storm", 1.0, [True])], "got True"),
        ([("storm", 1.0, "3-x")], "the instances of 'storm': the number of a layer instance is needed at column 4"),
        ([("storm", 1.0, [1]), ("storm", 2.0, "0-1")], "'storm' is named twice for the instances 1"),
        ([AdapterUse("storm", float("inf"))], "the weight of 'storm' must be a finite number, got inf"),
        ([("", 1.0)], "an item must be a name"),
    ],
)
def test_requests_of_other_kinds_are_refused(request_: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        checked_request(request_)


def test_a_suffix_is_read_from_its_place_on() -> None:
    assert parse_suffix("folder", 6, "--adapter") == (None, None)
    assert parse_suffix("a@b:0.5", 3, "--adapter") == (0.5, None)
    assert parse_suffix("folder@3", 6, "--adapter") == (None, (3,))
    with pytest.raises(RequestError, match="--adapter: nothing may follow at column 9, found ':'"):
        parse_suffix("folder@3:1", 6, "--adapter")
