"""Codes in words: the order of the bits, planes, and unpacking as the inverse of packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptq_writer
from gptq_writer import pack_columns, pack_rows
from ropewalk.gptq.bits import unpack_columns, unpack_rows


# Codes v[i] = (5 i + 3) mod 2^bits for i = 0..31; the words are computed by hand in the format sheet, B.1.
@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, "93939393 93939393"),
        (3, "43c67543 7543c675 c67543c6"),
        (4, "61c72d83 e94fa50b 61c72d83 e94fa50b"),
        (8, "120d0803 26211c17 3a35302b 4e49443f 625d5853 76716c67 8a85807b 9e99948f"),
    ],
)
def test_the_bit_order_is_that_of_the_format(bits, words):
    packed = np.array([int(word, 16) for word in words.split()], dtype=np.uint32).view(np.int32)
    expected = (5 * torch.arange(32) + 3) % 2**bits
    assert torch.equal(unpack_rows(torch.from_numpy(packed)[:, None], bits, planar=False)[:, 0].long(), expected)
    assert torch.equal(unpack_columns(torch.from_numpy(packed)[None], bits, planar=False)[0].long(), expected)


def test_planes_lie_low_plane_first():
    """6 bits: words 0-3 hold the low four bits of eight codes each, words 4-5 the high two bits of sixteen each."""
    words = torch.zeros(6, 1, dtype=torch.int32)
    words[1] = 0xA << 4  # code 9, low bits 1010
    words[4] = 0b11 << 18  # code 9, high bits 11
    codes = unpack_rows(words, 6, planar=True)[:, 0]
    assert codes[9] == 0b111010
    assert codes.count_nonzero() == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_unpacking_inverts_packing(data):
    bits, planar = data.draw(st.sampled_from([(b, False) for b in (2, 3, 4, 8)] + [(b, True) for b in (3, 5, 6, 7)]))
    rows, columns = 32 * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    codes = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, 2**bits, (rows, columns))
    expected = torch.from_numpy(codes).to(torch.uint8)
    assert torch.equal(unpack_rows(torch.from_numpy(pack_rows(codes, bits, planar)), bits, planar), expected)
    assert torch.equal(unpack_columns(torch.from_numpy(pack_columns(codes.T, bits, planar)), bits, planar), expected.T)


def test_the_writer_packs_planes_as_documented():
    """The planar writer and reader share no code, but one sheet; this pins the writer to its words."""
    codes = np.zeros((32, 1), np.int64)
    codes[16] = 0b1100101
    words = gptq_writer.pack_rows(codes, 7, planar=True)[:, 0].tolist()
    assert words == [0, 0, 0b0101, 0, 0, 0b10, 1 << 16]
