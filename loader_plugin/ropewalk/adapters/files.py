"""The tensors of an adapter folder: adapter_model.safetensors, or adapter_model.bin without running any code of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from ropewalk.base.errors import CheckpointError
from ropewalk.files.safetensors import SafetensorsFile, printable

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def read_adapter_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(file, its tensors by name), in memory of their own.

    Raises:
        CheckpointError: neither file is there, or it is damaged, or holds something else than tensors.
    """
    path = folder / SAFETENSORS_NAME
    if path.exists():
        file = SafetensorsFile(path)
        return path, {name: file.tensor(name) for name in file.tensors}
    path = folder / PICKLE_NAME
    if path.exists():
        return path, _read_pickled(path)
    raise CheckpointError(f"{folder} has neither {SAFETENSORS_NAME} nor {PICKLE_NAME}: finish the download")


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ImportError,
        MemoryError,
        AssertionError,
        OverflowError,
    ) as error:
        # What a damaged pickle leads to depends on where the damage is.
        raise CheckpointError(
            f"{path} is damaged, truncated, or holds more than tensors ({str(error).splitlines()[:1]}): download it "
            "again, or get it as safetensors"
        ) from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} must hold a dictionary of tensors, found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise CheckpointError(f"{path}: {printable(name)} is not a plain tensor")
    return tensors
