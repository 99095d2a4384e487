"""Running out of memory on a card, as a sentence with numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ropewalk.base.memory import format_bytes


@contextmanager
def told_in_numbers(device: torch.device, doing: str, kind: type[Exception], remedy: str) -> Iterator[None]:
    """An allocation that fails in the block becomes an error of that kind, which says what is in use and what to do.

    doing: such as "computing 2048 rows".
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise kind(f"{device} has too little memory for {doing}: {_usage(device)}; {remedy}") from error


def _usage(device: torch.device) -> str:
    """ "1.2 GiB of 24.0 GiB are free, this program holds 20.5 GiB"."""
    if device.type != "cuda":
        return "how much is free is not known"
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    return f"{format_bytes(free)} of {format_bytes(total)} are free, and this program holds {format_bytes(held)}"
