"""The header of a safetensors file: which tensors it holds and where, checked against the format.

    8 bytes: n, little-endian    n bytes: JSON    the values of all tensors, one after the other, to the end of the file

The JSON maps each name to {"dtype": "F16", "shape": [K, N], "data_offsets": [begin, end]}, counted from the end of the
JSON, and "__metadata__" to anything. The values must lie side by side without gaps.

It is parsed here and not by the safetensors library, which maps the file: truncating a mapped file kills the process
(SIGBUS), whereas a plain read fails with an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

LENGTH_BYTES = 8
METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
MAX_DIMENSIONS = 16
BITS = {
    **{"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64},
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor. dtype: as the format spells it ("F16", "I32"). offset: within the file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the values in the file."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Header:
    """What a file begins with. text: its first bytes, up to the values. metadata: as it stands there, unchecked."""

    text: bytes
    tensors: Mapping[str, TensorInfo]
    metadata: Any


def read_header(file: BinaryIO, path: Path, file_bytes: int) -> Header:
    """The header of an open file of `file_bytes` bytes; its tensors are in the order of the header.

    Raises:
        ValueError: the header violates the format; the message says how.
    """
    prefix = file.read(LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise ValueError(f"a header of {length} bytes does not fit a file of {file_bytes}")
    text = file.read(length)
    if len(text) < length:
        raise ValueError(f"the header ends after {len(text)} of {length} bytes")
    data_start = LENGTH_BYTES + length
    entries = _entries(text)
    metadata = entries.pop(METADATA, {})
    infos = {name: _tensor_info(name, entry, path, data_start) for name, entry in entries.items()}
    end = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset != end:
            raise ValueError(f"{_short(name)} begins at byte {info.offset}, where byte {end} is expected")
        end += info.num_bytes
    if end != file_bytes:
        raise ValueError(f"the file is not fully covered: its tensors end at byte {end} of {file_bytes}")
    return Header(prefix + text, infos, metadata)


def header_text(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds these tensors, (name, dtype, shape), one after the other.

    Padded with spaces, as the safetensors library does it, so that the values begin at a multiple of 8.
    """
    entries: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _entries(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode())
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("the header is not a JSON object")
    return entries


def _tensor_info(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, Mapping):
        raise ValueError(f"the entry of {_short(name)} is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{_short(name)} has the unknown dtype {_short(dtype)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) >= 1 << 60:
        raise ValueError(f"{_short(name)} has the impossible shape {_short(shape)}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{_short(name)} has the impossible data_offsets {_short(offsets)}")
    num_bits = math.prod(shape) * BITS[dtype]
    if num_bits % 8 or offsets[1] - offsets[0] != num_bits // 8:
        raise ValueError(f"{_short(name)} of {num_bits} bits does not fit its data_offsets {_short(offsets)}")
    return TensorInfo(tuple(shape), dtype, path, data_start + offsets[0])


def _sizes(value: Any) -> bool:
    """True for a list of non-negative integers."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(value: Any) -> str:
    return f"{value!a:.80}"
