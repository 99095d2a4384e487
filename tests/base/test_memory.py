"""Amounts of memory: what the machine says and how it is written."""

from __future__ import annotations

import pytest

from ropewalk.base.memory import available_bytes, format_bytes, physical_bytes


@pytest.mark.parametrize(
    "num_bytes, text",
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (9 << 50, "9216.0 TiB"),
    ],
)
def test_bytes_are_written_in_the_largest_unit_below_them(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_the_machine_has_memory() -> None:
    total, free = physical_bytes(), available_bytes()
    if total is None or free is None:
        pytest.skip("this system does not tell its memory")
    assert free > (1 << 26) and total > (1 << 26)
