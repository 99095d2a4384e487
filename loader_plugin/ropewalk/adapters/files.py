"""The tensors of an adapter folder: adapter_model.safetensors. Pickled ones are refused: loading one can run code."""

from __future__ import annotations

from pathlib import Path

import torch

from ropewalk.base.errors import CheckpointError, UnsupportedError
from ropewalk.files.safetensors import SafetensorsFile

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
CONVERSION = """import torch
from safetensors.torch import save_file
tensors = torch.load("{source}", map_location="cpu", weights_only=True)
save_file({{name: tensor.contiguous() for name, tensor in tensors.items()}}, "{target}")"""


def read_adapter_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(file, its tensors by name). The tensors are copies in memory.

    Raises:
        CheckpointError: the file is missing or damaged. UnsupportedError: there is only a pickled file.
    """
    path = folder / SAFETENSORS_NAME
    if path.exists():
        file = SafetensorsFile(path)
        return path, {name: file.tensor(name) for name in file.tensors}
    for name in PICKLED_NAMES:
        if (folder / name).exists():
            raise UnsupportedError(_pickled(folder / name))
    raise CheckpointError(f"{folder} has no {SAFETENSORS_NAME}: finish the download")


def _pickled(path: Path) -> str:
    """Why the file is refused, and how to convert it if you trust it."""
    snippet = CONVERSION.format(source=path.name, target=SAFETENSORS_NAME)
    return (
        f"{path} is a pickled torch file, which is not read because loading one can run code. Get the adapter as "
        f"{SAFETENSORS_NAME}; or, if you trust the file, convert it in its folder with\n\n{snippet}\n\n"
        "(or load the adapter with PEFT and write it again with save_pretrained)"
    )
