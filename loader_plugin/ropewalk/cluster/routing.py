"""Which replica gets a request: where its prompt is known, unless others wait there. No Ray in here.

A replica keeps the pages of what it has read. What each is likely to have is remembered here as blocks of `prefixes`:
those of the requests that were sent to it, the ones used least recently forgotten first, as the replica does with its
pages. Nobody asks the replicas, so this may be wrong, which costs time and never changes a reply.

The cost of a replica is about the time to the first token there, counted in blocks:

    cost = blocks of the prompt that it has to read + BLOCKS_PER_REPLY * replies that run or wait there

and the lowest cost wins, among those with at most `most_ahead` replies more than the least busy one.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from ropewalk.cluster.prefixes import Chain

# A reply that runs takes rows of every step, so that a prompt is read more slowly beside it: as if it had this many
# blocks more. A guess that balances well enough on the trace of scripts/bench/cluster.py; not tuned.
BLOCKS_PER_REPLY = 8
MOST_AHEAD = 4
MOST_REMEMBERED = 65_536  # blocks of one replica: 8 MB of text, some 2 million tokens

R = TypeVar("R", bound=Hashable)


class Routing(Protocol[R]):
    """Orders replicas for a request, and is told what became of it. R: how a replica is called."""

    def order(self, chain: Chain, loads: Mapping[R, int], avoid: Iterable[R] = ()) -> list[R]: ...
    def sent_(self, replica: R, chain: Chain) -> None: ...
    def keep_only_(self, replicas: Iterable[R]) -> None: ...


class KnownPrefixes:
    """The blocks that one replica is likely to have. most: how many are remembered."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._most = most
        self._blocks: OrderedDict[int, None] = OrderedDict()  # the one used least recently first

    def __len__(self) -> int:
        return len(self._blocks)

    def num_known(self, chain: Chain) -> int:
        """With how many blocks of `chain`, from its first on, the replica can begin."""
        for number, block in enumerate(chain):
            if block not in self._blocks:
                return number
        return len(chain)

    def remember_(self, chain: Chain) -> None:
        """The replica reads this prompt. Its end is forgotten before its beginning, without which it is of no use."""
        for block in reversed(chain):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)


class PrefixRouting(Generic[R]):
    """Remembers which replica has read what, and prefers those that have read most of a prompt."""

    def __init__(
        self,
        most_ahead: int = MOST_AHEAD,
        most_remembered: int = MOST_REMEMBERED,
        blocks_per_reply: int = BLOCKS_PER_REPLY,
    ) -> None:
        self._most_ahead = most_ahead
        self._most_remembered = most_remembered
        self._blocks_per_reply = blocks_per_reply
        self._known: dict[R, KnownPrefixes] = {}

    def order(self, chain: Chain, loads: Mapping[R, int], avoid: Iterable[R] = ()) -> list[R]:
        """The replicas of `loads`, the best for this prompt first.

        loads: how many replies run or wait at each. avoid: those that are taken only if there are no others.
        """
        if not loads:
            return []
        least, avoided = min(loads.values()), set(avoid)

        def rank(replica: R) -> tuple[bool, bool, int, int]:
            known = self._known.get(replica)
            num_known = 0 if known is None else known.num_known(chain)
            cost = len(chain) - num_known + self._blocks_per_reply * loads[replica]
            # Among equals, the one that has the most memory left to remember something new.
            return replica in avoided, loads[replica] - least > self._most_ahead, cost, len(known or ())

        return sorted(loads, key=rank)

    def sent_(self, replica: R, chain: Chain) -> None:
        """The replica was given a request with this prompt."""
        self._known.setdefault(replica, KnownPrefixes(self._most_remembered)).remember_(chain)

    def keep_only_(self, replicas: Iterable[R]) -> None:
        """These are the replicas that there are: what the others knew is gone."""
        there = set(replicas)
        self._known = {replica: known for replica, known in self._known.items() if replica in there}


class TwoChoices(Generic[R]):
    """Looks at load alone: the less busy of two that are picked at random, which balances nearly as well as asking all.

    (Mitzenmacher 2001, "The power of two choices in randomized load balancing"; Ray's own router does so too.)
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def order(self, chain: Chain, loads: Mapping[R, int], avoid: Iterable[R] = ()) -> list[R]:
        """Two at random, the less busy first, before the others."""
        avoided = set(avoid)
        mixed = self._random.sample(list(loads), len(loads))
        mixed.sort(key=avoided.__contains__)
        return sorted(mixed[:2], key=lambda replica: (replica in avoided, loads[replica])) + mixed[2:]

    def sent_(self, replica: R, chain: Chain) -> None:
        """Nothing is remembered."""

    def keep_only_(self, replicas: Iterable[R]) -> None:
        """Nothing is remembered."""
