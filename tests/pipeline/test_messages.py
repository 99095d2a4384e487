"""backends/pipeline/messages.py: what is encoded is what is decoded, and what is damaged is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.backends.pipeline.messages import DTYPES, KINDS, Changes, Step, body_size, decode, encode
from ropewalk.base.errors import RankError

JSON = st.recursive(
    st.integers(-(2**60), 2**60) | st.text(max_size=9) | st.booleans(), lambda inner: st.lists(inner, max_size=3)
)
VALUES = {
    "int": st.integers(-(2**62), 2**62),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "str": st.text(max_size=20),
    "list": st.lists(JSON, max_size=5),
}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    made = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return made.view(dtype).view(shape) if shape else made.view(dtype)[0]


@st.composite
def messages(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(list(KINDS.values())))
    given_ = {field.name: draw(VALUES.get(field.type, tensors())) for field in fields(kind)}
    return kind(**given_)


def content(message: Any) -> list[Any]:
    def shown(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        raw = value.contiguous().flatten().view(torch.uint8)
        return value.dtype, tuple(value.shape), raw.tolist()

    return [type(message), *(shown(getattr(message, field.name)) for field in fields(message))]


@settings(max_examples=150, deadline=None)
@given(messages())
def test_a_message_arrives_as_it_was_sent(message: Any) -> None:
    prefix, body = encode(message)
    assert body_size(prefix) == len(body)
    assert content(decode(prefix, body)) == content(message)


@settings(max_examples=150, deadline=None)
@given(messages(), st.data())
def test_what_is_cut_or_changed_is_refused_or_another_message_but_never_anything_else(message: Any, data: Any) -> None:
    prefix, body = encode(message)
    place = data.draw(st.integers(0, len(prefix) + len(body) - 1))
    whole = torch.cat([prefix, body])
    whole[place] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(whole[:16].clone(), whole[16:].clone())
    except RankError:
        return
    assert type(found) in KINDS.values()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda prefix, body: (torch.zeros_like(prefix), body), "is no message of ropewalk"),
        (lambda prefix, body: (prefix, body[:-1]), "bytes was announced as"),
        (lambda prefix, body: (prefix, torch.zeros_like(body)), "a message between ranks is damaged"),
    ],
)
def test_a_damaged_message_is_told_as_one(damage: Any, told: str) -> None:
    with pytest.raises(RankError, match=told):
        decode(*damage(*encode(Changes([["drop", 3]]))))


def test_tensors_can_be_written_where_they_arrived() -> None:
    ints, empty = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(0)
    x = torch.arange(6.0).view(2, 3)
    prefix, body = encode(Step(7, [], ints, ints[0], ints[:, :2], empty.double(), empty, empty, x))
    decode(prefix, body).x.mul_(2)
    assert torch.equal(decode(prefix, body).x, 2 * x)
