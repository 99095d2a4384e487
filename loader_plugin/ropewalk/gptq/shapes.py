"""Shapes of a quantised linear's tensors, from the headers alone. They are checked against the settings; in a folder
without a quantisation config the settings are inferred from them.

    qweight [K*bits/32, N] int32    qzeros [G, N*bits/32] int32    scales [G, N]    g_idx [K]    bias [N]

The first files (10 March 2023) have one group, with `zeros` [N, 1] and `scales` [N, 1] instead.
"""

from __future__ import annotations

from dataclasses import replace

from ropewalk.base.errors import CheckpointError
from ropewalk.config.quantisation import QuantSettings
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.bits import CONTINUOUS_BITS, PLANES, block_codes
from ropewalk.gptq.zeros import is_planar

FLOATS = ("F16", "BF16", "F32")
BITS = tuple(sorted({*CONTINUOUS_BITS, *PLANES}))


def has_premultiplied_zeros(checkpoint: Checkpoint, name: str) -> bool:
    """True for the layout of the first files (docs/formats.md, "Files of 2023")."""
    return f"{name}.zeros" in checkpoint and f"{name}.qzeros" not in checkpoint


def infer_settings(
    checkpoint: Checkpoint, name: str, in_features: int, template: QuantSettings | None = None
) -> QuantSettings:
    """Bits and group size of module `name` from its shapes; format and dialect from the template (default: v1).

    Raises:
        CheckpointError: the shapes fit no bit width, or not one group size.
    """
    qweight = checkpoint.info(f"{name}.qweight").shape
    bits = infer_bits(f"{name}.qweight", qweight, qweight[0] if qweight else 0, in_features)
    num_groups = 1
    if not has_premultiplied_zeros(checkpoint, name) and f"{name}.scales" in checkpoint:
        scales = checkpoint.info(f"{name}.scales").shape
        num_groups = scales[0] if scales else 0
    group_size = infer_group_size(f"{name}.scales", in_features, num_groups)
    if template is None:
        return QuantSettings(
            bits=bits, group_size=group_size, desc_act=False, sym=False, format="gptq", word_borrow=False
        )
    return replace(template, bits=bits, group_size=group_size)


def infer_bits(tensor: str, shape: tuple[int, ...], words: int, in_features: int) -> int:
    """The bits of a code, by the number of words that hold those of one output.

    Raises:
        CheckpointError: they fit no bit width.
    """
    bits, rest = divmod(32 * words, in_features)
    if rest or bits not in BITS:
        raise CheckpointError(
            f"{tensor} has shape {list(shape)}: with {in_features} inputs that is {32 * words / in_features:g} "
            f"bits per weight; accepted are {', '.join(map(str, BITS))}. Is this GPTQ, and config.json of this model?"
        )
    return bits


def infer_group_size(tensor: str, in_features: int, num_groups: int) -> int:
    """The group size that makes ceil(K / size) = G: a power of two if one does, else K / G, else a multiple of 8.

    tensor: the scales, for the message.

    Raises:
        CheckpointError: none does, or several do.
    """
    if num_groups == 1:
        return -1
    if 0 < num_groups <= in_features:
        fitting = range(-(-in_features // num_groups), -(-in_features // (num_groups - 1)))
        powers = [size for size in fitting if size & (size - 1) == 0]
        exact = [in_features // num_groups] if in_features % num_groups == 0 else []
        eights = [size for size in fitting if size % 8 == 0]
        if powers or exact or len(eights) == 1:
            return (powers or exact or eights)[0]
    raise CheckpointError(
        f"{tensor} has {num_groups} groups for {in_features} inputs, which fits several group sizes or none: "
        "give bits and group_size in a quantize_config.json"
    )


def shape_problems(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, settings: QuantSettings
) -> list[str]:
    """One line per tensor of module `name` that is missing or has the wrong shape or dtype; empty if all is well."""
    K, N, bits = in_features, out_features, settings.bits
    unit = 32 if is_planar(settings) else block_codes(bits)
    if K % unit or N % unit:
        return [f"{name}: {K} inputs and {N} outputs cannot be stored with {bits} bits, only multiples of {unit}"]
    size = K if settings.group_size == -1 else settings.group_size
    G = -(-K // size)
    expected = {
        "qweight": (("I32",), (K * bits // 32, N)),
        "qzeros": (("I32",), (G, N * bits // 32)),
        "scales": (FLOATS, (G, N)),
        "g_idx": (("I32", "I64"), (K,)),
        "bias": (FLOATS, (N,)),
    }
    if has_premultiplied_zeros(checkpoint, name):
        del expected["qzeros"]
        expected |= {"scales": (FLOATS, (N, 1)), "zeros": (FLOATS, (N, 1))}
    optional = ("g_idx", "bias")
    problems = []
    for part, (dtypes, shape) in expected.items():
        tensor = f"{name}.{part}"
        if tensor not in checkpoint:
            problems += [] if part in optional else [f"{tensor} is missing"]
            continue
        problem = tensor_problem(checkpoint, tensor, shape, dtypes)
        if problem:
            problems.append(problem + _likely_cause(part, checkpoint.info(tensor).shape, K, settings))
    return problems


def tensor_problem(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> str | None:
    """What is wrong with the shape or dtype of a tensor that exists; None if nothing is."""
    info = checkpoint.info(name)
    if info.shape != shape:
        return f"{name} has shape {list(info.shape)}, expected {list(shape)}"
    if info.dtype not in dtypes:
        return f"{name} has dtype {info.dtype}, accepted {'/'.join(dtypes)}"
    return None


def _likely_cause(part: str, found: tuple[int, ...], in_features: int, settings: QuantSettings) -> str:
    """What the numbers suggest, as the end of a message; empty if they suggest nothing."""
    if not found:
        return ""
    if part == "qweight":
        bits, rest = divmod(32 * found[0], in_features)
        if not rest and bits in BITS and bits != settings.bits:
            return f": it holds {bits}-bit codes, the configuration says {settings.bits}"
    if part in ("scales", "qzeros") and len(found) == 2 and found[0] != -(-in_features // _size(in_features, settings)):
        return f": it has {found[0]} groups, the configuration says group_size {settings.group_size}"
    if part == "g_idx" and len(found) == 1 and found[0] > in_features and found[0] % in_features == 0:
        count = found[0] // in_features
        return f": {count} concatenated g_idx of fused modules, which are not supported; save the modules separately"
    return ""


def _size(in_features: int, settings: QuantSettings) -> int:
    return in_features if settings.group_size == -1 else settings.group_size
