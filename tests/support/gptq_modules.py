"""One GPTQ module written to a folder and read back: what the tests of the gptq room share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from gptq_writer import Kind, quantised_linear
from ropewalk.config.quantisation import QuantSettings
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import GptqLinear, read_gptq_linear

K, N = 96, 64


def settings_for(kind: Kind, **changes: object) -> QuantSettings:
    declared = QuantSettings(
        kind.bits, kind.group_size, kind.desc_act, kind.sym, kind.format, kind.word_borrow and kind.format == "gptq"
    )
    return replace(declared, **changes)


def write_module(folder: Path, kind: Kind, seed: int = 0, **replaced: torch.Tensor | None) -> torch.Tensor:
    """One linear `m` [K -> N] in folder/model.safetensors; returns its exact weight [K, N]. None drops a tensor."""
    tensors, weight = quantised_linear("m", K, N, kind, np.random.default_rng(seed))
    tensors |= {f"m.{part}": tensor for part, tensor in replaced.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return weight.T


def read(folder: Path, declared: QuantSettings | None) -> GptqLinear:
    with Checkpoint(folder) as checkpoint:
        return read_gptq_linear(checkpoint, "m", K, N, declared)


def warn_never(kind: str, message: str) -> None:
    raise AssertionError(message)


def v1(bits: int, word_borrow: bool = False) -> QuantSettings:
    return QuantSettings(bits, 32, False, False, "gptq", word_borrow)
