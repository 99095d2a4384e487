"""The settings of our loader in the web UI. Flags, fields, API arguments and yaml keys all follow from this table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.base.choices import AUTO, BACKEND, CACHE_TYPE, COMPUTE, HEAD_BITS, MAX_INPUT_LEN, SPECULATION
from ropewalk.base.errors import ConfigError
from ropewalk.rope.spellings import METHODS

LOADER = "ropewalk"
MAX_CONTEXT = 1 << 20
FROM_CONFIG = "config"
OFF, ON = "off", "on"
NO_MODEL = "None"  # as the web UI's own lists of models say it
ALL_LAYERS = -1


@dataclass(frozen=True, slots=True)
class Slider:
    """A number between two ends."""

    low: float
    high: float
    step: float


@dataclass(frozen=True, slots=True)
class Number:
    """A whole number whose range is too wide for a slider."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several words. is_open: or another one, which whoever takes it checks."""

    choices: tuple[str, ...]
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One setting.

    name: of the flag, the API argument, the yaml key and the field. former_names: the names of the web UI's own setting
    of this kind in older versions, where that setting is used. option: the argument of `ropewalk.hf.from_pretrained`
    that takes the value as it is; None where several settings become one (RoPE), or a value means something to be
    looked up. unset: the value that leaves the choice to ropewalk.
    """

    name: str
    default: int | float | str
    widget: Slider | Number | Choice | Text
    info: str
    option: str | None = None
    unset: int | float | str | None = None
    former_names: tuple[str, ...] = ()

    def read(self, value: Any) -> int | float | str:
        """The value of this setting from what a flag, a field, the API or a yaml file gives.

        Raises:
            ConfigError: not a number where one is needed, or not one of the choices.
        """
        kind = type(self.default)
        try:
            if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
                raise ValueError
            read = kind(float(value)) if kind is not str else str(value).strip()
            if kind is float and not math.isfinite(read):
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            needed = {int: "a whole number", float: "a number", str: "text"}[kind]
            raise ConfigError(f"{self.name} must be {needed}, got {value!r:.80}") from error
        widget = self.widget
        if isinstance(widget, Choice) and not widget.is_open and read not in widget.choices:
            raise ConfigError(f"{self.name} must be one of {', '.join(widget.choices)}, got {value!r:.80}")
        return read


PARAMETERS = (
    Parameter(
        "ctx_size",
        0,
        Slider(0, MAX_CONTEXT, 256),
        "Context length in tokens. 0: what config.json declares.",
        option="max_seq_len",
        unset=0,
        former_names=("max_seq_len",),
    ),
    Parameter(
        "cache_type",
        CACHE_TYPE.default,
        Choice(CACHE_TYPE.values, CACHE_TYPE.is_open),
        f"Type of cached keys and values. {CACHE_TYPE.help}.",
        option="cache_type",
    ),
    Parameter(
        "compress_pos_emb",
        1.0,
        Slider(1, 64, 0.05),
        "Linear RoPE scaling: context / original context (SuperHOT). 1: none.",
    ),
    Parameter(
        "alpha_value",
        1.0,
        Slider(1, 64, 0.05),
        "NTK-aware RoPE scaling: about 1.75 for 1.5 times the context, 2.5 for twice. 1: none.",
    ),
    Parameter(
        "rope_freq_base",
        0,
        Number(),
        "Base (theta) of the rotary frequencies. 0: from config.json.",
    ),
    Parameter(
        "rope_method",
        FROM_CONFIG,
        Choice((FROM_CONFIG, AUTO, *METHODS)),
        f"RoPE scaling by name, in place of compress_pos_emb and alpha_value. {FROM_CONFIG}: as config.json says; "
        f"{AUTO}: chosen for the context length.",
    ),
    Parameter(
        "rope_factor",
        1.0,
        Slider(1, 64, 0.05),
        "Factor of that RoPE scaling: context / original context.",
    ),
    Parameter(
        "chunk_size",
        MAX_INPUT_LEN,
        Slider(64, 16384, 64),
        "Tokens of a long prompt that are computed at once. Bounds memory, never changes results.",
        option="max_input_len",
    ),
    Parameter(
        "compute_mode",
        COMPUTE.default,
        Choice(COMPUTE.values),
        f"Arithmetic of the linear layers. {COMPUTE.help}.",
        option="compute",
    ),
    Parameter(
        "head_bits",
        HEAD_BITS.default,
        Choice(HEAD_BITS.values),
        f"A head that is stored in floats. {HEAD_BITS.help}.",
        option="head_bits",
    ),
    Parameter(
        "backend",
        BACKEND.default,
        Choice(BACKEND.values),
        f"What runs the layers. {BACKEND.help}.",
        option="backend",
    ),
    Parameter(
        "gpu_layers",
        ALL_LAYERS,
        Number(),
        f"Layers on the GPU, the others on the CPU. {ALL_LAYERS}: all, where there is a GPU.",
        option="gpu_layers",
        unset=ALL_LAYERS,
    ),
    Parameter(
        "gpu_split",
        "",
        Text(),
        "GiB of weights for each card, such as 10,20. Empty: one card.",
        option="gpu_split",
        unset="",
    ),
    Parameter(
        "threads",
        0,
        Slider(0, 256, 1),
        "0: all cores.",
        option="threads",
        unset=0,
    ),
    Parameter(
        "layer_order",
        "",
        Text(),
        "Layers to run, such as 0-15,8-23,16-31 or 0-9,10*4@0.25,11-31. Empty: each once.",
        option="layer_order",
        unset="",
    ),
    Parameter(
        "cache_memory",
        "",
        Text(),
        "Memory for cached keys and values, such as 4GiB. Empty: half of what is free, within a sensible bound.",
    ),
    Parameter(
        "speculation",
        SPECULATION.default,
        Choice(SPECULATION.values),
        f"Guessing tokens ahead; the text is the same. {SPECULATION.help}.",
    ),
    Parameter(
        "context_shift",
        OFF,
        Choice((OFF, ON)),
        "When the web UI drops the oldest messages of a full context: on moves the rest down without reading it again.",
    ),
    Parameter(
        "model_draft",
        NO_MODEL,
        Text(),
        f"The smaller model that guesses, with the same tokenizer; it needs no other setting. {NO_MODEL}: nobody.",
    ),
)
# Settings of the web UI that matter to our loader as well (for the tokenizer); shown if a version has them.
BORROWED = ("no_use_fast",)


def name_here(parameter: Parameter, known: Iterable[str]) -> str:
    """The name of this setting in a version of the web UI that has the settings `known`."""
    known = set(known)
    return next((name for name in (parameter.name, *parameter.former_names) if name in known), parameter.name)


def read_all(values: Mapping[str, Any]) -> dict[str, int | float | str]:
    """The settings in a mapping that uses the names of any version, by our own names; empty values are left out.

    Raises:
        ConfigError: a value is of the wrong type or not one of the choices.
    """
    given = {item: values.get(name_here(item, values)) for item in PARAMETERS}
    return {item.name: item.read(value) for item, value in given.items() if value not in (None, "")}
