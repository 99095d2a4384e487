"""What loading a folder with these options would do, decided before a weight is read, for `load_model` and `info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.config import ModelConfig, load_model_config
from ropewalk.layer_order import LayerOrder, choose_layer_order
from ropewalk.quant_config import QuantConfig, load_quant_config
from ropewalk.rope import Rope, resolve_rope
from ropewalk.second_model import load_second_config


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The declarations of a folder, read together with the options in their place."""

    config: ModelConfig
    quant: QuantConfig | None
    rope: Rope
    second: ModelConfig | None  # the model that lends layers
    order: LayerOrder
    max_seq_len: int


def plan_loading(
    folder: Path,
    max_seq_len: int | None,
    rope_options: Mapping[str, Any],
    order_options: Mapping[str, Any],
    second_folder: str | Path | None,
) -> LoadPlan:
    """Read the JSON files of `folder` and decide.

    rope_options: keyword arguments of `rope.resolve_rope`. order_options: those of `layer_order.choose_layer_order`.

    Raises:
        ConfigError: an option or a key of a JSON file is wrong. UnsupportedError: an architecture, format or RoPE type
            that is not implemented.
    """
    config = load_model_config(folder)
    quant = load_quant_config(folder, config.raw)
    rope = resolve_rope(config.raw, max_seq_len, source=config.source, **rope_options)
    second = None if second_folder is None else load_second_config(second_folder, config)
    order = choose_layer_order(config, **order_options, second_layers=None if second is None else second.num_layers)
    return LoadPlan(config, quant, rope, second, order, max_seq_len or rope.default_length)
