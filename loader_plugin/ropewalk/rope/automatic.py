"""rope_scaling="auto": which method and factor for a context that the checkpoint does not cover.

The rule, first match:

1. what config.json declares covers the length, or follows it (dynamic, longrope): as declared;
2. it declares YaRN, NTK-by-parts, NTK or llama3, for less: the same method with a larger factor;
3. it declares linear scaling, for less: its factor, with NTK-aware scaling on top, since a model that was trained for
   one linear factor does worse with another (exllama pull request 118: perplexity 53 instead of 5.8);
4. it declares nothing: NTK-by-parts by the length over the original one, the method that costs an untrained model least
   (docs/context-extension.md, "The automatic choice", has the measurements).

A trained adapter's declaration comes before 2: whoever loads one gives it in place of "auto" (`covered_without`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ropewalk.rope.methods import LinearNtkScaling, LinearScaling, Llama3Scaling, NoScaling, NtkScaling
from ropewalk.rope.methods import NtkByPartsScaling as ByParts
from ropewalk.rope.methods import YarnScaling as Yarn
from ropewalk.rope.rope import Rope, resolve_rope

ORIGINAL = "original_max_position_embeddings"


def choose_scaling(declared: Rope, seq_len: int | None) -> tuple[dict[str, Any], str]:
    """(arguments for `resolve_rope` in place of what is declared, none to leave that as it is; the reason)."""
    if seq_len is None or declared.covers is None or seq_len <= declared.covers:
        covered = "adapts to any length" if declared.covers is None else f"covers {declared.covers} positions"
        return {}, f"what the checkpoint declares {covered}"
    method, original = declared.method, declared.original_length
    factor = math.ceil(100 * seq_len / original) / 100
    reason = f"{seq_len} positions are asked for, and the checkpoint's {method.name} covers {declared.covers}"
    if isinstance(method, (ByParts, Yarn)):
        kept = {"attention_factor": method.attention_factor} if isinstance(method, Yarn) else {}
        kept = {name: value for name, value in kept.items() if value is not None}
        return _object(method.name, factor, original, **kept), f"{reason}: the same method, by a larger factor"
    if isinstance(method, NtkScaling):
        alpha = method.alpha * seq_len / declared.covers
        return {"alpha_value": math.ceil(100 * alpha) / 100}, f"{reason}: a larger alpha"
    if isinstance(method, Llama3Scaling):
        larger = method.factor * seq_len / declared.covers
        ramp = {"low_freq_factor": method.low_freq_factor, "high_freq_factor": method.high_freq_factor}
        return _object("llama3", larger, method.original, **ramp), f"{reason}: the same method, by a larger factor"
    if isinstance(method, (LinearScaling, LinearNtkScaling)):
        alpha = math.ceil(100 * factor / method.factor) / 100
        return {"compress_pos_emb": method.factor, "alpha_value": alpha}, f"{reason}: its factor, and NTK-aware on top"
    if isinstance(method, NoScaling):
        return _object("ntk-by-parts", factor, original), (
            f"{seq_len} positions are asked for, and the checkpoint covers {declared.covers}: the method that costs an "
            "untrained model least"
        )
    return {}, f"{reason}; no way to extend it is known"


def resolve_automatically(config: Mapping[str, Any], seq_len: int | None, theta: float | None, source: str) -> Rope:
    """As `resolve_rope`, with what the rule chooses; `decided_by` says what and why.

    Raises:
        ConfigError, UnsupportedError: as `resolve_rope`.
    """
    declared = resolve_rope(config, rope_theta=theta, source=source)
    given, reason = choose_scaling(declared, seq_len)
    return resolve_rope(config, seq_len, rope_theta=theta, source=source, **given, why=f"rope_scaling=auto ({reason})")


def covered_without(config: Mapping[str, Any], seq_len: int | None, source: str) -> bool:
    """Whether what config.json declares is enough for the length, so that an adapter's scaling is not needed."""
    declared = resolve_rope(config, source=source)
    return seq_len is not None and (declared.covers is None or seq_len <= declared.covers)


def _object(name: str, factor: float, original: int, **rest: float) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": name, "factor": factor, ORIGINAL: original, **rest}}
