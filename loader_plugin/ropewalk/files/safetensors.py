"""One safetensors file, through the safetensors library: names, shapes, and tensors as views of a memory mapping.

What is added here: an error that names the file, and handles that can be dropped between layers. Pages of a mapping
count as memory of this process for as long as the mapping lives.
"""

from __future__ import annotations

import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ropewalk.base.errors import CheckpointError

GIT_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor; dtype as the format spells it ("F16", "I32")."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def num_bytes(self) -> int:
        """Size of the values. The first number in the name of a dtype is its bits ("F16", "F8_E4M3"); BOOL has none."""
        bits = re.search(r"[0-9]+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


class SafetensorsFile:
    """The tensors of one file. It is opened when a tensor is asked for, and again after `release()`."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header of `path`.

        Raises:
            CheckpointError: not a readable file, truncated, or a header that is not what the format allows.
        """
        self.path = path
        self.num_bytes = _checked_size(path)
        self._handle: Any = None
        self.tensors = self._read_header()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, a view of the mapping: valid (and its pages held) for as long as it lives. Read only.

        Raises:
            CheckpointError: a dtype that torch does not have, or a file that has changed since it was opened.
        """
        try:
            return self._open().get_tensor(name)
        except (SafetensorError, RuntimeError, KeyError, AttributeError, ValueError, OSError) as error:
            # An unknown dtype, or a file that was replaced, comes as any of these.
            raise CheckpointError(f"{self.path}: tensor {printable(name)} cannot be read: {error}") from error

    def release(self) -> None:
        """Drops the handle; pages stop counting as our memory once no tensor of it is left."""
        self._handle = None

    def _read_header(self) -> dict[str, TensorInfo]:
        file = self._open()
        infos = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            entry = file.get_slice(name)
            infos[name] = TensorInfo(tuple(entry.get_shape()), str(entry.get_dtype()), self.path)
        self.release()
        return infos

    def _open(self) -> Any:
        if self._handle is None:
            if _checked_size(self.path) != self.num_bytes:
                raise CheckpointError(f"{self.path} has changed while it was being read: load the model again")
            try:
                self._handle = safe_open(self.path, framework="pt")
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{self.path} is damaged, truncated, or not a safetensors file ({error}): download it again"
                ) from error
        return self._handle


def printable(name: object) -> str:
    """A name from a file as messages show it: on one line, printable, at most 120 characters."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else text[:117] + "..."


def _checked_size(path: Path) -> int:
    """The size of a regular file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device may never end
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise CheckpointError(f"{path} is {kind}: a safetensors file is expected under this name")
        with path.open("rb") as file:
            if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return status.st_size
