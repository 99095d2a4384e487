"""The settings of loading that people know from other loaders: one table of fields, and what they mean for load_model.

    checkpoint -> values shown -> values as changed by a person -> LoadOptions: only what differs

Every field of the page is text; a wrong value raises a FieldError that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropewalk.base.choices import AUTO, BACKEND, CACHE_TYPE, COMPUTE, HEAD_BITS, MAX_INPUT_LEN, SPECULATION
from ropewalk.base.errors import ConfigError, RopewalkError
from ropewalk.base.limits import MAX_LAYERS, MAX_SEQ_LEN, MAX_THREADS
from ropewalk.base.memory import parse_bytes
from ropewalk.config.cache_format import CacheFormat
from ropewalk.config.model import load_model_config
from ropewalk.files.embedded import EMBEDDED_CONTEXT
from ropewalk.model.options import LoadOptions, parse_split
from ropewalk.model.plan import plan_loading
from ropewalk.rope.spellings import BY_FACTOR, FOLLOWING_THE_LENGTH

AS_CHECKPOINT = "checkpoint's own"
ROPE_METHODS = ("default", *BY_FACTOR, *FOLLOWING_THE_LENGTH)


class FieldError(RopewalkError, ValueError):
    """A value that a person typed is wrong; `field` is its name in `LoadSettings`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """The values in the fields of the model bar. None: the field is empty, and the default is taken."""

    max_seq_len: int | None = None
    compress_pos_emb: float | None = None
    alpha_value: float | None = None
    rope_method: str = AS_CHECKPOINT
    rope_factor: float | None = None
    cache_type: str = CACHE_TYPE.default
    max_input_len: int | None = MAX_INPUT_LEN
    threads: int | None = None
    compute: str = COMPUTE.default
    head_bits: str = HEAD_BITS.default
    backend: str = BACKEND.default
    gpu_layers: int | None = None
    gpu_split: str = ""
    layer_order: str = ""
    second_folder: str = ""
    cache_memory: str = ""
    speculation: str = SPECULATION.default
    draft_model: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """How a setting is shown. choices: a list to pick from; None: a field to type in. placeholder: what an empty one
    means. is_open: what is not in the list can be typed in."""

    name: str
    label: str
    info: str
    choices: tuple[str, ...] | None = None
    placeholder: str = ""
    is_open: bool = False


FIELDS = (
    Field("max_seq_len", "Context length", "Longest text in tokens, prompt and reply together."),
    Field("compress_pos_emb", "compress_pos_emb", "Divide positions by this: 4 for a model trained with it."),
    Field("alpha_value", "alpha_value", "Stretch an untrained model's context, roughly by this factor."),
    Field(
        "rope_method",
        "RoPE method",
        "How positions are scaled, instead of the checkpoint's way; auto: chosen for the context length.",
        (AS_CHECKPOINT, AUTO, *ROPE_METHODS),
    ),
    Field("rope_factor", "RoPE factor", "How many times the original length it is to reach.", placeholder="none"),
    Field("cache_type", "Cache type", "Of keys and values: " + CACHE_TYPE.help + ".", CACHE_TYPE.values, is_open=True),
    Field("max_input_len", "Chunk size", "Tokens of a prompt read at once: bounds memory, never changes a result."),
    Field("threads", "Threads", "Processor threads to use.", placeholder="all"),
    Field(
        "compute",
        "Compute mode",
        "auto: int8 on a CPU, fp16 on a GPU. exact: slower, nothing is rounded.",
        COMPUTE.values,
    ),
    Field("head_bits", "Head bits", "A head that is stored in floats: " + HEAD_BITS.help + ".", HEAD_BITS.values),
    Field("backend", "Backend", "auto: the GPU if there is one that can be used, else the CPU.", BACKEND.values),
    Field("gpu_layers", "GPU layers", "So many on the GPU, the others on the CPU.", placeholder="all"),
    Field("gpu_split", "GPU split", "GiB of weights for each card, such as 10,20.", placeholder="one card"),
    Field("layer_order", "Layer order", "Such as 0-15,8-23, which repeats layers.", placeholder="as in the files"),
    Field(
        "second_folder",
        "Second model",
        "A model of equal shapes; the order names its layers b:0-9.",
        placeholder="none",
    ),
    Field(
        "cache_memory",
        "Cache memory",
        "For keys and values of all conversations together, such as 4GiB.",
        placeholder="automatic",
    ),
    Field(
        "speculation",
        "Guessing ahead",
        "By what stood in the text before (ngram) or by a smaller model (draft). The text stays the same.",
        SPECULATION.values,
    ),
    Field("draft_model", "Draft model", "A smaller model with the same tokenizer, which guesses.", placeholder="none"),
)


def checkpoint_settings(folder: Path) -> LoadSettings:
    """What the files of a folder ask for.

    Raises:
        ConfigError, UnsupportedError: as `load_model`, for what config.json says.
    """
    rope = plan_loading(folder).rope
    declared = load_model_config(folder).raw.get("layer_order")
    return LoadSettings(
        max_seq_len=rope.default_length,
        compress_pos_emb=getattr(rope.method, "factor", 1.0) if rope.method.name in ("linear", "linear+ntk") else 1.0,
        alpha_value=getattr(rope.method, "alpha", 1.0),
        rope_factor=getattr(rope.method, "factor", None),
        layer_order="" if declared is None else str(declared),
    )


