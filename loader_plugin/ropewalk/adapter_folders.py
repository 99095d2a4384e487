"""Adapters on disk beside a model: found by name, and the RoPE scaling that they were trained for.

MODEL/adapters/NAME/adapter_config.json     {"rope_scaling": {"rope_type": "linear", "factor": 4.0, ...}, ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ropewalk.errors import ConfigError
from ropewalk.lora_config import read_lora_config


def find_adapter(model_folder: Path, given: str) -> Path | None:
    """`given` as a folder; else the adapter of that name which comes with the model; None where neither exists."""
    beside_the_model = model_folder / "adapters" / given
    return next((folder for folder in (Path(given), beside_the_model) if folder.is_dir()), None)


def rope_of_adapters(folders: Iterable[Path]) -> Mapping[str, Any] | None:
    """The RoPE scaling that the adapters note (`rope_scaling` of adapter_config.json); None where none notes any.

    Raises:
        ConfigError: two note different ones, or a note is wrong. Others as `read_lora_config`.
    """
    noted: tuple[Path, Mapping[str, Any]] | None = None
    for folder in folders:
        scaling = read_lora_config(folder).rope_scaling
        if scaling is None:
            continue
        if noted is not None and noted[1] != scaling:
            raise ConfigError(
                f"the adapters {noted[0]} and {folder} were trained for different RoPE scalings, {dict(noted[1])} and "
                f"{dict(scaling)}: use one of them, or say which scaling with the argument rope_scaling"
            )
        noted = noted or (folder, scaling)
    return None if noted is None else noted[1]
