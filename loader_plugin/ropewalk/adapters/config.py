"""adapter_config.json of a PEFT folder: which modules a LoRA changes, with which rank, and by which factor.

    scale = alpha / r        rank-stabilised: alpha / sqrt(r)  (Kalajdzievski 2023, arXiv:2312.03732)

Whatever changes the arithmetic and is not implemented is refused by name: an adapter never runs in part.
`fan_in_fan_out` is not read: it describes base weights that an adapter is merged into, never A and B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.base.errors import CheckpointError, ConfigError, UnsupportedError
from ropewalk.base.json import Section, read_json_object, require_folder, shown
from ropewalk.base.limits import MAX_RANK
from ropewalk.config.settings import require_quick_pattern

CONFIG_NAME = "adapter_config.json"
MAX_ALPHA = 1e9
ALL_LINEAR = "all-linear"
# Ways to start training that leave the weights of the base model as they are. The others (pissa, olora, loftq, ...)
# subtract something from them, so the adapter alone does not say what the model computes.
HARMLESS_STARTS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal")
NOT_IMPLEMENTED = {
    "use_dora": "DoRA (weight-decomposed LoRA)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "lora_ga_config": "LoRA-GA",
    "layer_replication": "layer replication",
    "target_parameters": "adapters of single parameters",
    "trainable_token_indices": "trainable tokens",
}


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules that an adapter names: by full names or their last parts, or by one expression for the full name."""

    names: tuple[str, ...] = ()
    expression: re.Pattern[str] | None = None

    def match(self, module: str) -> bool:
        """True if the module is named, or its full name matches."""
        if self.expression is not None:
            return self.expression.fullmatch(module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.names)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The settings of one adapter. targets None: the modules are those in the file of tensors."""

    source: str
    rank: int
    alpha: float
    rank_stabilised: bool
    targets: Targets | None
    excluded: Targets
    layers: tuple[int, ...] | None
    layer_patterns: tuple[re.Pattern[str], ...]
    ranks: tuple[tuple[re.Pattern[str], float], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    saved_modules: tuple[str, ...]
    ties_embeddings: bool
    rope_scaling: Mapping[str, Any] | None

    def changes(self, module: str) -> bool:
        """True if the adapter has low-rank matrices for this module (as PEFT decides)."""
        if self.saves(module) or self.excluded.match(module):
            return False
        if self.targets is None:
            return True
        if not self.targets.match(module):
            return False
        # PEFT takes layer numbers into account only where modules are given as a list.
        if self.layers is None or self.targets.expression is not None:
            return True
        matches = (pattern.match(module) for pattern in self.layer_patterns)
        index = next((int(match["index"]) for match in matches if match), None)
        return index in self.layers

    def saves(self, module: str) -> bool:
        """True if the adapter replaces the whole table of this module."""
        return any(module == name or module.endswith(f".{name}") for name in self.saved_modules)

    def rank_of(self, module: str) -> int:
        """r of this module: by `rank_pattern`, else `r`."""
        return int(_by_pattern(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of the product of the two matrices."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


def read_lora_config(folder: Path) -> LoraConfig:
    """The settings in `folder`.

    Raises:
        CheckpointError: there is no adapter_config.json. ConfigError: no such folder; a key of a wrong type or out of
            range.
        UnsupportedError: not a LoRA, or a variant of LoRA that is not implemented.
    """
    require_folder(folder, "a PEFT adapter (adapter_config.json and its weights)", "adapter folder")
    path = folder / CONFIG_NAME
    if not path.exists():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}: give the folder of a PEFT adapter")
    section = Section(str(path), read_json_object(path))
    _refuse_other_kinds(section)
    patterns = _strings(section, "layers_pattern")
    layers = section.values.get("layers_to_transform")
    return LoraConfig(
        source=section.source,
        rank=section.integer("r", 1, MAX_RANK),
        alpha=section.number("lora_alpha", -MAX_ALPHA, MAX_ALPHA),
        rank_stabilised=section.boolean("use_rslora", False),
        targets=_targets(section, "target_modules"),
        excluded=_targets(section, "exclude_modules") or Targets(),
        layers=None if layers is None or layers == [] else _layer_numbers(section, layers),
        layer_patterns=_layer_patterns(section, patterns),
        ranks=_patterns(section, "rank_pattern", 1, MAX_RANK),
        alphas=_patterns(section, "alpha_pattern", -MAX_ALPHA, MAX_ALPHA),
        saved_modules=_strings(section, "modules_to_save"),
        ties_embeddings=section.boolean("ensure_weight_tying", False),
        rope_scaling=None if section.section("rope_scaling") is None else section.values["rope_scaling"],
    )


def _refuse_other_kinds(section: Section) -> None:
    kind = section.text("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f'{section.source}: peft_type must be "LORA", found {shown(kind)}')
    for key, meaning in NOT_IMPLEMENTED.items():
        if section.values.get(key):
            raise UnsupportedError(
                f"{section.source}: {key} is set: {meaning} is not implemented, plain and rank-stabilised LoRA are; "
                "merge the adapter into its model with PEFT and quantise the result"
            )
    start = section.values.get("init_lora_weights")
    if not isinstance(start, (bool, str, type(None))) or (start.lower() if isinstance(start, str) else start) not in (
        HARMLESS_STARTS
    ):
        raise UnsupportedError(
            f"{section.source}: init_lora_weights is {shown(start)}, which changes the weights of the base model too: "
            "convert the adapter to a plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )


def _targets(section: Section, key: str) -> Targets | None:
    """None if absent, "all-linear", or an expression that could take long on a name: then the tensors alone decide."""
    value = section.values.get(key)
    if value is None or value == ALL_LINEAR:
        return None
    if not isinstance(value, str):
        return Targets(names=_strings(section, key))
    expression = _expression(section, key, value)
    try:
        require_quick_pattern(value)
    except ValueError:
        return None
    return Targets(expression=expression)


def _strings(section: Section, key: str) -> tuple[str, ...]:
    value = section.values.get(key)
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,) if value else ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise section.error(key, "a list of module names")
    return tuple(value)


def _layer_numbers(section: Section, layers: object) -> tuple[int, ...]:
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise section.error("layers_to_transform", "a layer number or a list of them")
    return tuple(numbers)


def _layer_patterns(section: Section, names: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Expressions that find the number of the layer in the name of a module."""
    if not names:
        return (re.compile(r".*?\.[^.]*\.(?P<index>[0-9]+)\."),)
    found = []
    for name in names:
        _require_quick(section, "layers_pattern", name)
        found.append(_expression(section, "layers_pattern", rf"(?:^|.*?\.){name}\.(?P<index>[0-9]+)\."))
    return tuple(found)


