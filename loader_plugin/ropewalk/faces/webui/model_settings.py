"""From a model folder to the values of the fields, and from values back to the arguments that load the model.

    config.json -> declared_settings -> fields -> (a person, a flag, the API) -> load_options -> hf.from_pretrained

What config.json declares is only shown in the fields. A field that was not changed overrides nothing: a scaling may
have more parameters than the fields can show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropewalk.base.choices import AUTO, SPECULATION
from ropewalk.base.errors import ConfigError, RopewalkError
from ropewalk.base.memory import parse_bytes
from ropewalk.faces.webui.parameters import FROM_CONFIG, NO_MODEL, OFF, ON, PARAMETERS, read_all
from ropewalk.model.info import ModelInfo, model_info
from ropewalk.model.options import LoadOptions
from ropewalk.model.plan import LoadPlan, plan_loading
from ropewalk.rope.methods import LinearNtkScaling, LinearScaling, NoScaling, NtkScaling
from ropewalk.rope.rope import Rope
from ropewalk.rope.spellings import METHODS

Settings = dict[str, int | float | str]

# At most this fills the context field by default. Some models declare 131072 positions; few machines have the memory.
MAX_FILLED_CONTEXT = 32768
# Fields round what they show: to two decimals, and the base to an integer.
ROUNDING = 0.005 + 1e-9


def declared_settings(folder: Path) -> Settings:
    """The value of every field for this model, as its files declare it.

    Raises:
        RopewalkError: what `load_model` would refuse before it reads tensors.
    """
    plan = _plan(folder)
    settings: Settings = {item.name: item.default for item in PARAMETERS}
    settings["ctx_size"] = min(plan.max_seq_len, MAX_FILLED_CONTEXT)
    settings["layer_order"] = "" if plan.order.is_plain(plan.config.num_layers) else str(plan.order)
    return settings | _rope_fields(plan.rope)


def load_options(folder: Path, values: Mapping[str, Any]) -> LoadOptions:
    """The options of loading for these values of the fields.

    An absent or empty value means: as the model declares.

    Raises:
        ConfigError: a value is of the wrong type, or contradicts another. Others as `declared_settings`.
    """
    plan, declared = _plan(folder), declared_settings(folder)
    chosen = declared | read_all(values)
    options: dict[str, Any] = {
        item.option: chosen[item.name]
        for item in PARAMETERS
        if item.option is not None and chosen[item.name] != item.unset
    }
    if chosen["layer_order"] == declared["layer_order"]:
        options.pop("layer_order", None)  # config.json has it, or it is each layer once
    if chosen["gpu_layers"] >= len(plan.order):
        options.pop("gpu_layers", None)  # all of them: some versions of the web UI fill the field with 256
    if chosen["cache_memory"]:
        options["cache_memory"] = _memory(str(chosen["cache_memory"]))
    options["max_seq_len"] = chosen["ctx_size"] or declared["ctx_size"]
    return LoadOptions(**options, **_rope_options(chosen, declared, plan))


def speculation(values: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(who guesses ahead, the name of the draft model), each None if there is none.

    Raises:
        ConfigError: a value is not one of the choices, or one contradicts the other.
    """
    chosen = read_all(values)
    kind = chosen.get("speculation", SPECULATION.default)
    draft = chosen.get("model_draft", NO_MODEL)
    named = None if draft == NO_MODEL else str(draft)
    if kind == "draft" and named is None:
        raise ConfigError("speculation=draft needs a model_draft: the name of a smaller model with the same tokenizer")
    if kind == "ngram" and named is not None:
        raise ConfigError(f"model_draft={named} has no effect with speculation=ngram: leave one of them out")
    if named is not None:
        kind = "draft"
    return (None if kind == SPECULATION.default else str(kind)), named


def context_shift(values: Mapping[str, Any]) -> bool:
    """Whether prompts that lack a stretch are shifted instead of read again.

    Raises:
        ConfigError: a value is not one of the choices.
    """
    return read_all(values).get("context_shift", OFF) == ON


