"""model/pipeline/balance.py and backends/pipeline/shares.py: which rank runs what."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_writer import write_checkpoint
from ropewalk.backends.pipeline.shares import Shares
from ropewalk.base.errors import ConfigError
from ropewalk.model.loader import load_model
from ropewalk.model.options import LoadOptions, parse_pipeline
from ropewalk.model.pipeline.balance import balanced, choose_counts
from ropewalk.model.plan import plan_loading


def slowest(sizes: list[int], first: int, counts: list[int]) -> int:
    sums, at = [], 0
    for count in counts:
        sums.append(sum(sizes[at : at + count]))
        at += count
    return max(first + sums[0], *sums[1:])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=7), st.integers(0, 20), st.data())
def test_no_other_choice_has_a_faster_slowest_rank(sizes: list[int], first: int, data: Any) -> None:
    ranks = data.draw(st.integers(2, len(sizes)))
    counts = balanced(sizes, first, ranks)
    assert len(counts) == ranks and sum(counts) == len(sizes) and min(counts[1:]) >= 1
    every = []
    for cuts in combinations(range(len(sizes)), ranks - 1):
        ends = (*cuts, len(sizes))
        every.append([ends[0], *(after - before for before, after in zip(ends, ends[1:], strict=False))])
    assert slowest(sizes, first, counts) == min(slowest(sizes, first, other) for other in every)


def test_ranks_run_instances_in_their_order_and_the_last_takes_what_is_more() -> None:
    shares = Shares.of_counts([0, 2, 3])
    assert shares.firsts == (0, 0, 2)
    assert [shares.rank_of(instance) for instance in range(7)] == [1, 1, 2, 2, 2, 2, 2]
    assert (shares.counts(7), shares.counts(5), shares.counts(1)) == ([0, 2, 5], [0, 2, 3], [0, 1, 0])
    assert shares.ranks_of(0, [0, 1, 0, 2, 1]) == (1, 2)
    assert shares.ranks_of(9, [0, 1, 0, 2, 1]) == (2,)


@pytest.mark.parametrize("value", [1, 0, True, 2.0, "x", "3,0", "-1,2", "", "2,", [2], "1"])
def test_what_is_no_number_of_processes_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="pipeline must be a number of processes from 2 on, or layer instances"):
        LoadOptions(pipeline=value)


def test_a_number_is_one_however_it_is_written() -> None:
    assert parse_pipeline(4) == parse_pipeline("4") == 4
    assert parse_pipeline("0,2,3") == (0, 2, 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pipeline": 5}, "pipeline=5: the model runs 4 layer instances, and each process needs one: give at most 4"),
        ({"pipeline": "1,2"}, "shares out 3 layer instances, and the model runs 4"),
        ({"pipeline": 2, "layer_order": "0"}, "the model runs 1 layer instances"),
        ({"pipeline": 2, "gpu_layers": 1, "device": "cpu"}, "leave out gpu_layers and gpu_split"),
    ],
)
def test_shares_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    write_checkpoint(tmp_path, {"num_hidden_layers": 4})
    with pytest.raises(ConfigError, match=told):
        load_model(tmp_path, options=LoadOptions(**options))


def test_rank_0_has_fewer_layers_for_its_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"num_hidden_layers": 4, "vocab_size": 4096})
    options = LoadOptions(pipeline=2, max_seq_len=64)
    assert choose_counts(tmp_path, plan_loading(tmp_path, options), options)[0] < 2