def _patterns(section: Section, key: str, low: float, high: float) -> tuple[tuple[re.Pattern[str], float], ...]:
    """Expressions for the end of a name, each with its number; the first that matches counts."""
    rules = section.section(key)
    found = []
    for name in rules.values if rules is not None else ():
        _require_quick(section, key, name)
        value = rules.integer(name, int(low), int(high)) if key == "rank_pattern" else rules.number(name, low, high)
        found.append((_expression(section, key, rf"(?:.*\.)?(?:{name})\Z"), value))
    return tuple(found)


def _require_quick(section: Section, key: str, source: str) -> None:
    try:
        require_quick_pattern(source)
    except ValueError as error:
        raise ConfigError(f"{section.source}: {key}: {source!r:.120} cannot be used ({error})") from error


def _expression(section: Section, key: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(source)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{section.source}: {key}: {source!r:.120} is not a regular expression that can be used ({error})"
        ) from error


def _by_pattern(rules: tuple[tuple[re.Pattern[str], float], ...], module: str, default: float) -> float:
    return next((value for pattern, value in rules if pattern.match(module)), default)


def find_adapter(model_folder: Path, given: str) -> Path | None:
    """`given` as a folder, else the adapter of that name that comes with the model; None if neither exists."""
    beside_the_model = model_folder / "adapters" / given
    return next((folder for folder in (Path(given), beside_the_model) if folder.is_dir()), None)


def rope_of_adapters(folders: Iterable[Path]) -> Mapping[str, Any] | None:
    """The RoPE scaling that the adapters declare (`rope_scaling` of adapter_config.json); None if they declare none.

    Raises:
        ConfigError: two declare different ones, or one of them is wrong. Others as `read_lora_config`.
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
