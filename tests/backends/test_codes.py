"""Codes of keys and values in plain torch: what other backends are compared with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.backends.protocol import RowSpan
from ropewalk.backends.reference.backend import ReferenceBackend
from ropewalk.backends.reference.codes import decode, encode, hadamard, pack, unpack
from ropewalk.backends.reference.pages import append_, as_seen, gathered
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import CODE_BITS, CacheFormat

BACKEND = ReferenceBackend("exact")
BITS = tuple(CODE_BITS.values())


def sylvester(size: int) -> np.ndarray:
    """H of twice the size is [[H, H], [H, -H]]."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [32, 64, 80, 16, 7])
def test_a_number_is_found_again_within_half_a_step(bits: int, size: int) -> None:
    x = rows(5, size) * torch.tensor([1.0, 1e-3, 1e4, 3.0, 0.0])[:, None]
    codes, scales = encode(x, bits)
    found = decode(codes, scales, bits, size)
    step = scales.float().repeat_interleave(32, dim=1)[:, :size]
    assert (found - x).abs().le(0.5 * step * 1.02 + 1e-9).all()  # a scale is rounded to float16, too
    assert codes.max() <= 2**bits - 1 and torch.equal(found[4], torch.zeros(size))


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_number_of_a_block_has_the_first_or_last_code(bits: int) -> None:
    x = rows(100, 32)
    codes, _ = encode(x, bits)
    largest = x.abs().argmax(1, keepdim=True)
    expected = torch.where(x.gather(1, largest) > 0, 2**bits - 1, 0)
    assert torch.equal(codes.gather(1, largest), expected.to(torch.uint8))


@given(st.sampled_from(BITS), st.integers(1, 4), st.randoms(use_true_random=False))
def test_packed_codes_are_found_again(bits: int, blocks: int, random) -> None:
    codes = torch.tensor([[random.randrange(2**bits) for _ in range(32 * blocks)] for _ in range(3)], dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 4 * blocks * bits) and torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("size, matrix", [(64, 64), (128, 128), (80, 16), (96, 32), (7, 1)])