def describe(folder: Path, values: Mapping[str, Any]) -> ModelInfo:
    """Facts about the model as it would be loaded with these values. Checks all that can be checked without weights.

    Raises:
        RopewalkError: what loading would refuse before it reads weights.
    """
    return model_info(folder, options=load_options(folder, values))


def refusal(folder: Path) -> RopewalkError | None:
    """Why this package cannot load a model folder with any settings; None if it can, as far as its headers tell."""
    try:
        describe(folder, {})
    except RopewalkError as error:
        return error
    return None


def multiplied_scalings(options: LoadOptions) -> str | None:
    """A warning if both compress_pos_emb and alpha_value are set; None otherwise."""
    factor, alpha = options.compress_pos_emb or 1.0, options.alpha_value or 1.0
    if factor == 1 or alpha == 1:
        return None
    return (
        f"compress_pos_emb={factor:g} and alpha_value={alpha:g} are both set, and they multiply: together they reach "
        f"for {factor * alpha:g} times the original context. Set one of them to 1 unless that is meant"
    )


def _memory(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"cache_memory: {error}") from error


def _plan(folder: Path) -> LoadPlan:
    return plan_loading(folder)


def _rope_fields(rope: Rope) -> Settings:
    method = rope.method
    fields: Settings = {"rope_freq_base": round(rope.theta)}
    if isinstance(method, NoScaling):
        return fields
    if isinstance(method, LinearScaling):
        return fields | {"compress_pos_emb": method.factor}
    if isinstance(method, NtkScaling):
        return fields | {"alpha_value": method.alpha}
    if isinstance(method, LinearNtkScaling):
        return fields | {"compress_pos_emb": method.factor, "alpha_value": method.alpha}
    if method.name in METHODS:
        fields["rope_method"] = method.name
    factor = getattr(method, "factor", None)  # jquesnelle's dynamic methods have none: it follows the length
    return fields if factor is None else fields | {"rope_factor": factor}


def _rope_options(chosen: Settings, declared: Settings, plan: LoadPlan) -> dict[str, Any]:
    """Arguments for the fields that differ from what config.json declares; if one of the two knobs does, both."""
    options: dict[str, Any] = {}
    if chosen["rope_freq_base"] and not _same(chosen, declared, "rope_freq_base", 0.5):
        options["rope_theta"] = float(chosen["rope_freq_base"])
    knobs = ("compress_pos_emb", "alpha_value")
    if not all(_same(chosen, declared, name) for name in knobs):
        options |= {name: chosen[name] for name in knobs}
    method = declared["rope_method"] if chosen["rope_method"] == FROM_CONFIG else chosen["rope_method"]
    if method == declared["rope_method"] and _same(chosen, declared, "rope_factor"):
        return options
    if method == AUTO:
        return {name: value for name, value in options.items() if name not in knobs} | {"rope_scaling": AUTO}
    if method == FROM_CONFIG:
        raise ConfigError(f"rope_factor={chosen['rope_factor']:g} needs rope_method to say which scaling it is for")
    own = _declared_scaling(plan) if method == declared["rope_method"] else {"rope_type": method}
    factor = {} if method == "default" else {"factor": chosen["rope_factor"]}
    return options | {"rope_scaling": {**own, **factor}}


def _declared_scaling(plan: LoadPlan) -> dict[str, Any]:
    """The scaling object of config.json, or one for the method that its other keys imply."""
    raw = plan.config.raw
    own = raw.get("rope_scaling") or raw.get("rope_parameters")
    return dict(own) if own else {"rope_type": plan.rope.method.name}


def _same(chosen: Settings, declared: Settings, name: str, tolerance: float = ROUNDING) -> bool:
    return math.isclose(float(chosen[name]), float(declared[name]), rel_tol=0.0, abs_tol=tolerance)
