"""Reading JSON with types: what is there comes back, and every mistake names file, key and what is accepted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.base.errors import ConfigError
from ropewalk.base.json import MAX_FILE_BYTES, Section, read_json_object, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=5), VALUES, max_size=5), mark=st.booleans())
def test_an_object_is_read_as_it_was_written(tmp_path_factory: Any, value: dict[str, Any], mark: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "object.json"
    path.write_text(json.dumps(value), encoding="utf-8-sig" if mark else "utf-8")
    assert read_json_object(path) == value


@given(content=st.binary(max_size=40))
def test_any_bytes_are_an_object_or_a_named_error(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json_object(path), dict)
    except ConfigError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[1]", r"must hold a JSON object, found list \[1\]"),
        (b"{", "is not valid JSON .* truncated"),
        (b"\xff{}", "is not UTF-8 text .* byte 0"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"config.json.*{message}"):
        read_json_object(path)


def test_what_cannot_be_read_to_its_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    for name, message in (("pipe", "not a regular file"), ("large", "larger than 64 MiB"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=f"{name} .*{message}"):
            read_json_object(tmp_path / name)


@given(value=VALUES, low=st.integers(-5, 5), width=st.integers(0, 10))
def test_integers_are_those_within_the_bounds_and_nothing_else(value: Any, low: int, width: int) -> None:
    section = Section("f.json", {"key": value}, "outer")
    accepted = type(value) is int and low <= value <= low + width
    try:
        assert section.integer("key", low, low + width) == value and accepted
    except ConfigError as error:
        assert not accepted
        assert f"f.json: outer.key must be an integer from {low} to {low + width}, found" in str(error)


@given(value=VALUES | st.floats(), above=st.booleans())
def test_numbers_are_finite_and_within_the_bounds(value: Any, above: bool) -> None:
    is_number = type(value) in (int, float) and not (isinstance(value, float) and not math.isfinite(value))
    accepted = is_number and (value > 1 if above else value >= 1) and value <= 8
    try:
        assert Section("f.json", {"key": value}).number("key", 1, 8, above=above) == value and accepted
    except ConfigError as error:
        assert not accepted and "f.json: key must be a number" in str(error)


@pytest.mark.parametrize("values", [{}, {"key": None}])
def test_null_counts_as_absent(values: dict[str, Any]) -> None:
    section = Section("f.json", values)
    assert not section.has("key")
    assert (section.text("key"), section.section("key"), section.boolean("key", True)) == (None, None, True)
    assert (section.optional_integer("key", 0, 1, "x"), section.optional_number("key", 0, 1, 7)) == ("x", 7)
    with pytest.raises(ConfigError, match="key must be an integer from 0 to 1, found nothing"):
        Section("f.json", {}).integer("key", 0, 1)


def test_keys_of_nested_objects_are_named_with_their_path() -> None:
    inner = Section("f.json", {"a": {"b": {"c": "text"}}}).section("a").section("b")
    with pytest.raises(ConfigError, match=r"f.json: a\.b\.c must be true or false, found 'text'"):
        inner.boolean("c", False)
    with pytest.raises(ConfigError, match=r"a\.b\.c must be an object"):
        inner.section("c")


@given(value=VALUES | st.just(10**5000))
def test_a_value_is_shown_short_and_on_one_line(value: Any) -> None:
    text = shown(value)
    assert len(text) <= 80 and "\n" not in text
