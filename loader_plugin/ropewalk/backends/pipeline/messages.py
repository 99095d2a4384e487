"""What ranks say to each other: small typed messages, as a JSON header and raw tensors. Nothing is ever unpickled.

    prefix   16 bytes     "rwp1", bytes of the header (uint32), bytes of the body (uint64), little-endian
    body     header       {"kind": "Step", "values": {...}, "tensors": [[field, dtype, shape], ...]}
             tensors      each at the next multiple of 64 bytes, so that it can be used where it has arrived

A message travels around the ring: rank 0 sends it to rank 1, which does its part and passes it on. Those that are an
answer when they are around come back to rank 0.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, fields
from typing import Any

import torch

from ropewalk.base.errors import RankError

PREFIX = struct.Struct("<4sIQ")
MAGIC = b"rwp1"
ALIGNMENT = 64
MOST_BODY_BYTES = 1 << 40
DTYPES = {
    "uint8": torch.uint8,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Read and pack these layers. All are loaded at the same time; the answer is `Loaded`.

    second_folder: "" if no model lends layers. layers: of each rank, as indices of `ModelWeights.layers`. firsts: the
    first layer instance of each rank; names: of the ranks, with what they run, for messages. threads: 0: the cores of
    the rank's machine shared out among its ranks. isa, device: "" for the default. expert_bytes: -1: all experts are
    held; as `ExpertRoom` of the whole model otherwise.
    """

    folder: str
    second_folder: str
    backend: str
    compute: str
    isa: str
    device: str
    threads: int
    layers: list
    firsts: list
    names: list
    expert_bytes: int
    expert_part: float


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """One report of each rank so far: see `Report` in loaded.py."""

    reports: list


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What happened to pages and adapters since the last message, in this order:

    ["pool", pool, kv heads, head dim, format], ["unpool", pool], ["take", page, pool, layer instances, is recent],
    ["copy", page, source], ["drop", page], ["forget", low rank]
    """

    changes: list


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A low-rank change of linears for one rank, named by a number. a: [r_0 + r_1 + ..., K] float32, the matrices of
    all parts, with so many `ranks`; b: [sum of N_i * r_i] float32, N_i = `widths`."""

    to: int
    name: int
    ranks: list
    widths: list
    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Rows through the layer instances of all ranks; its own answer once it is around.

    spans: [spans, 4] int64: rows, start, pages, pages in float16. pages: [all of both] int64, by span; -1: none.
    uses: [instances, 2] int64: the layer and the instance; weights: [instances] float64. changes: [place in `uses`,
    first row, end row, {linear: name of a low-rank change}]. x: [T, C], cos, sin: [tables, T, R/2] float32.
    """

    number: int
    changes: list
    spans: torch.Tensor
    pages: torch.Tensor
    uses: torch.Tensor
    weights: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    x: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """As `Backend.move_rows_`; pages by their numbers, rotations of all instances with -1 for None."""

    source: list
    source_start: int
    target: list
    target_start: int
    num_rows: int
    rotations: list
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """The memory of a page: [bytes] uint8, to which each rank adds its part; the answer when it is around."""

    number: int
    page: int
    values: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """The memory of a page: [bytes] uint8, of which each rank takes its part and passes the rest on."""

    page: int
    values: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """No more messages follow. When it is around, ranks may close their connections, not before: gloo would lose what
    has not been read."""


Message = Load | Loaded | Changes | LowRank | Step | Move | Read | Write | End
KINDS = {kind.__name__: kind for kind in (Load, Loaded, Changes, LowRank, Step, Move, Read, Write, End)}
VALUE_TYPES = {"int": int, "float": float, "str": str, "list": list}


def encode(message: Message) -> tuple[torch.Tensor, torch.Tensor]:
    """(prefix [16], body [bytes]) uint8. Tensors are copied from any device; they must be contiguous."""
    values: dict[str, Any] = {}
    tensors: list[tuple[str, torch.Tensor]] = []
    for field in fields(message):
        value = getattr(message, field.name)
        if isinstance(value, torch.Tensor):
            tensors.append((field.name, value))
        else:
            values[field.name] = value
    listed = [[name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors]
    head = {"kind": type(message).__name__, "values": values, "tensors": listed}
    header = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    places, total = _places([tensor.numel() * tensor.element_size() for _, tensor in tensors], len(header))
    body = torch.empty(total, dtype=torch.uint8)
    body[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for (_, tensor), (start, end) in zip(tensors, places, strict=True):
        if end > start:
            body[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    prefix = torch.frombuffer(bytearray(PREFIX.pack(MAGIC, len(header), total)), dtype=torch.uint8)
    return prefix, body


def body_size(prefix: torch.Tensor) -> int:
    """Bytes of the body that follows a prefix.

    Raises:
        RankError: it is no prefix of ours.
    """
    magic, header_bytes, total = PREFIX.unpack(prefix.numpy().tobytes())
    if magic != MAGIC or not header_bytes <= total <= MOST_BODY_BYTES:
        raise RankError(
            f"what came over the wire is no message of ropewalk ({magic!r}, {header_bytes} of {total} bytes): all "
            "ranks must run the same version, and nothing else may use their ports"
        )
    return total


def decode(prefix: torch.Tensor, body: torch.Tensor) -> Message:
    """The message; its tensors are views of `body`.

    Raises:
        RankError: it is none of ours, or its header and its bytes do not agree.
    """
    if body_size(prefix) != len(body):
        raise RankError(f"a message of {len(body)} bytes was announced as {body_size(prefix)}")
    header_bytes = PREFIX.unpack(prefix.numpy().tobytes())[1]
    try:
        head = json.loads(body[:header_bytes].numpy().tobytes())
        kind = KINDS[head["kind"]]
        values = _checked_values(kind, head["values"])
        specs = [(name, DTYPES[dtype], _checked_shape(shape)) for name, dtype, shape in head["tensors"]]
        places, total = _places([math.prod(shape) * dtype.itemsize for _, dtype, shape in specs], header_bytes)
        if total != len(body) or {name for name, *_ in specs} != _tensor_names(kind) or len(specs) != len(set(specs)):
            raise ValueError("its tensors do not fit")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RankError(f"a message between ranks is damaged ({error}): all must run the same version") from error
    for (name, dtype, shape), (start, end) in zip(specs, places, strict=True):
        values[name] = body[start:end].view(dtype).view(shape)
    return kind(**values)


def _places(sizes: list[int], start: int) -> tuple[list[tuple[int, int]], int]:
    """Where tensors of these sizes begin and end after a header, and the end of the body."""
    places, end = [], start
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + size
        places.append((start, end))
    return places, end


def _tensor_names(kind: type) -> set[str]:
    return {field.name for field in fields(kind) if field.type == "torch.Tensor"}


def _checked_values(kind: type, values: Any) -> dict[str, Any]:
    expected = {field.name: VALUE_TYPES[field.type] for field in fields(kind) if field.type in VALUE_TYPES}
    if not isinstance(values, dict) or values.keys() != expected.keys():
        raise ValueError(f"a {kind.__name__} has other values")
    for name, wanted in expected.items():
        if type(values[name]) is not wanted:
            raise ValueError(f"{kind.__name__}.{name} is a {type(values[name]).__name__}, not {wanted.__name__}")
    return values


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a shape is {shape!r:.80}")
    return tuple(shape)
