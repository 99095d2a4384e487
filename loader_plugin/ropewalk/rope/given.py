"""The RoPE options as they are given to `load_model` and `Model.rescale`: an object, knobs, or "auto"."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ropewalk.base.choices import AUTO
from ropewalk.base.errors import ConfigError
from ropewalk.rope.automatic import resolve_automatically
from ropewalk.rope.rope import Rope, resolve_rope

logger = logging.getLogger(__name__)


def rope_as_given(
    config: Mapping[str, Any],
    seq_len: int | None = None,
    *,
    rope_scaling: Mapping[str, Any] | str | None = None,
    compress_pos_emb: float | None = None,
    alpha_value: float | None = None,
    rope_theta: float | None = None,
    source: str = "config.json",
) -> Rope:
    """As `resolve_rope`; rope_scaling="auto" lets the rule of rope/automatic.py choose for `seq_len`, and logs it.

    Raises:
        ConfigError, UnsupportedError: as `resolve_rope`; "auto" together with a knob; another text.
    """
    if not isinstance(rope_scaling, str):
        return resolve_rope(
            config,
            seq_len,
            rope_scaling=rope_scaling,
            compress_pos_emb=compress_pos_emb,
            alpha_value=alpha_value,
            rope_theta=rope_theta,
            source=source,
        )
    if rope_scaling != AUTO:
        raise ConfigError(f"rope_scaling must be an object, {AUTO!r} or None, got {rope_scaling!r:.80}")
    if compress_pos_emb is not None or alpha_value is not None:
        raise ConfigError(
            f"rope_scaling={AUTO!r} chooses the scaling itself, so it does not go together with compress_pos_emb or "
            "alpha_value: give one or the other"
        )
    rope = resolve_automatically(config, seq_len, rope_theta, source)
    logger.info("%s; overrule it with rope_scaling, compress_pos_emb or alpha_value", rope.describe())
    return rope