def suggested_settings(folder: Path, is_embedded: bool) -> LoadSettings:
    """What the page starts with: the checkpoint's settings, and for the embedded model a context for conversations."""
    found = checkpoint_settings(folder)
    if not is_embedded:
        return found
    length = int(found.max_seq_len * EMBEDDED_CONTEXT.factor)
    return replace(found, rope_method=EMBEDDED_CONTEXT.method, rope_factor=EMBEDDED_CONTEXT.factor, max_seq_len=length)


def read_settings(values: Mapping[str, Any]) -> LoadSettings:
    """Settings from what the fields hold: text, as it was typed or picked.

    Raises:
        FieldError: a value is not a number, or not a whole one where it must be, or out of range.
    """
    numbers = {
        "max_seq_len": _whole(values, "max_seq_len", 1, MAX_SEQ_LEN),
        "max_input_len": _whole(values, "max_input_len", 1, MAX_SEQ_LEN),
        "threads": _whole(values, "threads", 1, MAX_THREADS),
        "gpu_layers": _whole(values, "gpu_layers", 0, MAX_LAYERS),
        **{name: _number(values, name) for name in ("compress_pos_emb", "alpha_value", "rope_factor")},
    }
    texts = {field.name: str(values.get(field.name) or "").strip() for field in FIELDS if field.name not in numbers}
    for field in FIELDS:
        if field.choices is not None and not field.is_open and texts[field.name] not in field.choices:
            raise FieldError(field.name, f"must be one of {', '.join(field.choices)}, got {texts[field.name]!r:.60}")
    _memory(texts["cache_memory"])
    _cache_type(texts["cache_type"])
    _split(texts["gpu_split"])
    return LoadSettings(**numbers, **texts)


def load_options(settings: LoadSettings, original: LoadSettings) -> LoadOptions:
    """The options of loading. Values equal to those in `original`, the checkpoint's own, are left to the checkpoint.

    Raises:
        FieldError: a factor without a method, or two scalings at once.
    """
    arguments: dict[str, Any] = {
        "cache_type": settings.cache_type,
        "compute": settings.compute,
        "head_bits": settings.head_bits,
        "backend": settings.backend,
        "gpu_layers": settings.gpu_layers,
        "gpu_split": settings.gpu_split or None,
        "max_input_len": settings.max_input_len,
        "threads": settings.threads,
        "cache_memory": _memory(settings.cache_memory),
        **_rope_arguments(settings, original),
    }
    for name in ("max_seq_len", "layer_order", "second_folder"):
        if getattr(settings, name) != getattr(original, name):
            arguments[name] = getattr(settings, name) or None
    return LoadOptions(**{name: value for name, value in arguments.items() if value is not None})


def rescale_arguments(settings: LoadSettings, original: LoadSettings) -> dict[str, Any]:
    """The RoPE among the settings, as arguments of `Engine.rescale`.

    Raises:
        FieldError: as `load_options`.
    """
    arguments = _rope_arguments(settings, original)
    if settings.max_seq_len is not None:
        arguments["max_seq_len"] = settings.max_seq_len
    return arguments


def field_of(message: str) -> str | None:
    """The field that a loading error is about, by the names in its message; None if it names no field."""
    spellings = {"rope_method": ("rope_scaling", "rope_type"), "layer_order": ("layer_order", "layer order")}
    found = [
        (position, field.name)
        for field in FIELDS
        for spelling in spellings.get(field.name, (field.name,))
        if (position := message.find(spelling)) >= 0
    ]
    return min(found)[1] if found else None


def _rope_arguments(settings: LoadSettings, original: LoadSettings) -> dict[str, Any]:
    knobs = {
        name: getattr(settings, name)
        for name in ("compress_pos_emb", "alpha_value")
        if getattr(settings, name) not in (None, getattr(original, name))
    }
    if settings.rope_method == AS_CHECKPOINT:
        if settings.rope_factor not in (None, original.rope_factor):
            raise FieldError("rope_factor", "choose a RoPE method that this factor is for, or empty the field")
        return knobs
    if knobs:
        name = next(iter(knobs))
        raise FieldError(name, f"the RoPE method {settings.rope_method} replaces it: set it back, or choose no method")
    if settings.rope_method == AUTO:
        return {"rope_scaling": AUTO}
    if settings.rope_method == "default":
        return {"rope_scaling": {"rope_type": "default"}}
    if settings.rope_factor is None:
        raise FieldError("rope_factor", f"the RoPE method {settings.rope_method} needs a factor, such as 4")
    return {"rope_scaling": {"rope_type": settings.rope_method, "factor": settings.rope_factor}}


def _memory(text: str) -> int | None:
    try:
        return parse_bytes(text) if text else None
    except ValueError as error:
        raise FieldError("cache_memory", str(error)) from error


def _split(text: str) -> None:
    try:
        if text:
            parse_split(text)
    except ConfigError as error:
        raise FieldError("gpu_split", str(error)) from error


def _cache_type(text: str) -> None:
    try:
        CacheFormat.parse(text)
    except ConfigError as error:
        raise FieldError("cache_type", str(error).removeprefix("cache_type: ")) from error


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise FieldError(name, f"a number is needed, got {value!r:.60}") from error
    if not math.isfinite(number):
        raise FieldError(name, f"a finite number is needed, got {value!r:.60}")
    return number


def _whole(values: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    number = _number(values, name)
    if number is not None and not (number.is_integer() and low <= number <= high):
        raise FieldError(name, f"a whole number from {low} to {high} is needed, got {number:g}")
    return None if number is None else int(number)
