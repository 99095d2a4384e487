"""Zero points: from what the writers stored to the true values, 0 to 2^bits - 1.

v2 files (`gptq_v2`, planar) store the zero point, v1 files one less, in three dialects (docs/formats.md, "Zero
points"):

    GPTQModel, 2/4/8 bits   one subtraction of 0x..11 on the whole word, so a zero point 0 borrows from its neighbour:
                            the same constant is added back to the word before unpacking
    everyone else           per field: (stored + 1) mod 2^bits. Engines that do not mask read 2^bits for a stored
                            2^bits - 1, which no quantiser can have meant
    AutoGPTQ with a 0       ORs an unmasked 0xFFFFFFFF into the word: the later zero points of that word are lost

A symmetric file holds 2^(bits-1) throughout. If all of it matches the pattern of the other version, the label is wrong
(unlabelled v2 files of September 2023, several forks), and the data is believed.
The first files (10 March 2023) have float `zeros` = zero point * scale instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from ropewalk.base.errors import CheckpointError
from ropewalk.config.quantisation import QuantSettings
from ropewalk.gptq.bits import block_codes, block_words, unpack_columns

Warn = Callable[[str, str], None]  # kind of the quirk, message


def is_planar(settings: QuantSettings) -> bool:
    """True if codes are stored as bit planes: always with 5, 6 and 7 bits, with 3 only in `gptq_p`."""
    return settings.bits in (5, 6, 7) or (settings.bits == 3 and settings.format == "gptq_p")


def read_packed_zeros(qzeros: torch.Tensor, settings: QuantSettings, name: str, warn: Warn) -> torch.Tensor:
    """qzeros [G, N*bits/32] int32 -> zero points [G, N] uint8. `name` of the tensor, for the warnings."""
    bits = settings.bits
    planar = is_planar(settings)
    plain = planar or settings.format in ("gptq_v2", "gptq_p")  # stored as they are
    if not planar:
        symmetric = _symmetric_zeros(qzeros, bits, plain, name, warn)
        if symmetric is not None:
            return symmetric
    if plain:
        return unpack_columns(qzeros, bits, planar)
    if settings.word_borrow and bits in (2, 4, 8):
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = (qzeros.to(torch.int64) + ones) & 0xFFFFFFFF
        return unpack_columns(words, bits, planar=False)
    if bool((qzeros == -1).any()):
        warn(
            "lost zero points",
            f"{name} holds words of all ones: AutoGPTQ writes them where an asymmetric zero point is 0, losing those "
            "next to it; they are read as 0. Quantise again with GPTQModel, or with sym=true",
        )
    return (unpack_columns(qzeros, bits, planar=False) + 1) & ((1 << bits) - 1)


def _symmetric_zeros(qzeros: torch.Tensor, bits: int, plain: bool, name: str, warn: Warn) -> torch.Tensor | None:
    """The constant zero points if every word has the symmetric pattern of v1 or of v2, else None."""
    middle = 1 << (bits - 1)
    for stored, pattern_is_v2 in ((middle - 1, False), (middle, True)):
        if bool((qzeros.unflatten(1, (-1, block_words(bits))) == _constant_block(stored, bits)).all()):
            if pattern_is_v2 != plain:
                says, holds = ("gptq_v2", "gptq (v1)") if plain else ("gptq (v1)", "gptq_v2")
                warn(
                    "mislabelled zero points",
                    f"{name}: the configuration says {says}, but all zero points are the symmetric pattern of {holds}: "
                    f"read as {holds}. Set checkpoint_format in the configuration to match",
                )
            return torch.full((qzeros.shape[0], qzeros.shape[1] * 32 // bits), middle, dtype=torch.uint8)
    return None


@lru_cache(maxsize=32)
def _constant_block(code: int, bits: int) -> torch.Tensor:
    """The words (as int32) of a block of equal codes; not to be changed."""
    stream = sum(code << (i * bits) for i in range(block_codes(bits)))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(block_words(bits))]
    return torch.tensor([word - (1 << 32) if word >> 31 else word for word in words], dtype=torch.int32)


def read_premultiplied_zeros(zeros: torch.Tensor, scales: torch.Tensor, bits: int, name: str) -> torch.Tensor:
    """The first files: zeros [N, 1] = zero point * scale, scales [N, 1] -> zero points [1, N] uint8.

    Raises:
        CheckpointError: a quotient is not an integer from 0 to 2^bits - 1, beyond what rounding explains.
    """
    quotient = torch.where(scales == 0, 0.0, zeros.double() / scales.double())
    points = quotient.round()
    # Numerator and denominator are each rounded to the storage type.
    tolerance = 1e-3 + 2 * torch.finfo(zeros.dtype).eps * points.abs()
    wrong = ~((quotient - points).abs() <= tolerance) | (points < 0) | (points >= 1 << bits)
    if bool(wrong.any()):
        column = int(wrong.flatten().nonzero()[0])
        raise CheckpointError(
            f"{name}: {int(wrong.sum())} values are not a zero point times the scale (column {column}: quotient "
            f"{float(quotient.flatten()[column]):.4g}; integers from 0 to {(1 << bits) - 1} are accepted): "
            "quantise the model again with a current tool"
        )
    return points.to(torch.uint8).T.contiguous()
