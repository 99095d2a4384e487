"""Chains of hashes: equal exactly as far as prompts begin alike."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ropewalk.cluster.prefixes import BLOCK_BYTES, MOST_BLOCKS, Chain, prefix_chain

TEXT = st.text(max_size=3 * BLOCK_BYTES)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))


def num_common(a: Chain, b: Chain) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(MESSAGE, max_size=5), st.lists(MESSAGE, max_size=3))
def test_a_conversation_that_goes_on_begins_like_it_did(messages: list[Any], more: list[Any]) -> None:
    before, after = prefix_chain({"messages": messages}), prefix_chain({"messages": [*messages, *more]})
    assert after[: len(before)] == before


@given(st.binary(min_size=1, max_size=5 * BLOCK_BYTES), st.data())
def test_texts_agree_up_to_the_block_in_which_they_differ(content: bytes, data: st.DataObject) -> None:
    text = content.hex()
    place = data.draw(st.integers(0, len(text) - 1))
    other = text[:place] + "-" + text[place + 1 :]
    first, second = prefix_chain({"prompt": text}), prefix_chain({"prompt": other})
    before = 1 + place  # what stands before the text: the model's name, which is empty, and a separator
    assert len(first) == len(second)
    assert num_common(first, second) == min(before // BLOCK_BYTES, len(first))


@given(st.lists(st.integers(0, 1000), max_size=300), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_token_ids_that_go_on_begin_like_they_did(ids: list[int], more: list[int]) -> None:
    before, after = prefix_chain({"prompt": ids}), prefix_chain({"prompt": ids + more})
    assert num_common(before, after) >= len(before) - 1  # the last block may hold the end of the text


def test_adapters_and_tools_stand_before_the_messages() -> None:
    messages = [{"role": "user", "content": "x" * 10 * BLOCK_BYTES}]
    plain = prefix_chain({"messages": messages})
    assert len(plain) == 10
    for other in ({"model": "tiny+storm"}, {"tools": [{"type": "function"}]}):
        assert num_common(plain, prefix_chain({"messages": messages} | other)) == 0


def test_the_borders_of_messages_count() -> None:
    def chain(*contents: str) -> Chain:
        return prefix_chain({"messages": [{"role": "user", "content": content} for content in contents]})

    assert chain("a" * 300, "b" * 300) != chain("a" * 301, "b" * 299)


@given(st.dictionaries(st.sampled_from(["model", "messages", "prompt", "tools"]), JSON))
def test_what_no_server_accepts_has_a_chain_all_the_same(fields: dict[str, Any]) -> None:
    assert isinstance(prefix_chain(fields), tuple)


def test_a_very_long_prompt_is_hashed_up_to_a_limit() -> None:
    assert len(prefix_chain({"prompt": "x" * (BLOCK_BYTES * (MOST_BLOCKS + 10))})) == MOST_BLOCKS
