"""Unpacking GPTQ codes: where the bits of code i are in the 32-bit words of its block.

Continuous layout (2, 3, 4, 8 bits): one little-endian bit stream, code i in bits [i*b, i*b + b). 3 bits, 32 codes in
3 words; codes 10 and 21 straddle two words:

    word 0: c0 c1 ... c9 c10(low 2)   word 1: c10(high) c11 ... c20 c21(low)   word 2: c21(high 2) c22 ... c31

Planar layout (`gptq_p`; 3, 5, 6, 7 bits): each block of 32 codes is b words, the low plane first; a plane of width w
holds w bits of every code, 32/w codes to a word:

    5 bits: words 0-3: low 4 bits of c0..c7, c8..c15, c16..c23, c24..c31     word 4: bit 4 of c0..c31

qweight is packed down its rows (K), qzeros along its columns (N). Sources: AutoGPTQ's packing loops and GPTQModel's
page on its planar format. docs/formats.md ("Bit order", "Planar codes") has more pictures, and test vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# (width, lowest bit in the code) of each plane, in storage order.
PLANES = {
    3: ((2, 0), (1, 2)),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)),
}
CONTINUOUS_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Field:
    """`width` bits of a code, from its bit `low` on; bits [shift, shift + width) of word `word` of the block."""

    word: int
    shift: int
    width: int
    low: int


def block_words(bits: int) -> int:
    """Words of the smallest block that holds whole codes: one if the width divides 32, else one per bit."""
    return 1 if 32 % bits == 0 else bits


def block_codes(bits: int) -> int:
    """Codes in such a block."""
    return 32 * block_words(bits) // bits


def code_fields(bits: int, planar: bool) -> list[tuple[Field, ...]]:
    """For each code of a block, the fields that make it up."""
    if planar:
        return list(zip(*_plane_fields(bits), strict=True))
    codes = []
    for i in range(block_codes(bits)):
        word, shift = divmod(i * bits, 32)
        width = min(bits, 32 - shift)
        straddling = (Field(word + 1, 0, bits - width, width),) if width < bits else ()
        codes.append((Field(word, shift, width, 0), *straddling))
    return codes


def _plane_fields(bits: int) -> list[list[Field]]:
    planes, first_word = [], 0
    for width, low in PLANES[bits]:
        per_word = 32 // width
        planes.append([Field(first_word + i // per_word, width * (i % per_word), width, low) for i in range(32)])
        first_word += width
    return planes


def unpack_rows(words: torch.Tensor, bits: int, planar: bool) -> torch.Tensor:
    """The codes of words packed down their rows.

    words: [K*bits/32, N] int32 (or int64 holding the unsigned words).
    Returns: [K, N] uint8, contiguous.
    """
    blocks = words.unflatten(0, (-1, block_words(bits)))  # [K/codes, words, N]
    shape = (blocks.shape[0], block_codes(bits), words.shape[1])
    out = torch.empty(shape, dtype=torch.uint8, device=words.device)  # [K/codes, codes, N]
    for i, fields in enumerate(code_fields(bits, planar)):
        # The mask removes the sign bits that an arithmetic shift brings in.
        parts = [((blocks[:, f.word] >> f.shift) & ((1 << f.width) - 1)) << f.low for f in fields]
        out[:, i] = parts[0] if len(parts) == 1 else sum(parts)
    return out.flatten(0, 1)  # [K, N]


def unpack_columns(words: torch.Tensor, bits: int, planar: bool) -> torch.Tensor:
    """The codes of words packed along their columns: [G, N*bits/32] -> [G, N] uint8, contiguous."""
    return unpack_rows(words.T, bits, planar).T.contiguous()
