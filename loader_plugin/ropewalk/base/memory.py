"""How much memory this machine has, and how an amount of it is written."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from pathlib import Path

RETURNED_EVERY_S = 20.0


def physical_bytes() -> int | None:
    """Memory of this machine, or of the container if that is less; None if the system does not say."""
    limits = [limit for limit in (_machine_bytes(), _container_bytes()) if limit is not None]
    return min(limits, default=None)


def available_bytes() -> int | None:
    """Memory that new allocations can use without swapping, as Linux estimates it; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


SIZE_UNITS = {
    **{unit: 1024**power for power, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB"))},
    **{unit: 1024**power for power, unit in enumerate("KMGT", 1)},
    **{unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))},
}


def parse_bytes(text: str) -> int:
    """ "1.5 GiB", or "1.5G" for short -> 1610612736; "4GB" -> 4000000000; a number alone is bytes.

    Raises:
        ValueError: not an amount of memory, or not a positive one; says what is accepted.
    """
    units = {unit.lower(): size for unit, size in SIZE_UNITS.items()}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    amount = 0 if found is None or found[2] not in units else int(float(found[1]) * units[found[2]])
    if amount < 1:
        raise ValueError(f"an amount of memory is needed, such as 4GiB or 512MiB, got {text[:60]!r}")
    return amount


def format_bytes(num_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"


def _machine_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows, or a name it does not know
        return None


def _container_bytes() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdigit():
            return int(text)
    return None


def return_freed_memory() -> None:
    """Hand freed memory back to the system: after a model of 77 MB was dropped, glibc kept 60 MB of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


class FreedMemory:
    """Hands freed memory back now and then, in programs that run for long.

    glibc gives threads heaps of their own and keeps what is freed in each: with 32 threads that took turns at computing
    steps, a server of a 1.1B model grew by some 200 MB in ten minutes.
    """

    def __init__(self, every_s: float = RETURNED_EVERY_S) -> None:
        self._every_s = every_s
        self._returned_s = time.monotonic()

    def return_if_due(self) -> bool:
        """Return it if the last time was long enough ago. Takes some milliseconds then."""
        now = time.monotonic()
        if now - self._returned_s < self._every_s:
            return False
        self._returned_s = now
        return_freed_memory()
        return True
