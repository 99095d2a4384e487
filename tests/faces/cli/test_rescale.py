"""The command /rescale of a conversation in the terminal."""

from __future__ import annotations

import pytest

from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.rescale import parse_rescale


@pytest.mark.parametrize(
    "text, expected",
    [
        (" yarn 4", {"mode": "rotate", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("ntk 2.5 recompute", {"mode": "recompute", "rope_scaling": {"rope_type": "ntk", "factor": 2.5}}),
        ("none", {"mode": "rotate", "rope_scaling": {"rope_type": "default"}}),
        ("auto recompute", {"mode": "recompute", "rope_scaling": "auto"}),
        ("as-declared", {"mode": "rotate", "rope_scaling": None}),
        ('{"type": "linear", "factor": 4}', {"mode": "rotate", "rope_scaling": {"type": "linear", "factor": 4}}),
    ],
)
def test_a_scaling_is_spelled_in_a_few_words(text: str, expected: dict) -> None:
    assert parse_rescale(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "'' is not a RoPE scaling. /rescale METHOD"),
        ("rotate", "is not a RoPE scaling"),
        ("quick 4", "'quick 4' is not a RoPE scaling"),
        ("yarn", "yarn needs a factor"),
        ("yarn four", "a factor must be a number, got 'four'"),
        ("none 4", "none takes no factor"),
        ('{"type": ', "not JSON"),
    ],
)
def test_anything_else_is_explained(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_rescale(text)