def test_a_head_is_turned_by_sylvesters_matrix_and_back(size: int, matrix: int) -> None:
    x = rows(4, size)
    whole = np.kron(np.eye(size // matrix), sylvester(matrix)) / np.sqrt(matrix)
    assert torch.allclose(hadamard(x), torch.from_numpy(x.double().numpy() @ whole).float(), atol=1e-5)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)


def test_what_is_not_finite_stays_in_its_block() -> None:
    x = rows(2, 64)
    x[0, 3], x[1, 40] = float("inf"), float("nan")
    found = decode(*encode(x, 4), 4, 64)
    assert not found[0, :32].isfinite().any() and not found[1, 32:].isfinite().any()
    assert found[0, 32:].isfinite().all() and found[1, :32].isfinite().all()


def pages_of(text: str, num_pages: int, recent: bool = False) -> tuple:
    pool = BACKEND.new_pool(2, 48, CacheFormat.parse(text), 1 << 30)
    pages = tuple(pool.take(2, recent) for _ in range(num_pages))
    for page in pages:
        page.memory.fill_(255)
    return pages


@pytest.mark.parametrize(
    "text, error", [("q8", 0.008), ("q6", 0.03), ("q4", 0.12), ("q8_q4", 0.12), ("fp16_q8", 0.008)]
)
def test_pages_hold_what_is_near_to_what_was_appended(text: str, error: float) -> None:
    k, v, pages = rows(150, 2, 48), rows(150, 2, 48, seed=2), pages_of(text, 3)
    for low, high in ((0, 70), (70, 71), (71, 150)):
        append_(pages, 1, k[low:high], v[low:high], low)
    keys, values = gathered(pages, 1, 150)
    assert 0 < (values - v.transpose(0, 1)).square().mean().sqrt() < error
    assert (keys - k.transpose(0, 1)).square().mean().sqrt() < error


@pytest.mark.parametrize("text", ["fp16", "q8", "q4", "q6_q4"])
def test_a_page_takes_what_the_format_says_and_its_bytes_restore_it(text: str) -> None:
    pool = BACKEND.new_pool(2, 48, CacheFormat.parse(text), 1 << 30)
    page, other = pool.take(3), pool.take(3)
    assert pool.page_bytes(3) == 64 * 3 * pool.cache_format.position_bytes(2, 48) == page.memory.numel()
    append_([page], 1, rows(20, 2, 48), rows(20, 2, 48, seed=2), 5)
    other.memory.fill_(255)
    for part, saved in zip(pool.parts_of(other), [part.clone() for part in pool.parts_of(page)], strict=True):
        part.copy_(saved)
    assert torch.equal(gathered([other], 1, 25)[0][:, 5:], gathered([page], 1, 25)[0][:, 5:])
    copy = pool.copy(page)
    assert torch.equal(copy.memory, page.memory) and pool.used_bytes == 3 * pool.page_bytes(3)


def test_each_row_reads_its_own_last_pages_in_float16() -> None:
    codes, recent = pages_of("q4+64", 5), pages_of("q4+64", 5, recent=True)
    span = RowSpan(200, 60, codes, (None, *recent[1:]))
    with pytest.raises(ShapeError, match="position 60 reads pages from 0 on in float16, not given"):
        list(as_seen(span))
    span = RowSpan(200, 60, codes, recent)
    for rows_, pages in as_seen(span):
        for position in (60 + rows_.start, 60 + rows_.stop - 1):
            exact = max(0, position + 1 - 64) // 64
            assert pages[: position // 64 + 1] == (*codes[:exact], *recent[exact : position // 64 + 1])


@pytest.mark.parametrize("text", ["fp32", "fp16", "q8", "q4", "q8_q4"])
@pytest.mark.parametrize("num, shift", [(100, 0), (100, 37), (64, 64)])
def test_moved_keys_are_turned_and_values_stay_as_they_are(text: str, num: int, shift: int) -> None:
    k, v, pages = rows(192, 2, 48), rows(192, 2, 48, seed=2), pages_of(text, 3)
    for instance in (0, 1):
        append_(pages, instance, k, v, 0)
    before = [part.clone() for part in gathered(pages, 1, 192)]
    angles = rows(num, 20, seed=3)
    BACKEND.move_rows_(pages, 70, pages, 70 - shift, num, angles.cos()[None], angles.sin()[None], [0, 0])
    keys, values = gathered(pages, 1, 192)
    assert torch.equal(values[:, 70 - shift : 70 - shift + num], before[1][:, 70 : 70 + num])
    first, second = before[0][:, 70 : 70 + num, :20], before[0][:, 70 : 70 + num, 20:40]
    turned = torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)
    error = {"fp32": 1e-5, "fp16": 2e-3, "q8": 0.03, "q8_q4": 0.03, "q4": 0.6}[text]
    assert (keys[:, 70 - shift : 70 - shift + num, :40] - turned).abs().max() < error
    assert torch.equal(keys[:, : 70 - shift], before[0][:, : 70 - shift])


def test_moving_refuses_what_does_not_fit() -> None:
    pages, table = pages_of("q8", 2), torch.ones(1, 10, 4)
    for arguments, message in (
        ((pages, 120, pages, 0, 10, table, table), "source: positions 120 to 130 lie outside its 2 pages"),
        ((pages, 0, pages[:1], 60, 10, table, table), "target: positions 60 to 70 lie outside its 1 pages"),
        ((pages, 0, pages, 0, 9, table, table), "tables .* do not fit 9 rows"),
        ((pages, 0, pages, 0, 10, table, table[..., :3]), "tables .* do not fit 10 rows"),
    ):
        with pytest.raises(ShapeError, match=message):
            BACKEND.move_rows_(*arguments, [0, 0])
