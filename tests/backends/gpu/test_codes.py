"""Codes in words: each bit where codes.py draws it, every row once in a piece of its own group, little padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_support import plain_form
from kernel_support import gptq_case
from ropewalk.backends.gpu.codes import BLOCK_ROWS, PIECES, held_bits, pack_words, uniform_rows


def bit(words: torch.Tensor, position: int) -> torch.Tensor:
    return (words.long() >> position) & 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_bit_of_a_code_is_where_it_is_drawn(bits: int) -> None:
    block, num_blocks, num_columns = BLOCK_ROWS[bits], 2, 3
    codes = torch.from_numpy(np.random.default_rng(bits).integers(0, 1 << bits, (num_blocks * block, num_columns)))
    words, high = pack_words(codes.to(torch.uint8), bits)
    assert words.shape == (num_blocks, num_columns, 16) and words.dtype == torch.int32 and words.is_contiguous()
    assert (high is None) == (bits != 3)
    in_word = min(bits, 2) if bits == 3 else bits
    for row in range(num_blocks * block):
        number, (sub, inside) = row // block, divmod(row % block, 32)
        r, odd = divmod(inside, 2)
        found = sum(bit(words[number, :, r], in_word * sub + 16 * odd + i) << i for i in range(in_word))
        if high is not None:
            found += bit(high[number, :, r], 2 * sub + odd) << 2
        assert torch.equal(found, codes[row]), row


def test_5_6_and_7_bits_are_held_in_8() -> None:
    assert {bits: held_bits(bits) for bits in range(2, 9)} == {2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


GROUPS = {
    "of 128": (256, 128, False, 256, 128),
    "of 32": (256, 32, False, 256, 32),
    "of 512": (1024, 512, False, 1024, 512),
    "of 1536": (3072, 1536, False, 3072, 512),  # 1024 would need padding
    "one": (320, 320, True, 384, 384),
    "of 96": (384, 96, True, 384, 32),
    "of 96, where larger pieces fill the block as well": (192, 96, True, 256, 128),
    "of 16": (64, 16, False, 128, 32),
    "with a shorter last one": (160, 128, False, 256, 128),
    "uneven": (256, [40, 1, 0, 215], True, 384, 64),
    "very uneven": (2048, [2020, 7, 7, 7, 7], True, 2176, 32),
    "all rows in one of three": (64, [0, 64, 0], True, 128, 128),
}


@pytest.mark.parametrize("name", GROUPS)
def test_every_row_is_once_in_a_piece_of_its_group(name: str) -> None:
    in_features, sizes, act_order, width, piece = GROUPS[name]
    linear = plain_form(gptq_case(in_features, 4, sizes, act_order=act_order))
    rows = uniform_rows(linear)
    assert (rows.width, rows.piece) == (width, piece)
    assert rows.groups.shape == (width // piece,)
    there = rows.source >= 0
    assert torch.equal(rows.source[there].sort().values, torch.arange(in_features))
    groups = rows.groups.repeat_interleave(piece)
    assert torch.equal(groups[there], linear.group_index()[rows.source[there]])
    sorted_rows = torch.arange(in_features) if linear.order is None else linear.order.long()
    assert torch.equal(rows.source[there], sorted_rows)  # the order of the sums is that of the sorted rows


def test_rows_are_plain_if_only_padding_behind_them_is_added() -> None:
    assert uniform_rows(plain_form(gptq_case(160, 4, 32))).is_plain
    assert not uniform_rows(plain_form(gptq_case(160, 4, 40))).is_plain  # padding within
    assert not uniform_rows(plain_form(gptq_case(160, 4, 32, act_order=True))).is_plain


def test_no_group_needs_more_than_31_rows_of_padding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(0, 300, 6).tolist()
        in_features = sum(sizes)
        rows = uniform_rows(plain_form(gptq_case(in_features, 1, sizes, act_order=True)))
        least = sum(-(-size // PIECES[0]) * PIECES[0] for size in sizes)
        assert rows.width < least + BLOCK_ROWS[4]
