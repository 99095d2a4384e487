"""Histories that are edited, cropped, shared and swapped: the logits stay those of a fresh run, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_checkpoint import fresh_logits, ours, tokens
from ropewalk.base.errors import RequestError
from ropewalk.hf import RopewalkForCausalLM, TokenHistory

IDS = st.lists(st.integers(3, 9), min_size=1, max_size=12)  # few values, so that prefixes coincide by chance
CALL = st.tuples(st.just("extend"), st.integers(0, 2), IDS, st.integers(0, 5))
CROP = st.tuples(st.just("crop"), st.integers(0, 2), st.integers(-12, 12), st.none())
NEW = st.tuples(st.just("new"), st.integers(0, 2), st.none(), st.none())
PLAIN = st.tuples(st.just("plain"), st.none(), IDS, st.integers(0, 5))
LOSS = st.tuples(st.just("loss"), st.none(), IDS, st.none())


@pytest.fixture(scope="module")
def model() -> RopewalkForCausalLM:
    return ours(compute="int8")


@settings(max_examples=120, deadline=None)
@given(st.lists(CALL | CROP | NEW | PLAIN | LOSS, max_size=12))
def test_any_order_of_calls_crops_and_swaps_gives_the_logits_of_a_fresh_run(model, actions) -> None:
    histories, mirror = [TokenHistory() for _ in range(3)], [[], [], []]
    for kind, index, value, keep in actions:
        if kind == "new":
            histories[index], mirror[index] = TokenHistory(), []
        elif kind == "crop":
            histories[index].crop(value)
            mirror[index] = mirror[index][: value or None] if value else mirror[index]
        elif kind == "loss":
            model(torch.tensor([value]), labels=torch.tensor([value]))
        else:
            before = [] if index is None else mirror[index]
            past = None if index is None else histories[index]
            out = model(torch.tensor([value]), past_key_values=past, logits_to_keep=keep)
            whole = before + value
            expected = fresh_logits(model.ropewalk_model, whole)[len(before) :][-keep if keep else 0 :]
            assert torch.equal(out.logits[0], expected)
            if index is not None:
                mirror[index] = whole
        assert [history.token_ids for history in histories] == mirror


@pytest.mark.parametrize("failing", ["cancelled", "too long"])
def test_a_call_that_fails_takes_nothing_from_a_history_that_others_continue(failing: str) -> None:
    model = ours(max_input_len=8)
    history = model(tokens(20)).past_key_values
    if failing == "cancelled":
        seen: list[int] = []
        model.watch(lambda done, total: seen.append(done), lambda: len(seen) >= 3)
    with pytest.raises(RequestError, match="cancelled" if failing == "cancelled" else "1 more than the context"):
        model(tokens(30 if failing == "cancelled" else 257, seed=1))
    model.watch()
    out = model(tokens(5, seed=2), past_key_values=history)
    whole = torch.cat([tokens(20), tokens(5, seed=2)], dim=1)[0].tolist()
    assert torch.equal(out.logits[0], fresh_logits(model.ropewalk_model, whole)[20:])


@given(IDS, IDS)
def test_the_common_prefix_is_the_longest_one(ours_ids, theirs_ids) -> None:
    history = TokenHistory()
    history.extend_(ours_ids)
    expected = 0
    while expected < min(len(ours_ids), len(theirs_ids)) and ours_ids[expected] == theirs_ids[expected]:
        expected += 1
    assert history.common_prefix(np.asarray(theirs_ids)) == expected


def test_a_history_grows_past_its_first_room() -> None:
    history = TokenHistory()
    history.extend_(range(1000))
    history.extend_(range(5000))
    history.extend_([7])
    assert history.token_ids == [*range(1000), *range(5000), 7]
    assert len(history) == history.get_seq_length() == 6001


@pytest.mark.parametrize("argument, left", [(-2, 3), (-9, 0), (0, 5), (2, 2), (9, 5)])
def test_cropping_follows_both_conventions_of_transformers(argument: int, left: int) -> None:
    history = TokenHistory()
    history.extend_([3, 4, 5, 6, 7])
    history.crop(argument)
    assert history.token_ids == [3, 4, 5, 6, 7][:left]


def test_an_output_with_a_history_can_be_printed() -> None:
    history = TokenHistory()
    history.extend_([5, 6, 7])
    assert repr(history) == "TokenHistory(3 tokens)"
    assert "TokenHistory(3 tokens)" in repr(CausalLMOutputWithPast(past_key_values=history))
    assert list(history) == []
