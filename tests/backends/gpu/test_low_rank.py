"""Low-rank changes: float32 arithmetic, parts of any rank, the same bits for any rows, only the rows asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from accuracy import assert_as_accurate
from gpu_support import DEVICE, normal, same_bits
from ropewalk.backends.gpu import tiles
from ropewalk.backends.gpu.low_rank import GpuLowRank, add_, pack
from ropewalk.backends.protocol import LowRankPart
from ropewalk.base.errors import ShapeError
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around, teach_tf32

SHAPES = [(1, 64, [16], [1]), (3, 80, [40, 7, 16], [5, 0, 17]), (21, 96, [67, 130], [16, 64]), (6, 33, [5], [3])]


def made(in_features: int, widths: list[int], ranks: list[int]) -> list[LowRankPart]:
    """A and B of each part, of the sizes that trained adapters have."""
    pairs = enumerate(zip(widths, ranks, strict=True))
    return [LowRankPart(0.05 * normal(r, in_features, seed=i), 0.01 * normal(n, r, seed=50 + i)) for i, (n, r) in pairs]


def added(parts: list[LowRankPart], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([(x.to(dtype) @ part.a.to(dtype).T) @ part.b.to(dtype).T for part in parts], dim=1)


def changed(y: torch.Tensor, x: torch.Tensor, change: GpuLowRank, first: int = 0, end: int | None = None):
    """A copy of y with the change of rows first..end, on the CPU."""
    out = y.clone().to(DEVICE)
    add_(out, x.to(DEVICE), change, first, x.shape[0] if end is None else end)
    return out.cpu()


@pytest.mark.parametrize("num_rows, in_features, widths, ranks", SHAPES)
def test_a_change_is_as_accurate_as_float32(num_rows, in_features, widths, ranks) -> None:
    parts, x = made(in_features, widths, ranks), normal(num_rows, in_features, seed=9)
    y = normal(num_rows, sum(widths), seed=8)
    found = changed(y, x, pack(parts, DEVICE))
    assert_as_accurate(found, y.double() + added(parts, x, torch.float64), y + added(parts, x, torch.float32))
    if 0 in ranks:
        unchanged = slice(widths[0], widths[0] + widths[1])
        assert same_bits(found[:, unchanged].contiguous(), y[:, unchanged].contiguous())


@interpreted_only
def test_no_digit_is_lost_to_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = teach_tf32(monkeypatch)
    changed(normal(2, 16), normal(2, 64), pack(made(64, [16], [4]), DEVICE))
    assert set(seen) == {"IEEE"}


def test_a_row_has_the_same_bits_whatever_is_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    change = pack(made(200, [40, 7, 131], [16, 3, 48]), DEVICE)
    assert change.splits > 1
    x, y = normal(40, 200, seed=3), normal(40, 178, seed=4)
    whole = changed(y, x, change)
    for num_rows in (1, 7, 17):
        rows = slice(40 - num_rows, 40)
        assert same_bits(changed(y[rows], x[rows], change), whole[rows]), num_rows
    monkeypatch.setattr(tiles, "SPLIT_ROWS", 0)
    assert same_bits(changed(y, x, change), whole)


def test_only_the_rows_asked_for_change() -> None:
    change = pack(made(64, [40], [8]), DEVICE)
    x, y = normal(9, 64, seed=3), normal(9, 40, seed=4)
    found, whole = changed(y, x, change, 2, 5), changed(y, x, change)
    assert same_bits(found[2:5], whole[2:5])
    assert same_bits(found[:2], y[:2]) and same_bits(found[5:], y[5:])
    assert same_bits(changed(y, x, change, 4, 4), y)


def test_nothing_beside_a_tensor_is_read_or_written() -> None:
    change = pack(made(70, [40, 7], [5, 17]), DEVICE)
    x, y = normal(5, 70, seed=3).to(DEVICE), normal(5, 47, seed=4)
    wanted = changed(y, x, change, 1, 4)
    fenced = dataclasses.replace(
        change,
        **{name: guarded(getattr(change, name).reshape(1, -1))[0].view_as(getattr(change, name)) for name in "ab"},
    )
    out = guarded(y.to(DEVICE))
    add_(out, guarded(x), fenced, 1, 4)
    assert same_bits(out.cpu().contiguous(), wanted)
    assert room_around(out).isnan().all()


@interpreted_only
def test_every_address_is_one_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    change = pack(made(70, [40, 70], [5, 17]), DEVICE)
    with inside_arguments(monkeypatch):
        add_(guarded(normal(17, 110)), guarded(normal(17, 70)), change, 0, 17)


def test_bytes_are_those_of_the_matrices_and_the_table() -> None:
    change = pack(made(64, [40, 7, 130], [16, 0, 4]), DEVICE)
    assert change.num_bytes == 4 * (20 * 64 + 177 * 16) + 4 * 4 * (1 + 3)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.zeros(2, 63), torch.zeros(2, 40), r"x must be \[T, 64\] float32 .* got \[2, 63\]"),
        (torch.zeros(2, 64), torch.zeros(2, 41), r"y must be \[T, 40\] float32 .* got \[2, 41\]"),
        (torch.zeros(2, 64), torch.zeros(3, 40), r"y must be \[T, 40\] float32 .* got \[3, 40\]"),
        (torch.zeros(2, 64).half(), torch.zeros(2, 40), r"x must be .* got \[2, 64\] torch.float16"),
        (torch.zeros(64, 2).T, torch.zeros(2, 40), r"x must be .* got \[2, 64\] .* strides \(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        add_(y, x, pack(made(64, [40], [8]), DEVICE), 0, 2)
