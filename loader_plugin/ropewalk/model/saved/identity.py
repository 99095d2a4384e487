"""Which model keys and values belong to: the facts that decide their bits, and how two sets of facts differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ropewalk.base.json import shown
from ropewalk.config.model import ModelConfig
from ropewalk.config.quantisation import QuantConfig
from ropewalk.families.family import Scales

if TYPE_CHECKING:
    from ropewalk.model.model import Model

ARCHITECTURE = (
    *("family", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    "vocab_size",
)
FLAGS = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")  # always written; others where a model has them

Facts = Mapping[str, Any]  # JSON values


def model_facts(model: Model) -> dict[str, Any]:
    """What must be equal for equal tokens to give equal keys and values, apart from RoPE and adapters.

    The weights of the second model count if the layer order uses them.
    """
    config, weights = model.config, model.weights
    facts: dict[str, Any] = {name: getattr(config, name) for name in ARCHITECTURE}
    facts["rms_norm_eps"] = config.norm_eps
    facts["sliding_windows"] = _distinct(config.sliding_windows)
    facts |= {name: name in config.flags for name in (*FLAGS, *sorted(config.flags))}
    facts |= _of_some_families(config)
    facts["quantisation"] = _quantisation(model.quant)
    facts["weights"] = weights.fingerprint
    facts["second model"] = weights.second_fingerprint if model.layer_order.uses_second else None
    facts["layer order"] = str(model.layer_order)
    facts["arithmetic"] = model.backend.arithmetic
    facts["cache type"] = model.cache_type
    facts["page layout"] = model.store.layout
    return facts


def differences(theirs: Facts, ours: Facts) -> list[str]:
    """Each fact that differs, with what was found in the file and what this model has."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [
        f"{name}: {shown(theirs.get(name))} in the file, {shown(ours.get(name))} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


def _of_some_families(config: ModelConfig) -> Facts:
    """What a config.json decides only in some families; left out where it is as in all others."""
    scales = asdict(config.scales)
    plain = asdict(Scales(attention=config.head_dim**-0.5))
    facts = {f"scale of {name}": scales[name] for name in scales if scales[name] != plain[name]}
    if config.activation is not config.table.activation:
        facts["activation"] = config.activation.value
    if config.sliding_theta is not None:
        facts["theta of layers with a window"] = config.sliding_theta
    if len(set(config.layer_kinds)) > 1:
        facts["layer kinds"] = list(config.layer_kinds)
    return facts


def _distinct(windows: tuple[int | None, ...]) -> list[list[Any]] | int | None:
    """One window if all layers have the same, else runs of [window, number of layers]."""
    runs: list[list[Any]] = []
    for window in windows:
        if runs and runs[-1][0] == window:
            runs[-1][1] += 1
        else:
            runs.append([window, 1])
    return runs[0][0] if len(runs) == 1 else runs


def _quantisation(quant: QuantConfig | None) -> str | None:
    """How codes become weights: the settings, and a digest of the rules for single modules."""
    if quant is None:
        return None
    settings = asdict(quant.default)
    text = " ".join(f"{name}={value}" for name, value in settings.items())
    if not quant.rules:
        return text
    rules = "\n".join(f"{rule.pattern.pattern}: {rule.settings}" for rule in quant.rules)
    return f"{text} rules={sha256(rules.encode()).hexdigest()[:16]}"
