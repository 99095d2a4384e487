"""Amounts of memory: what the machine says and how it is written."""

from __future__ import annotations

import pytest

from ropewalk.base import memory
from ropewalk.base.memory import FreedMemory, available_bytes, format_bytes, parse_bytes, physical_bytes


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


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("1.5 gib", 3 << 29), ("512M", 512 << 20), ("4GB", 4 * 10**9), (" 100 ", 100), ("2k", 2048)],
)
def test_an_amount_of_memory_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "4 gigs", "GiB", "1e9", "0.1", "nan"])
def test_what_is_not_an_amount_of_memory_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="an amount of memory is needed, such as 4GiB or 512MiB, got "):
        parse_bytes(text)


def test_freed_memory_is_returned_now_and_then(monkeypatch) -> None:
    returned: list[None] = []
    monkeypatch.setattr(memory, "return_freed_memory", lambda: returned.append(None))
    seldom, often = FreedMemory(), FreedMemory(every_s=0.0)
    assert [seldom.return_if_due(), often.return_if_due(), often.return_if_due()] == [False, True, True]
    assert len(returned) == 2
