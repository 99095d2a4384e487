"""What loading a folder with these options would do, decided before a weight is read, for `load_model` and `info`.

A second model lends its layers to an order such as a:0-19,b:10-29; the first gives everything else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.base.errors import ConfigError
from ropewalk.base.limits import MAX_SEQ_LEN
from ropewalk.config.layer_order import LayerOrder, choose_layer_order
from ropewalk.config.model import ModelConfig, load_model_config
from ropewalk.config.quantisation import QuantConfig, load_quant_config
from ropewalk.model.options import ROPE_NAMES, LoadOptions
from ropewalk.rope.given import rope_as_given
from ropewalk.rope.rope import Rope, resolve_rope

logger = logging.getLogger(__name__)

# What both models must have in common. The vocabulary may differ: embeddings and head are the first model's.
SAME = (
    *("family", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "norm_eps", "flags"),
    *("activation", "scales", "paired_dim", "sliding_theta", "mixture"),
)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What the files of a folder declare, with the options that replace some of it."""

    config: ModelConfig
    quant: QuantConfig | None
    rope: Rope
    second: ModelConfig | None  # the model that lends layers
    order: LayerOrder
    max_seq_len: int


def plan_loading(folder: Path, options: LoadOptions | None = None) -> LoadPlan:
    """Read the JSON files of `folder` and decide; `options` default to none.

    Raises:
        ConfigError: an option or a key of a JSON file is wrong. UnsupportedError: an architecture, format or RoPE type
            that is not implemented.
    """
    options = options or LoadOptions()
    config = load_model_config(folder)
    quant = load_quant_config(folder, config.raw)
    overrides = {name: getattr(options, name) for name in ROPE_NAMES}
    rope = rope_as_given(config.raw, options.max_seq_len, source=config.source, **overrides)
    second = None if options.second_folder is None else load_second_config(options.second_folder, config)
    order = choose_layer_order(
        config,
        options.layer_order,
        options.recompute_n_layers,
        options.rewind_n_layers,
        None if second is None else second.num_layers,
    )
    if options.max_seq_len is None and rope.default_length > MAX_SEQ_LEN:
        raise ConfigError(
            f"{config.source} speaks of {rope.default_length} positions, and at most {MAX_SEQ_LEN} can be run: give "
            "max_seq_len, the longest sequence that is to be run"
        )
    return LoadPlan(config, quant, rope, second, order, options.max_seq_len or rope.default_length)


def load_second_config(folder: Any, config: ModelConfig) -> ModelConfig:
    """The configuration of the second model, checked against the first model's.

    A different RoPE is only a warning: the first model's rotates all queries and keys.

    Raises:
        ConfigError: its layers have other shapes, or as `load_model_config`. UnsupportedError: likewise.
    """
    if not isinstance(folder, (str, Path)):
        raise ConfigError(f"second_folder must be a path, got {type(folder).__name__}")
    second = load_model_config(Path(folder))
    differing = [name for name in SAME if getattr(second, name) != getattr(config, name)]
    if differing:
        listed = ", ".join(f"{name} {_shown(second, name)}, not {_shown(config, name)}" for name in differing)
        raise ConfigError(
            f"second_folder: the layers of {second.source} do not fit those of {config.source}: it has {listed}. "
            "Layers can be mixed only between models of equal shapes"
        )
    ours, theirs = (resolve_rope(c.raw, source=c.source) for c in (config, second))
    if (ours.theta, ours.method) != (theirs.theta, theirs.method):
        logger.warning(
            "%s was made for another RoPE than %s: its layers run under the first model's", second.source, config.source
        )
    return second


def _shown(config: ModelConfig, name: str) -> str:
    value = getattr(config, name)
    return ", ".join(sorted(value)) or "none" if isinstance(value, frozenset) else repr(value)
