"""AWQ as AutoAWQ's version "gemm" stores it (also gptqmodel and auto-round): always 4 bits.

    qweight [K, N/8] int32    qzeros [G, N/8] int32    scales [G, N]    bias [N]          G = K / group_size

Codes and zero points are packed along the outputs (N), in an order made for one kernel: the field in bits
[4 i, 4 i + 4) of word c belongs to output 8 c + ORDER[i].

    bit 31                                         0
       +-----+-----+-----+-----+-----+-----+-----+-----+
       | c7  | c5  | c3  | c1  | c6  | c4  | c2  | c0  |
       +-----+-----+-----+-----+-----+-----+-----+-----+

Zero points are stored as they are, groups are runs of consecutive inputs, and no g_idx exists. To GPTQ's words, which
hold eight inputs of one output, is a transposition of blocks of 8 by 8 fields.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import torch

from ropewalk.base.errors import CheckpointError
from ropewalk.config.settings import QuantSettings
from ropewalk.containers.container import Container, num_groups, part_problems
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import GptqLinear, read_bias, require_finite, sequential_groups
from ropewalk.gptq.shapes import FLOATS, infer_group_size

FORMAT = "awq"
BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CHUNK_WORDS = 1 << 17  # transposed at a time: what is read and written stays in a core's cache


def fields_in_order(words: torch.Tensor) -> torch.Tensor:
    """The fields of packed rows: [R, N/8] int32 -> [R, N] uint8, in the order of the outputs."""
    out = torch.empty((*words.shape, PER_WORD), dtype=torch.uint8)  # [R, N/8, 8]
    for field, column in enumerate(ORDER):
        out[..., column] = (words >> (BITS * field)) & 0xF
    return out.flatten(1)  # [R, N]


def to_gptq_words(words: torch.Tensor) -> torch.Tensor:
    """qweight of AWQ [K, N/8] int32 -> qweight of GPTQ [K/8, N] int32, with the same codes."""
    num_rows, num_words = words.shape
    out = torch.empty((num_rows // PER_WORD, num_words, PER_WORD), dtype=torch.int32)  # [K/8, N/8, 8]
    order = torch.tensor(ORDER)
    step = max(1, CHUNK_WORDS // max(1, PER_WORD * num_words))
    blocks = words.unflatten(0, (-1, PER_WORD))  # [K/8, 8 inputs, N/8]
    for first in range(0, len(blocks), step):
        turned = _transposed(blocks[first : first + step])  # [k, 8 fields, N/8]
        out[first : first + step, :, order] = turned.transpose(1, 2)
    return out.flatten(1)  # [K/8, N]


def _transposed(blocks: torch.Tensor) -> torch.Tensor:
    """[B, 8, W] int32: field i of word r becomes field r of word i. Halves change places, then quarters, fields."""
    rows = [blocks[:, row].clone() for row in range(PER_WORD)]
    for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        shift = BITS * distance
        for low in (row for row in range(PER_WORD) if not row & distance):
            high = low + distance
            # An arithmetic shift brings in sign bits, which the mask removes.
            moved = ((rows[low] >> shift) ^ rows[high]) & mask
            rows[high] ^= moved
            rows[low] ^= moved << shift
    return torch.stack(rows, 1)  # [B, 8, W]


def infer(checkpoint: Checkpoint, name: str, in_features: int, template: QuantSettings | None) -> QuantSettings:
    """Group size by the shape of the scales; everything else is as declared for the other modules.

    Raises:
        CheckpointError: the number of groups fits no group size.
    """
    scales = f"{name}.scales"
    shape = checkpoint.info(scales).shape if scales in checkpoint else ()
    size = infer_group_size(scales, in_features, shape[0] if shape else 0)
    base = template or QuantSettings(BITS, size, desc_act=False, sym=False, format=FORMAT, word_borrow=False)
    return replace(base, group_size=size)


def problems(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, settings: QuantSettings
) -> list[str]:
    """A line for each tensor of module `name` that is missing or has the wrong shape or dtype."""
    K, N = in_features, out_features
    if K % PER_WORD or N % PER_WORD:
        return [f"{name}: {K} inputs and {N} outputs cannot be stored as AWQ, only multiples of {PER_WORD}"]
    G = num_groups(K, settings.group_size)
    found = checkpoint.info(f"{name}.qweight").shape
    if found == (K // PER_WORD, N):
        return [
            f"{name}.qweight has shape {list(found)}: codes packed along the inputs, as GPTQ does, although the "
            "configuration says AWQ"
        ]
    expected = {
        "qweight": (("I32",), (K, N // PER_WORD)),
        "qzeros": (("I32",), (G, N // PER_WORD)),
        "scales": (FLOATS, (G, N)),
        "bias": (FLOATS, (N,)),
    }
    wrong = part_problems(checkpoint, name, expected, optional=("bias",))
    if f"{name}.g_idx" in checkpoint:
        wrong.append(f"{name}.g_idx is unexpected: AWQ has no order of rows")
    return wrong


def read(checkpoint: Checkpoint, name: str, in_features: int, out_features: int, settings: QuantSettings) -> GptqLinear:
    """Module `name` in plain form.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or dtype, or a scale or bias is not finite.
    """
    wrong = problems(checkpoint, name, in_features, out_features, settings)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    scales = checkpoint.tensor(f"{name}.scales")
    require_finite(scales, f"{name}.scales")
    return GptqLinear(
        name=name,
        bits=BITS,
        in_features=in_features,
        out_features=out_features,
        planar=False,
        qweight=to_gptq_words(checkpoint.tensor(f"{name}.qweight")),
        scales=scales.float() if scales.dtype == torch.bfloat16 else scales,
        zeros=fields_in_order(checkpoint.tensor(f"{name}.qzeros")),
        group_starts=sequential_groups(in_features, settings.group_size),
        order=None,
        bias=read_bias(checkpoint, name),
    )


PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight", "bias")
AWQ = Container("AWQ", MappingProxyType({FORMAT: "AWQ"}), "qweight", PARTS, infer, problems, read)
