"""generate/stops.py: a stop string is never shown, and nothing is held back that could not become one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ropewalk.generate.stops import StopStrings

TEXT = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def expected(text: str, stops: list[str]) -> str:
    """The text up to the stop string that is complete first (the longest of those), straight from the definition."""
    for end in range(len(text) + 1):
        starts = [text.find(stop, 0, end) for stop in stops if stop in text[:end]]
        if starts:
            return text[: min(starts)]
    return text


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=6))
def test_pieces_end_where_a_stop_string_begins_whatever_the_cuts(text: str, stops: list[str], cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    filter_ = StopStrings(stops)
    shown = "".join([*map(filter_.push, pieces), filter_.flush()])
    assert shown == expected(text, stops)
    assert (filter_.found is None) == all(stop not in text for stop in stops)


@given(text=TEXT, stops=STOPS)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    filter_ = StopStrings(stops)
    shown = ""
    for position, character in enumerate(text, 1):
        shown += filter_.push(character)
        if filter_.found is not None:
            return
        held = text[len(shown) : position]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_flows_at_once_without_stop_strings() -> None:
    filter_ = StopStrings(())
    assert [filter_.push("abc"), filter_.flush()] == ["abc", ""]
