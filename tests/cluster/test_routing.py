"""Where requests go, without Ray: the laws that hold for any sequence of them, and the cases that matter."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.cluster.prefixes import Chain
from ropewalk.cluster.routing import BLOCKS_PER_REPLY, MOST_AHEAD, KnownPrefixes, PrefixRouting, TwoChoices

REPLICAS = ("a", "b", "c", "d")
IDLE = dict.fromkeys(REPLICAS, 0)
CHAIN = st.lists(st.integers(0, 3), max_size=6).map(lambda parts: chain_of(*parts))
LOADS = st.dictionaries(st.sampled_from(REPLICAS), st.integers(0, 20), min_size=1)


def chain_of(*parts: int) -> Chain:
    """Entries that stand for all that comes before them, as hashes do."""
    return tuple(hash((0, *parts[: i + 1])) for i in range(len(parts)))


def long_chain(*parts: int, blocks: int = 20) -> Chain:
    return chain_of(*(part for part in parts for _ in range(blocks)))


@given(st.lists(st.tuples(CHAIN, st.sampled_from(REPLICAS))), CHAIN, LOADS, st.sets(st.sampled_from(REPLICAS)))
def test_every_replica_is_in_the_order_once(sent, chain: Chain, loads: dict[str, int], avoid: set[str]) -> None:
    routing: PrefixRouting[str] = PrefixRouting()
    for earlier, replica in sent:
        routing.sent_(replica, earlier)
    for each in (routing, TwoChoices(0)):
        order = each.order(chain, loads, avoid)
        assert sorted(order) == sorted(loads)
        is_avoided = [replica in avoid for replica in order]
        if each is routing:
            assert is_avoided == sorted(is_avoided)
        assert not is_avoided[0] or all(is_avoided), "one to be avoided is first only where there is no other"


@given(st.lists(st.tuples(CHAIN, st.sampled_from(REPLICAS))), CHAIN, LOADS)
def test_nobody_gets_far_ahead(sent, chain: Chain, loads: dict[str, int]) -> None:
    routing: PrefixRouting[str] = PrefixRouting()
    for earlier, replica in sent:
        routing.sent_(replica, earlier)
    assert loads[routing.order(chain, loads)[0]] <= min(loads.values()) + MOST_AHEAD


@given(st.lists(CHAIN), st.integers(1, 8))
def test_what_is_remembered_is_bounded_and_what_is_known_is_a_prefix(chains: list[Chain], most: int) -> None:
    known = KnownPrefixes(most)
    for chain in chains:
        known.remember_(chain)
        assert len(known) <= most
        assert known.num_known(chain) == min(len(set(chain)), most), "the beginning is forgotten last"


def test_a_conversation_stays_where_it_is() -> None:
    routing: PrefixRouting[str] = PrefixRouting()
    home = routing.order(long_chain(1), IDLE)[0]
    routing.sent_(home, long_chain(1))
    for turns in ((1, 2), (1, 2, 3), (1, 2, 3, 4)):
        assert routing.order(long_chain(*turns), IDLE)[0] == home
        routing.sent_(home, long_chain(*turns))


def test_new_conversations_spread_over_the_replicas() -> None:
    routing: PrefixRouting[str] = PrefixRouting()
    taken = []
    for number in range(8):
        taken.append(routing.order(long_chain(100 + number), IDLE)[0])
        routing.sent_(taken[-1], long_chain(100 + number))
    assert Counter(taken) == dict.fromkeys(REPLICAS, 2)


def test_a_shared_beginning_is_read_by_another_replica_once_that_is_faster() -> None:
    """20 known blocks outweigh two replies, not three."""
    routing: PrefixRouting[str] = PrefixRouting()
    routing.sent_("a", long_chain(1))
    fresh = [*long_chain(1, 2)]
    busy = 20 // BLOCKS_PER_REPLY
    assert routing.order(tuple(fresh), IDLE | {"a": busy})[0] == "a"
    assert routing.order(tuple(fresh), IDLE | {"a": busy + 1})[0] != "a"


def test_what_a_lost_replica_knew_is_forgotten() -> None:
    routing: PrefixRouting[str] = PrefixRouting()
    routing.sent_("d", long_chain(1))
    assert routing.order(long_chain(1), IDLE)[0] == "d"
    routing.keep_only_(["a", "b", "c"])
    assert routing.order(long_chain(1), IDLE)[0] == "a"


def test_there_may_be_no_replica() -> None:
    assert PrefixRouting().order(long_chain(1), {}) == TwoChoices().order((), {}) == []


@pytest.mark.parametrize("busy", REPLICAS)
def test_of_two_choices_the_busiest_replica_is_never_the_first(busy: str) -> None:
    routing: TwoChoices[str] = TwoChoices(seed=1)
    firsts = Counter(routing.order((), IDLE | {busy: 5})[0] for _ in range(200))
    assert set(firsts) == set(REPLICAS) - {busy}
