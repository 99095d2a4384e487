"""The second model of a layer order such as a:0-19,b:10-29: it lends its layers; the first gives everything else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ropewalk.config import ModelConfig, load_model_config
from ropewalk.errors import ConfigError
from ropewalk.rope import resolve_rope

logger = logging.getLogger(__name__)

# What a layer takes for granted. The vocabulary may differ: embeddings and head are the first model's.
SAME = (
    *("family", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps"),
    *("qkv_bias", "o_bias", "mlp_bias", "qk_norm"),
)


def load_second_config(folder: Any, config: ModelConfig) -> ModelConfig:
    """The configuration of the second model, checked against the first model's.

    A RoPE that differs is only warned about: the first model's rotates all queries and keys.

    Raises:
        ConfigError: its layers have other shapes, or as `load_model_config`. UnsupportedError: likewise.
    """
    if not isinstance(folder, (str, Path)):
        raise ConfigError(f"second_folder must be a path, got {type(folder).__name__}")
    second = load_model_config(Path(folder))
    differing = [name for name in SAME if getattr(second, name) != getattr(config, name)]
    if differing:
        listed = ", ".join(f"{name} {getattr(second, name)!r}, not {getattr(config, name)!r}" for name in differing)
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
