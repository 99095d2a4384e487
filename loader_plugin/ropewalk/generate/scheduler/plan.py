"""Which rows go into the next step: a function of plain data, without threads and without a model.

    1. replies: all of their rows (the last token, and guesses after it)
    2. prompts, up to a budget of work: interactive ones first, batch ones get what is left
         shortest remainders first, so that a short question is answered soon;
         but once one has gone MOST_PASSED steps without a row, the work of a step is shared fairly between clients,
         and that of a client between its prompts

A step that is shared fairly keeps a long prompt going while short ones arrive, and one client with many prompts from
holding up another with one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

from ropewalk.base.errors import RequestError

INTERACTIVE, BATCH = "interactive", "batch"
PRIORITIES = (INTERACTIVE, BATCH)  # the most important first
MOST_PASSED = 4  # steps in a row that give a waiting prompt nothing
PAGE_ROWS = 64  # tokens of a page of cache, the least that sequences share

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Want:
    """Rows that a sequence could have computed in the next step.

    number: of the sequence; older ones have lower numbers. rows: at least 1. client: None is a client of its own.
    passed: steps since it had rows. row_work: of one of its rows, at least 1; more with many keys before it.
    """

    number: int
    rows: int
    is_reply: bool = False
    client: Hashable = None
    priority: str = INTERACTIVE
    passed: int = 0
    row_work: float = 1.0

    @property
    def work(self) -> int:
        """Of all its rows."""
        return ceil(self.rows * self.row_work)

    def rows_for(self, work: int) -> int:
        """Its rows for so much work, which may be a little too little for one."""
        return min(self.rows, max(round(work / self.row_work), 1)) if work > 0 else 0

    @property
    def is_due(self) -> bool:
        """Whether it must not be passed over again."""
        return self.passed >= MOST_PASSED


@dataclass(frozen=True, slots=True)
class Reader:
    """A prompt that is being read: `done` of its tokens are in the cache. origin: equal ones can share their pages."""

    number: int
    token_ids: Sequence[int]
    done: int
    origin: Hashable
    priority: str = INTERACTIVE


def check_priority(priority: str) -> str:
    """Raises:
    RequestError: not one of the priorities.
    """
    if priority not in PRIORITIES:
        raise RequestError(f"priority must be one of {', '.join(map(repr, PRIORITIES))}, got {priority!r}")
    return priority


def check_client(client: Hashable) -> Hashable:
    """Raises:
    RequestError: nothing that could be looked up, such as a list.
    """
    try:
        hash(client)
    except TypeError as error:
        raise RequestError(f"client must be hashable, such as a name, got {type(client).__name__}") from error
    return client


def importance(priority: str, number: int) -> tuple[int, int]:
    """A key to sort by: the most important first. Never equal for two sequences, so that of any two one yields."""
    return PRIORITIES.index(priority), number


def plan_rows(wants: Iterable[Want], budget: int) -> dict[int, int]:
    """How many rows each sequence gets, by its number; none are left out that get none. budget: work of prompts."""
    wants = list(wants)
    rows = {want.number: want.rows for want in wants if want.is_reply}
    for priority in PRIORITIES:
        prompts = [want for want in wants if not want.is_reply and want.priority == priority]
        given = _share_prompts(prompts, budget)
        budget -= ceil(sum(given[want.number] * want.row_work for want in prompts if want.number in given))
        rows |= given
    return rows


def _share_prompts(prompts: list[Want], budget: int) -> dict[int, int]:
    if not prompts or budget <= 0:
        return {}
    prompts.sort(key=lambda want: (-want.passed if want.is_due else 0, want.rows, want.number))
    given = _fair_parts(prompts, budget) if prompts[0].is_due else _first_come(prompts, budget)
    return {number: rows for number, rows in given.items() if rows}


def _fair_parts(prompts: Sequence[Want], budget: int) -> dict[int, int]:
    """The same for each client, and for each prompt of a client."""
    by_client: dict[Hashable, list[Want]] = {}
    for want in prompts:
        client = ("alone", want.number) if want.client is None else ("client", want.client)
        by_client.setdefault(client, []).append(want)
    wanted = {client: sum(want.work for want in theirs) for client, theirs in by_client.items()}
    parts: dict[int, int] = {}
    for client, amount in share_fairly(wanted, budget, list(by_client)).items():
        wanted_each = {want.number: want.work for want in by_client[client]}
        parts |= share_fairly(wanted_each, amount, list(wanted_each))
    return _first_come(prompts, budget, parts)


def _first_come(prompts: Sequence[Want], budget: int, parts: Mapping[int, int] | None = None) -> dict[int, int]:
    """In this order, each as many rows as it can take, or as its part of the work is for."""
    given = {}
    for want in prompts:
        given[want.number] = want.rows_for(budget if parts is None else min(parts[want.number], budget))
        budget -= ceil(given[want.number] * want.row_work)
    return given


def share_fairly(wanted: Mapping[Key, int], budget: int, order: Sequence[Key]) -> dict[Key, int]:
    """Equal parts of the budget; what one does not need goes to the others, single rows first to those early in
    `order`."""
    given = dict.fromkeys(order, 0)
    open_ = [key for key in order if wanted[key]]
    while open_ and budget > 0:
        part = max(1, budget // len(open_))
        for key in open_:
            rows = min(part, wanted[key] - given[key], budget)
            given[key] += rows
            budget -= rows
        open_ = [key for key in open_ if given[key] < wanted[key]]
    return given


def find_leaders(readers: Sequence[Reader]) -> dict[int, int]:
    """For readers that had better wait: whose pages they wait for, by numbers.

    A reader waits for one that is ahead of it, at least as important, and computing a page that it needs too. Who is
    ahead is an order of all readers, so nobody waits in a circle.
    """
    ahead = sorted(readers, key=lambda reader: (-reader.done, importance(reader.priority, reader.number)))
    found = {}
    for place, reader in enumerate(ahead):
        for other in ahead[:place]:
            if other.origin != reader.origin or PRIORITIES.index(other.priority) > PRIORITIES.index(reader.priority):
                continue
            if other.done < shared_length(reader.token_ids, other.token_ids):
                found[reader.number] = other.number
                break
    return found


def shared_length(token_ids: Sequence[int], others: Sequence[int]) -> int:
    """Tokens in the full pages that a sequence can take from another. Its own last token is always computed."""
    limit = min(len(token_ids) - 1, len(others)) // PAGE_ROWS * PAGE_ROWS
    for start in range(0, limit, PAGE_ROWS):
        if token_ids[start : start + PAGE_ROWS] != others[start : start + PAGE_ROWS]:
            return start
    return limit
