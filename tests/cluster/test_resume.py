"""A stream that goes on after a loss, wherever it broke: the client gets all of it once, as if nothing was lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.cluster.resume import DONE, ReplicaEnds, ReplyStream, StreamsDiffer

PIECES = st.lists(st.text(min_size=1, max_size=4), max_size=6)


def event(name: str, **fields: Any) -> bytes:
    chunk = {"id": name, "created": len(name), **fields}
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def chat_stream(name: str, choices: list[list[str]], logprobs: bool = False, usage: bool = False) -> list[bytes]:
    """The events of a reply: choices one after another, each as its pieces of text."""

    def choice(index: int, delta: dict[str, str], tokens: list[str], reason: str | None) -> bytes:
        found = {"content": [{"token": token} for token in tokens], "refusal": None} if logprobs else None
        return event(name, choices=[{"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}])

    events = [choice(i, {"role": "assistant", "content": ""}, [], None) for i in range(len(choices))]
    for index, pieces in enumerate(choices):
        events += [choice(index, {"content": piece}, [piece], None) for piece in pieces]
        events.append(choice(index, {}, ["</s>"], "length"))
    if usage:
        events.append(event(name, choices=[], usage={"total_tokens": 7}))
    return [*events, DONE]


def text_stream(name: str, pieces: list[str]) -> list[bytes]:
    """The same of /v1/completions, with log probabilities."""
    events, start = [], 0
    for piece in pieces:
        lists = {"tokens": [piece], "token_logprobs": [-1.0], "top_logprobs": [{}], "text_offset": [start]}
        events.append(event(name, choices=[{"index": 0, "text": piece, "logprobs": lists, "finish_reason": None}]))
        start += len(piece)
    events.append(event(name, choices=[{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]))
    return [*events, DONE]


def meaning(data: bytes) -> tuple[Any, ...]:
    """(ids, text, tokens, finish reasons of each choice; the number of closing events): what a client makes of it."""
    events = data.split(b"\n\n")[:-1]
    chunks = [json.loads(line[6:]) for line in events if line != b"data: [DONE]" and not line.startswith(b":")]
    found: dict[int, list[Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts, tokens, reasons = found.setdefault(choice["index"], [[], [], []])
        texts.append(choice["delta"].get("content", "") if "delta" in choice else choice["text"])
        logprobs = choice["logprobs"] or {}
        tokens += logprobs.get("content") or logprobs.get("tokens") or []
        reasons.append(choice["finish_reason"])
    choices = {i: ("".join(t), k, [r for r in reasons if r]) for i, (t, k, reasons) in sorted(found.items())}
    roles = sum("role" in choice.get("delta", ()) for chunk in chunks for choice in chunk["choices"])
    usages = sum(chunk.get("usage") is not None for chunk in chunks)
    return {(chunk["id"], chunk["created"]) for chunk in chunks}, choices, roles, usages, events.count(b"data: [DONE]")


@given(st.lists(PIECES, min_size=1, max_size=3), st.booleans(), st.booleans(), st.data())
def test_a_chat_goes_on_wherever_it_broke(choices, logprobs: bool, usage: bool, data: st.DataObject) -> None:
    first, second = (b"".join(chat_stream(name, choices, logprobs, usage)) for name in ("one", "another"))
    stream = ReplyStream()
    cut = data.draw(st.integers(0, len(first) - 1))
    got = stream.push(first[:cut])
    stream.restart_()
    pieces = sorted(data.draw(st.lists(st.integers(0, len(second)), max_size=4)))
    for start, end in zip([0, *pieces], [*pieces, len(second)], strict=True):
        got += stream.push(second[start:end])
    assert stream.is_complete
    told = meaning(got)
    assert told[1:] == meaning(first)[1:]
    assert len(told[0]) == 1


@given(PIECES, st.data())
def test_a_completion_goes_on_wherever_it_broke(pieces: list[str], data: st.DataObject) -> None:
    first, second = (b"".join(text_stream(name, pieces)) for name in ("one", "another"))
    stream = ReplyStream()
    got = stream.push(first[: data.draw(st.integers(0, len(first) - 1))])
    stream.restart_()
    got += stream.push(second)
    assert meaning(got)[1:] == meaning(first)[1:]


@given(PIECES.filter(bool), st.data())
def test_pieces_need_not_be_cut_alike(pieces: list[str], data: st.DataObject) -> None:
    first, whole = chat_stream("one", [pieces]), chat_stream("two", [["".join(pieces)]])
    stream = ReplyStream()
    got = stream.push(b"".join(first[: data.draw(st.integers(1, len(first) - 1))]))
    stream.restart_()
    got += stream.push(b"".join(whole))
    assert meaning(got)[1][0][0] == "".join(pieces)


def test_two_losses_are_one_too_many_for_nobody() -> None:
    events = chat_stream("one", [list("abcdef")])
    stream = ReplyStream()
    got = stream.push(b"".join(events[:3]))
    stream.restart_()
    got += stream.push(b"".join(chat_stream("two", [list("abcdef")])[:5]))
    stream.restart_()
    got += stream.push(b"".join(chat_stream("three", [list("abcdef")])))
    assert meaning(got) == meaning(b"".join(events))


def test_without_a_loss_bytes_pass_as_they_are() -> None:
    data = b": waiting at position 2 of the queue\n\n" + b"".join(chat_stream("one", [["a", "b"]]))
    stream = ReplyStream()
    assert b"".join(stream.push(bytes([byte])) for byte in data) == data
    assert stream.is_complete and stream.has_begun


def test_a_different_reply_is_not_taken_for_the_rest() -> None:
    stream = ReplyStream()
    stream.push(b"".join(chat_stream("one", [["good ", "morning"]])[:2]))
    stream.restart_()
    with pytest.raises(StreamsDiffer, match="differs"):
        stream.push(b"".join(chat_stream("two", [["bad ", "morning"]])))


def test_a_replica_that_is_stopped_has_not_answered() -> None:
    stream = ReplyStream()
    with pytest.raises(ReplicaEnds):
        stream.push(b'data: {"error":{"message":"the server is shutting down","code":"shutting_down"}}\n\n' + DONE)
    assert not stream.has_begun


def test_other_errors_pass() -> None:
    told = b'data: {"error":{"message":"the pages do not suffice","code":null}}\n\n' + DONE
    assert ReplyStream().push(told) == told
