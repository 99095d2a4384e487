"""Which model folders people expect our loader to read. Those are ours to load, or to refuse with a reason."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ropewalk.base.errors import RopewalkError
from ropewalk.base.json import read_json_object
from ropewalk.config.quantisation import KOBOLD_KEYS
from ropewalk.files.folder import Checkpoint

# The values of quant_method in config.json for what GPTQ loaders read, or are expected to read.
METHODS = ("gptq", "gptq_v2", "gptq_marlin", "marlin", "awq", "auto-round", "intel/auto-round")
PACKED = ("compressed-tensors", "pack-quantized")  # method and format: GPTQ's codes under another name
DECLARATIONS = ("quantize_config.json", "quant_config.json")
# The packages with which a loader of the web UI reads such folders. With none of them it fails on every one.
READERS = {
    "ExLlamav2": ("exllamav2",),
    "ExLlamav2_HF": ("exllamav2",),
    "Transformers": ("gptqmodel", "auto_gptq", "awq", "auto_round"),
}


def is_gptq_like(folder: Path) -> bool:
    """True for a folder quantised by GPTQ or a relative of it (AWQ, W4A16), whether this package reads it or not.

    False for what other loaders are for: dense weights, GGUF, EXL2, bitsandbytes.
    """
    if not (folder / "config.json").is_file():
        return False
    if any((folder / name).is_file() for name in DECLARATIONS):
        return True
    try:
        config = read_json_object(folder / "config.json")
        declared = config.get("quantization_config")
        if isinstance(declared, dict) and declared:
            return _is_gptq_method(declared)
        if any(key in config for key in KOBOLD_KEYS):
            return True
        with Checkpoint(folder, None) as checkpoint:
            return any(name.endswith(".qweight") for name in checkpoint.names())
    except RopewalkError:
        return False


def _is_gptq_method(declared: dict[str, Any]) -> bool:
    """True for a quantization_config with one of METHODS; the oldest declare no method, only bits."""
    method = declared.get("quant_method", declared.get("method"))
    if str(method).lower() == PACKED[0]:
        return declared.get("format") == PACKED[1]
    return str(method).lower() in METHODS if method is not None else "bits" in declared


def reads_gptq(loader: str) -> bool:
    """True if this loader of the web UI may read such a folder: it is in READERS, and a package it needs is there."""
    return any(find_spec(package) is not None for package in READERS.get(loader, ()))
