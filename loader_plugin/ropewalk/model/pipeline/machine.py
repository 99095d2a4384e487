"""A rank's place: its number among all ranks and among those of its machine, which share the machine's cores."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ropewalk.base.errors import ConfigError
from ropewalk.base.json import shown
from ropewalk.native.runtime import usable_processors


@dataclass(frozen=True, slots=True)
class Seat:
    """rank of `size`; local_rank of `local_size` on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_alone(self) -> bool:
        """Whether all ranks are on this machine."""
        return self.local_size == self.size


def threads_of(asked: int | None, seat: Seat) -> int:
    """Threads of a rank on a CPU: as asked for, or its part of the machine's cores."""
    return asked or max(1, usable_processors() // seat.local_size)


def torchrun_seat() -> Seat | None:
    """The seat that torchrun gives this process by its environment variables; None if it did not start it, or alone.

    Raises:
        ConfigError: some of the variables are there and others are missing or no numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    for name in names:
        if not os.environ.get(name, "").isdecimal():
            found = f"{shown(os.environ[name])}, no number" if name in os.environ else "missing"
            raise ConfigError(
                f"torchrun sets {', '.join(names)} and MASTER_ADDR and MASTER_PORT for each process, and here {name} "
                f"is {found}: start the processes with torchrun, or unset RANK"
            )
    return Seat(*(int(os.environ[name]) for name in names))
