"""compressed-tensors' "pack-quantized": GPTQ's codes on their side (llm-compressor's W4A16 and W8A16).

    weight_packed [N, K*bits/32] int32      weight_scale [N, G]      weight_shape [2] int64, = N, K      bias [N]
    weight_zero_point [N*bits/32, G] int32, packed down the outputs; asymmetric files only
                      (int8 [N, G], signed, in files made before April 2025)
    weight_g_idx [K] int32, the group of each input; files of actorder "group" only; all -1: no order

A field is the signed code + 2^(bits-1), so fields and their zero point are GPTQ's codes: symmetric files, which store
no zero point, have 2^(bits-1). A row of weight_packed is the bit stream of one output, as a column of GPTQ's qweight.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import torch

from ropewalk.base.errors import CheckpointError
from ropewalk.config.compressed_tensors import PACKED
from ropewalk.config.settings import QuantSettings
from ropewalk.containers.container import Container, num_groups, part_problems
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.bits import block_codes, unpack_rows
from ropewalk.gptq.linear import (
    GptqLinear,
    read_bias,
    read_groups,
    require_finite,
)
from ropewalk.gptq.shapes import FLOATS, infer_bits, infer_group_size

CODES = "weight_packed"
PARTS = (CODES, "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight", "bias")


def infer(checkpoint: Checkpoint, name: str, in_features: int, template: QuantSettings | None) -> QuantSettings:
    """Bits and group size by the shapes; symmetric if no zero points are stored.

    Raises:
        CheckpointError: the shapes fit no bit width, or not one group size.
    """
    packed = checkpoint.info(f"{name}.{CODES}").shape
    bits = infer_bits(f"{name}.{CODES}", packed, packed[-1] if packed else 0, in_features)
    scale = f"{name}.weight_scale"
    shape = checkpoint.info(scale).shape if scale in checkpoint else ()
    size = infer_group_size(scale, in_features, shape[-1] if shape else 0)
    symmetric = f"{name}.weight_zero_point" not in checkpoint
    base = template or QuantSettings(bits, size, desc_act=False, sym=symmetric, format=PACKED, word_borrow=False)
    ordered = f"{name}.weight_g_idx" in checkpoint
    return replace(base, bits=bits, group_size=size, sym=symmetric, desc_act=ordered)


def problems(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, settings: QuantSettings
) -> list[str]:
    """A line for each tensor of module `name` that is missing or has the wrong shape or dtype."""
    K, N, bits = in_features, out_features, settings.bits
    unit = block_codes(bits)
    if K % unit:
        return [f"{name}: {K} inputs cannot be read with {bits} bits, only multiples of {unit}"]
    G = num_groups(K, settings.group_size)
    expected = {
        CODES: (("I32",), (N, K * bits // 32)),
        "weight_scale": (FLOATS, (N, G)),
        "weight_zero_point": (("I32",), (-(-N // unit), G)),
        "weight_g_idx": (("I32", "I64"), (K,)),
        "weight_shape": (("I64", "I32"), (2,)),
        "bias": (FLOATS, (N,)),
    }
    zero_point = f"{name}.weight_zero_point"
    if zero_point in checkpoint and checkpoint.info(zero_point).dtype == "I8":
        expected["weight_zero_point"] = (("I8",), (N, G))
    optional = ["bias"]
    optional += ["weight_zero_point"] if settings.sym else []
    optional += [] if settings.desc_act else ["weight_g_idx"]
    wrong = part_problems(checkpoint, name, expected, tuple(optional))
    packed = checkpoint.info(f"{name}.{CODES}").shape
    if len(packed) == 2 and packed[0] == N and packed[1] * 32 != K * bits and not packed[1] * 32 % K:
        wrong[0] += f": it holds {packed[1] * 32 // K}-bit codes, the configuration says {bits}"
    return wrong


def read(checkpoint: Checkpoint, name: str, in_features: int, out_features: int, settings: QuantSettings) -> GptqLinear:
    """Module `name` in plain form.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or dtype, a group out of range, a zero point beyond
            the codes, a weight_shape of another matrix, or a scale or bias that is not finite.
    """
    wrong = problems(checkpoint, name, in_features, out_features, settings)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    shape = checkpoint.tensor(f"{name}.weight_shape").tolist()
    if shape != [out_features, in_features]:
        raise CheckpointError(f"{name}.weight_shape holds {shape}, expected {[out_features, in_features]}")
    scale = checkpoint.tensor(f"{name}.weight_scale")  # [N, G]
    require_finite(scale, f"{name}.weight_scale")
    scales = (scale.float() if scale.dtype == torch.bfloat16 else scale).T.contiguous()  # [G, N]
    starts, order = read_groups(checkpoint, f"{name}.weight_g_idx", in_features, len(scales), settings)
    return GptqLinear(
        name=name,
        bits=settings.bits,
        in_features=in_features,
        out_features=out_features,
        planar=False,
        qweight=checkpoint.tensor(f"{name}.{CODES}").T.contiguous(),  # [K*bits/32, N]
        scales=scales,
        zeros=_zeros(checkpoint, name, out_features, len(scales), settings.bits),
        group_starts=starts,
        order=order,
        bias=read_bias(checkpoint, name),
    )


def _zeros(checkpoint: Checkpoint, name: str, out_features: int, groups: int, bits: int) -> torch.Tensor:
    """[G, N] uint8."""
    tensor, middle = f"{name}.weight_zero_point", 1 << (bits - 1)
    if tensor not in checkpoint:
        return torch.full((groups, out_features), middle, dtype=torch.uint8)
    stored = checkpoint.tensor(tensor)
    if stored.dtype != torch.int8:
        return unpack_rows(stored, bits, planar=False)[:out_features].T.contiguous()
    points = stored.to(torch.int16) + middle  # [N, G]
    wrong = (points < 0) | (points >= 1 << bits)
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise CheckpointError(
            f"{tensor}: {int(wrong.sum())} values are beyond {bits} bits (at {at}: {int(stored[tuple(at)])}; "
            f"{-middle} to {middle - 1} are accepted): the file is damaged"
        )
    return points.to(torch.uint8).T.contiguous()


COMPRESSED_TENSORS = Container(
    "compressed-tensors", MappingProxyType({PACKED: "W{bits}A16"}), CODES, PARTS, infer, problems, read
)
