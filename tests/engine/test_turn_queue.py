"""engine/turn_queue.py: turns in order of arrival."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.base.errors import QueueFullError, RequestError
from ropewalk.engine.turn_queue import TurnQueue


def test_a_free_turn_is_had_at_once_and_the_others_wait_in_order() -> None:
    queue = TurnQueue(num_turns=2)
    tickets = [queue.enter() for _ in range(5)]
    assert [ticket.position for ticket in tickets] == [0, 0, 1, 2, 3]
    assert [ticket.has_turn for ticket in tickets] == [True, True, False, False, False]
    assert (queue.num_running, queue.num_waiting) == (2, 3)


def test_closing_hands_the_turn_to_the_first_in_the_queue() -> None:
    queue = TurnQueue()
    first, second, third = queue.enter(), queue.enter(), queue.enter()
    first.close()
    first.close()
    assert second.wait(0) and not third.wait(0)
    assert (second.position, third.position) == (0, 1)


def test_a_waiting_ticket_leaves_the_queue_when_closed_and_never_gets_a_turn() -> None:
    queue = TurnQueue()
    first, second, third = queue.enter(), queue.enter(), queue.enter()
    second.close()
    assert third.position == 1
    first.close()
    assert third.has_turn and not second.has_turn and second.closed
    third.close()
    assert (queue.num_running, queue.num_waiting) == (0, 0)


def test_closing_wakes_a_thread_that_waits_on_the_ticket() -> None:
    queue = TurnQueue()
    queue.enter()
    waiting = queue.enter()
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(waiting.wait(10)), daemon=True)
    thread.start()
    waiting.close()
    thread.join(timeout=10)
    assert answers == [False]


def test_past_the_limit_a_ticket_is_refused_and_the_message_says_how_many_there_are() -> None:
    queue = TurnQueue(num_turns=1, limit=2)
    running, waiting, _ = queue.enter(), queue.enter(), queue.enter()
    with pytest.raises(QueueFullError, match="the queue is full: 1 running and 2 waiting, which is the limit"):
        queue.enter()
    waiting.close()
    assert queue.enter().position == 2
    running.close()


def test_with_a_limit_of_none_waiting_a_free_turn_is_still_had() -> None:
    queue = TurnQueue(num_turns=1, limit=0)
    with queue.enter() as ticket:
        assert ticket.has_turn
        with pytest.raises(QueueFullError):
            queue.enter()
    assert queue.enter().has_turn


def test_the_callback_comes_once_with_the_turn() -> None:
    queue = TurnQueue()
    calls: list[str] = []
    first = queue.enter(lambda: calls.append("first"))
    second = queue.enter(lambda: calls.append("second"))
    assert calls == ["first"]
    first.close()
    second.close()
    assert calls == ["first", "second"]


def test_whoever_needs_all_turns_waits_for_all_and_is_not_overtaken() -> None:
    queue = TurnQueue(num_turns=2)
    first, second = queue.enter(), queue.enter()
    everything, later = queue.enter(turns=2), queue.enter()
    first.close()
    assert not everything.has_turn and not later.has_turn
    second.close()
    assert everything.has_turn and not later.has_turn
    everything.close()
    assert later.has_turn


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 9), max_size=60))
def test_turns_are_never_lost_nor_given_twice_nor_out_of_order(num_turns: int, actions: list[int]) -> None:
    queue, tickets, called = TurnQueue(num_turns), [], []
    for action in actions:
        if action < 6 or not tickets:
            number = len(tickets)
            tickets.append(queue.enter(lambda number=number: called.append(number)))
        else:
            tickets[(action * 7919) % len(tickets)].close()
        open_tickets = [ticket for ticket in tickets if not ticket.closed]
        running = [ticket for ticket in open_tickets if ticket.has_turn]
        waiting = [ticket for ticket in open_tickets if not ticket.has_turn]
        assert len(running) == min(num_turns, len(open_tickets)) == queue.num_running
        assert [ticket.position for ticket in waiting] == list(range(1, queue.num_waiting + 1))
        assert called == sorted(set(called))


def test_a_client_with_many_requests_does_not_keep_out_one_with_a_single_one() -> None:
    queue = TurnQueue(num_turns=2)
    many = [queue.enter(client="many") for _ in range(5)]
    single = queue.enter(client="single")
    assert [ticket.position for ticket in (*many, single)] == [0, 0, 2, 3, 4, 1]
    many[0].close()
    assert single.has_turn and not many[2].has_turn


def test_tickets_without_a_client_are_clients_of_their_own() -> None:
    queue = TurnQueue(num_turns=2)
    queue.enter(client="a"), queue.enter(client="a")
    waiting = [queue.enter(client="a"), queue.enter(), queue.enter()]
    assert [ticket.position for ticket in waiting] == [3, 1, 2]


def test_a_request_that_leaves_the_queue_does_not_count_for_its_client() -> None:
    queue = TurnQueue()
    queue.enter(client="a")
    for ticket in [queue.enter(client="a") for _ in range(3)]:
        ticket.close()
    again, other = queue.enter(client="a"), queue.enter(client="b")
    third = queue.enter(client="b")
    assert [again.position, other.position, third.position] == [2, 1, 3]


def test_interactive_requests_go_before_batch_requests() -> None:
    queue = TurnQueue()
    running = queue.enter(priority="batch")
    batch, interactive = queue.enter(priority="batch"), queue.enter()
    assert (batch.position, interactive.position) == (2, 1)
    running.close()
    assert interactive.has_turn and not batch.has_turn


def test_an_unknown_priority_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RequestError, match="priority must be one of 'interactive', 'batch', got 'high'"):
        TurnQueue().enter(priority="high")


def test_with_a_single_turn_clients_alternate() -> None:
    queue, order = TurnQueue(), []
    tickets = [queue.enter(lambda name=name: order.append(name), client=name) for name in "aaabab"]
    while queue.num_running:
        next(ticket for ticket in tickets if ticket.has_turn).close()
    assert "".join(order) == "ababaa"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30))
def test_the_positions_shown_are_the_order_in_which_turns_come(num_turns: int, asked: list[tuple[int, bool]]) -> None:
    queue, order, tickets = TurnQueue(num_turns), [], []
    for number, (client, batch) in enumerate(asked):
        priority = "batch" if batch else "interactive"
        tickets.append(queue.enter(lambda number=number: order.append(number), client=client, priority=priority))
    expected = sorted((ticket.position, number) for number, ticket in enumerate(tickets) if not ticket.has_turn)
    order.clear()
    while queue.num_running:
        next(ticket for ticket in tickets if ticket.has_turn).close()
    assert order == [number for _, number in expected]


def test_a_queue_keeps_nothing_of_those_who_have_left() -> None:
    queue = TurnQueue(2)
    left = []
    for number in range(20):
        tickets = [queue.enter(), queue.enter(client=f"client {number}"), queue.enter(client="regular")]
        left += [weakref.ref(ticket) for ticket in tickets]
        for ticket in tickets:
            ticket.close()
    del tickets, ticket
    gc.collect()
    assert [ref() for ref in left if ref() is not None] == []
    assert not queue._next_round and not queue._open
