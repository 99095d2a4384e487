"""Which rank runs a layer instance: in the order in which they run, so many for each rank.

An order that is set later may be shorter than the one that the shares were made for, or longer: then the last ranks run
fewer instances, or the last one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Shares:
    """firsts: the first layer instance of each rank, ascending from 0; rank 0 may run none."""

    firsts: tuple[int, ...]

    @classmethod
    def of_counts(cls, counts: Sequence[int]) -> Shares:
        """So many instances for each rank."""
        return cls(tuple(accumulate(counts[:-1], initial=0)))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.firsts)

    def rank_of(self, instance: int) -> int:
        """The rank that runs an instance."""
        return max(rank for rank, first in enumerate(self.firsts) if first <= instance)

    def counts(self, num_instances: int) -> list[int]:
        """How many of the instances of an order each rank runs."""
        ends = (*(min(first, num_instances) for first in self.firsts), num_instances)
        return [end - first for first, end in pairwise(ends)]

    def ranks_of(self, weights_index: int, weights_indices: Sequence[int]) -> tuple[int, ...]:
        """The ranks that run a layer; one that runs nowhere is kept by the last.

        weights_indices: which layer each instance runs.
        """
        pairs = enumerate(weights_indices)
        found = sorted({self.rank_of(instance) for instance, index in pairs if index == weights_index})
        return tuple(found) or (self.size - 1,)
