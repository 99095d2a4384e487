"""What a compressed-tensors `quantization_config` declares (llm-compressor's files, "W4A16" and "W8A16").

    {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128, ...}}},
     "ignore": ["lm_head", "re:.*gate$"]}

Only packed integer weights with plain activations are read; everything else is refused by the key that says so. Of
several groups whose targets match a module, a full name counts before a "re:" pattern, and that before the class
"Linear"; what `ignore` names is dense. Source: compressed-tensors 0.12.2, `quant_args.py` and `match.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.base.json import Section, shown
from ropewalk.config.foreign import REQUANTISE, foreign_format
from ropewalk.config.settings import (
    MAX_GROUP_SIZE,
    QuantConfig,
    QuantRule,
    QuantSettings,
    quick_pattern,
)

METHOD = "compressed-tensors"
OLD_METHOD = "sparseml"  # what the files of early 2024 say
PACKED = "pack-quantized"
BITS = (2, 4, 8)  # whose codes lie as GPTQ's do; others are padded to whole words
EVERY_LINEAR = "Linear"  # the class that all quantised modules are of
# actorder: with "group" the groups of the columns are stored, with "weight" the columns were quantised in another order
# and lie as ever. The second names are aliases.
ACT_ORDERS = {"group": True, "dynamic": True, "weight": False, "static": False}


def is_compressed_tensors(declaration: Section) -> bool:
    """True if this object is for the function below: by its method, or by its groups where it names none."""
    method = declaration.values.get("quant_method")
    if method is None:
        return "config_groups" in declaration.values
    known = isinstance(method, str) and method.strip().lower() in (METHOD, OLD_METHOD)
    return known and "config_groups" in declaration.values


def parse_compressed_tensors(declaration: Section) -> QuantConfig:
    """The settings that the object declares.

    Raises:
        ConfigError: a missing or ill-typed key, or a pattern that cannot be used.
        UnsupportedError: another format, quantised activations or cache, transforms, other types or widths.
    """
    _refuse_other_formats(declaration)
    groups = declaration.section("config_groups")
    if groups is None or not groups.values:
        raise declaration.error("config_groups", "an object with at least one group")
    by_target: dict[str, QuantSettings | None] = {}
    for name in groups.values:
        group = groups.section(name)
        if group is None:
            raise groups.error(name, "an object")
        settings = _group_settings(group)
        for target in _names(group, "targets"):
            by_target.setdefault(target, settings)
    default = next((settings for settings in by_target.values() if settings is not None), None)
    if default is None:
        raise ConfigError(f"{declaration.source}: {declaration.name('config_groups')} quantises no weights")
    rules = [QuantRule(_pattern(declaration, "ignore", name), None) for name in _names(declaration, "ignore")]
    for target in sorted(by_target, key=lambda target: (target.startswith("re:"), target)):
        if target != EVERY_LINEAR:
            rules.append(QuantRule(_pattern(groups, "targets", target), by_target[target]))
    if EVERY_LINEAR not in by_target:
        rules.append(QuantRule(re.compile(""), None))  # no group speaks of the other modules
    return QuantConfig(
        source=declaration.source,
        default=by_target.get(EVERY_LINEAR) or default,
        rules=tuple(rules),
        lm_head=True,  # a linear like the others, unless it is ignored
        model_file_base_name=None,
        declared=True,
    )


def _refuse_other_formats(declaration: Section) -> None:
    """Whatever changes what the stored numbers mean, or what is computed with them."""
    declared = declaration.text("format")
    if declared is None:
        raise declaration.error("format", PACKED)
    if declared != PACKED:
        raise _refusal(declaration, "format", PACKED)
    status = declaration.text("quantization_status")
    if status not in (None, "compressed"):
        raise _refusal(declaration, "quantization_status", "compressed")
    for key in ("kv_cache_scheme", "transform_config"):
        if declaration.has(key) and declaration.values[key] != {}:
            raise _refusal(declaration, key, "null")
    sparsity = declaration.section("sparsity_config")
    if sparsity is not None and sparsity.text("format") not in (None, "dense"):
        raise _refusal(sparsity, "format", "dense")


def _group_settings(group: Section) -> QuantSettings | None:
    """How the weights of one group are stored; None: as they are."""
    for key in ("input_activations", "output_activations"):
        if group.has(key):
            raise _refusal(group, key, "null (weights alone are quantised)")
    if group.text("format") not in (None, PACKED):
        raise _refusal(group, "format", PACKED)
    weights = group.section("weights")
    if weights is None:
        return None
    if (weights.text("type") or "int").lower() != "int":
        raise _refusal(weights, "type", "int")
    if weights.values.get("dynamic") not in (None, False):
        raise _refusal(weights, "dynamic", "false")
    bits = weights.optional_integer("num_bits", 1, 32, 8)
    if bits not in BITS:
        raise _refusal(weights, "num_bits", ", ".join(map(str, BITS)))
    size = weights.optional_integer("group_size", -1, MAX_GROUP_SIZE, None)
    return QuantSettings(
        bits=bits,
        group_size=_checked_group_size(weights, size),
        desc_act=_act_order(weights),
        sym=weights.boolean("symmetric", True),
        format=PACKED,
        word_borrow=False,
    )


def _checked_group_size(weights: Section, size: int | None) -> int:
    """Rows per group, or -1; the strategy follows from the size where it is absent, as in the library."""
    inferred = "tensor" if size is None else "group" if size > 0 else "channel"
    strategy = (weights.text("strategy") or inferred).lower()
    if strategy == "channel":
        if size is not None and size > 0:
            raise weights.error("group_size", "null with strategy channel (one scale for each output)")
        return -1
    if strategy != "group":
        if weights.has("strategy"):
            raise _refusal(weights, "strategy", "group or channel")
        raise weights.error("group_size", "a number of columns, or -1 (one scale for each output)")
    if size is None or size < 1:
        raise weights.error("group_size", "a number of columns with strategy group")
    return size


def _act_order(weights: Section) -> bool:
    """True if the groups of the columns are stored."""
    value = weights.values.get("actorder")
    if value is None or isinstance(value, bool):
        return bool(value)
    if not isinstance(value, str) or value.lower() not in ACT_ORDERS:
        raise weights.error("actorder", f"null or one of {', '.join(ACT_ORDERS)}")
    return ACT_ORDERS[value.lower()]


def _names(section: Section, key: str) -> list[str]:
    """A list of names and patterns; an absent `ignore` is empty."""
    values = section.values.get(key)
    if values is None and key == "ignore":
        return []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise section.error(key, 'a list of module names, classes or "re:" patterns')
    return values


def _pattern(section: Section, key: str, name: str) -> re.Pattern[str]:
    """What matches a module's name from its start: a pattern of its own, or exactly this name."""
    if not name.startswith("re:"):
        return re.compile(re.escape(name) + r"\Z")
    return quick_pattern(name.removeprefix("re:"), section.source, f"{section.name(key)} {shown(name)}")


def _refusal(section: Section, key: str, accepted: str) -> UnsupportedError:
    value: Any = section.values.get(key)
    known = None if isinstance(value, Mapping) else foreign_format(value)
    what = f" ({known.title})" if known is not None else ""
    advice = known.advice if known is not None else f"vLLM runs such models; here, {REQUANTISE}"
    return UnsupportedError(
        f"{section.source}: {section.name(key)} {shown(value)}{what} is not supported for {METHOD}; "
        f"accepted is {accepted}: {advice}"
    )
