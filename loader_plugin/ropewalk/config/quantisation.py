"""What a model folder declares about its quantisation, from any of the files and spellings in use (docs/formats.md,
"Declarations").

The keys of config.json's `quantization_config` come first (or KoboldAI's `gptq_*` keys in config.json), then those of
quantize_config.json, then of quant_config.json. A key that one file lacks is taken from the next, because old writers
put `checkpoint_format` or `meta` into only one of them; where two files differ, the first wins with a warning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.base.json import Section, read_json_object, shown
from ropewalk.config.compressed_tensors import is_compressed_tensors, parse_compressed_tensors
from ropewalk.config.foreign import MARLIN, REQUANTISE, foreign_format
from ropewalk.config.settings import MAX_GROUP_SIZE, QuantConfig, QuantRule, QuantSettings, quick_pattern

logger = logging.getLogger(__name__)

# Our name of a key, and its spellings by AWQ-style tools, GPTQ-for-LLaMa scripts and text-generation-inference.
ALIASES = {
    "bits": ("bits", "wbits", "w_bit", "gptq_bits"),
    "group_size": ("group_size", "groupsize", "q_group_size", "gptq_groupsize"),
    "desc_act": ("desc_act",),
    "sym": ("sym", "gptq_sym"),
    "method": ("quant_method", "method"),
    "format": ("checkpoint_format", "format"),
    "packing_format": ("packing_format",),
    "pack_dtype": ("pack_dtype",),
    "is_marlin_format": ("is_marlin_format",),
    "version": ("version",),
    "zero_point": ("zero_point",),
    "load_in_8bit": ("load_in_8bit",),
    "load_in_4bit": ("load_in_4bit",),
    "dynamic": ("dynamic",),
    "extra_config": ("extra_config",),
    "lm_head": ("lm_head",),
    "meta": ("meta",),
    "model_file_base_name": ("model_file_base_name",),
}
KOBOLD_KEYS = ("gptq_bits", "gptq_groupsize")

# 3-bit codes have a stream and a planar layout; 5, 6 and 7 bits exist only as planes (docs/formats.md, "Planar codes").
GPTQ_BITS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "gptq_p": (2, 3, 4, 5, 6, 7, 8)}
BITS_BY_FORMAT = {**GPTQ_BITS, "awq": (4,)}
AWQ = "awq"  # what AutoAWQ calls version gemm
AUTO_ROUND_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_gptq": "gptq", "auto_round:auto_awq": AWQ, "auto_awq": AWQ}


def load_quant_config(folder: Path, config_raw: Mapping[str, Any]) -> QuantConfig | None:
    """What the files of a model folder declare; None if they declare nothing (a dense model, or one to infer).

    Raises:
        ConfigError: a damaged file, a missing or ill-typed key, a regular expression that does not compile.
        UnsupportedError: another quantisation method, weight layout or number of bits.
    """
    folder = Path(folder)
    declarations = _declarations(folder, config_raw)
    if not any(section.values for section in declarations):
        return None
    if is_compressed_tensors(declarations[0]):
        return parse_compressed_tensors(declarations[0])
    fields = _Fields.merge(declarations)
    format_name = _format(fields)
    default = _settings(fields, format_name)
    base_name = fields.text("model_file_base_name")
    if base_name and ("/" in base_name or "\\" in base_name):
        raise fields.error("model_file_base_name", "a file name without folders")
    # A rule may change the bits, so it starts from the declared layout, not from what it means for the default bits.
    rule_base = replace(default, format=format_name)
    return QuantConfig(
        source=fields.section("bits").source,
        default=default,
        rules=(*_dynamic_rules(fields, rule_base), *_auto_round_rules(fields, rule_base)),
        lm_head=fields.boolean("lm_head", False),
        model_file_base_name=base_name.removesuffix(".safetensors") if base_name else None,
        declared=True,
    )


def _declarations(folder: Path, config_raw: Mapping[str, Any]) -> list[Section]:
    """The objects that declare a quantisation, in order of precedence."""
    top = Section(str(folder / "config.json"), config_raw)
    # compression_config: the key of compressed-tensors until the middle of 2024.
    nested = top.section("quantization_config") or top.section("compression_config")
    kobold = {key: config_raw[key] for key in KOBOLD_KEYS if top.has(key)}
    found = [nested] if nested is not None else []
    found.append(Section(top.source, kobold))
    for name in ("quantize_config.json", "quant_config.json"):
        if (folder / name).exists():
            found.append(Section(str(folder / name), read_json_object(folder / name)))
    return found


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to joined declarations by our names of the keys, whatever their files and spellings."""

    sections: Sequence[Section]
    places: Mapping[str, tuple[Section, str]]  # our name of a key -> its declaration, and its spelling there

    @staticmethod
    def merge(sections: Sequence[Section]) -> _Fields:
        """Join declarations; of two values for a key the first wins, with a warning if they differ."""
        places: dict[str, tuple[Section, str]] = {}
        for section in sections:
            for name, spellings in ALIASES.items():
                for key in spellings:
                    # group_size null means one group; any other null is an absent key.
                    if not section.has(key) and not (name == "group_size" and key in section.values):
                        continue
                    first, first_key = places.setdefault(name, (section, key))
                    if first.values[first_key] != section.values[key] and name != "meta":
                        logger.warning(
                            "%s says %s, %s says %s: the first is used",
                            f"{first.source}: {first.name(first_key)}",
                            shown(first.values[first_key]),
                            f"{section.source}: {section.name(key)}",
                            shown(section.values[key]),
                        )
        return _Fields(sections, places)

    def has(self, name: str) -> bool:
        return name in self.places

    def place(self, name: str) -> tuple[Section, str]:
        """The declaration of a key and its spelling; an absent key belongs to the first one that is not empty."""
        absent = next((section for section in self.sections if section.values), self.sections[0])
        return self.places.get(name, (absent, name))

    def section(self, name: str) -> Section:
        return self.place(name)[0]

    def value(self, name: str) -> Any:
        section, key = self.place(name)
        return section.values.get(key)

    def error(self, name: str, accepted: str) -> ConfigError:
        section, key = self.place(name)
        return section.error(key, accepted)

    def integer(self, name: str, low: int, high: int, default: int) -> int:
        section, key = self.place(name)
        return section.optional_integer(key, low, high, default)

    def boolean(self, name: str, default: bool) -> bool:
        section, key = self.place(name)
        return section.boolean(key, default)

    def text(self, name: str) -> str | None:
        section, key = self.place(name)
        return section.text(key)

    def object(self, name: str) -> Section | None:
        section, key = self.place(name)
        return section.section(key)

    def word(self, name: str) -> str | None:
        """A name in lower case; None if it is absent."""
        text = self.text(name)
        return text.strip().lower() if text is not None else None

    def refuse(self, name: str, accepted: str) -> UnsupportedError:
        """The error for a value that is known but not implemented, with what runs it and what to do instead."""
        section, key = self.place(name)
        value = section.values.get(key)
        known = foreign_format(key if value is True else value)
        what = f" ({known.title})" if known is not None else ""
        return UnsupportedError(
            f"{section.source}: {section.name(key)} {shown(value)}{what} is not supported; accepted is {accepted}: "
            f"{known.advice if known is not None else REQUANTISE}"
        )


def _format(fields: _Fields) -> str:
    """The layout of the packed tensors. Whatever is neither GPTQ nor AWQ is refused by name."""
    container = _container(fields)
    if fields.boolean("is_marlin_format", False):
        raise UnsupportedError(
            f"{fields.section('is_marlin_format').source}: is_marlin_format is true, and the marlin layout is not "
            f"supported; accepted are {', '.join(GPTQ_BITS)}: {MARLIN.advice}"
        )
    if (fields.word("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise fields.refuse("pack_dtype", "int32")
    if container == AWQ:
        for name in ("version", "format"):
            if fields.word(name) not in (None, "gemm"):
                raise fields.refuse(name, "gemm")
        return AWQ
    name = fields.word("format") or "gptq"
    if name not in GPTQ_BITS:
        raise fields.refuse("format", ", ".join(GPTQ_BITS))
    return name


def _container(fields: _Fields) -> str:
    """Whose tensors these are: "gptq" or "awq"."""
    method = fields.word("method")
    if method is None:
        for name in ("load_in_8bit", "load_in_4bit"):  # files of bitsandbytes name no method, only a switch
            if fields.boolean(name, False):
                raise fields.refuse(name, "a GPTQ or AWQ checkpoint (this one is for bitsandbytes)")
        # AWQ's files of 2023 name the kernel that the layout is for.
        return AWQ if fields.word("version") is not None else "gptq"
    if method in ("auto-round", "intel/auto-round"):
        packing = fields.word("packing_format")
        if packing not in AUTO_ROUND_PACKINGS:
            name = "packing_format" if fields.has("packing_format") else "method"
            raise fields.refuse(name, "packing_format auto_round:auto_gptq or auto_round:auto_awq")
        return AUTO_ROUND_PACKINGS[packing]
    if method not in ("gptq", AWQ):
        raise fields.refuse("method", "gptq, awq or compressed-tensors")
    return method


def _settings(fields: _Fields, format_name: str) -> QuantSettings:
    """The settings of every module without a rule."""
    if not fields.has("bits"):
        raise fields.error("bits", "2, 3, 4 or 8 (also 5, 6 or 7 in format gptq_p)")
    if not fields.has("group_size"):
        raise ConfigError(
            f"{fields.section('bits').source}: group_size is missing, and tools disagree on its default: add it, or "
            "remove the declaration, to have bits and groups inferred from the shapes of the tensors"
        )
    written_by_words = format_name == "gptq" and _by_gptqmodel(fields)
    symmetric = not fields.boolean("zero_point", True) if format_name == AWQ else True
    return _overlay(QuantSettings(4, -1, False, symmetric, format_name, written_by_words), fields)


def _overlay(base: QuantSettings, fields: _Fields) -> QuantSettings:
    """`base` with the values of `fields`, checked."""
    bits = fields.integer("bits", 1, 32, base.bits)
    if bits not in BITS_BY_FORMAT[base.format]:
        section, key = fields.place("bits")
        accepted = ", ".join(map(str, BITS_BY_FORMAT[base.format]))
        raise UnsupportedError(
            f"{section.source}: {section.name(key)} {bits} is not supported in format {base.format}; "
            f"accepted are {accepted}"
        )
    group_size = fields.integer("group_size", -1, MAX_GROUP_SIZE, -1) if fields.has("group_size") else base.group_size
    if group_size == 0:
        raise fields.error("group_size", "-1 (one group) or a number of rows")
    return replace(
        base,
        bits=bits,
        group_size=group_size,
        desc_act=fields.boolean("desc_act", base.desc_act),
        sym=fields.boolean("sym", base.sym),
        # One plane of 2, 4 or 8 bits is the same stream of words as in gptq_v2.
        format="gptq_v2" if base.format == "gptq_p" and bits in (2, 4, 8) else base.format,
    )


def _by_gptqmodel(fields: _Fields) -> bool:
    """True if `meta.quantizer` names gptqmodel, which lowers v1 zero points by whole words, borrowing across fields."""
    meta = fields.object("meta")
    quantizers = meta.values.get("quantizer") if meta is not None else None
    quantizers = quantizers if isinstance(quantizers, list) else [quantizers]
    return any(isinstance(name, str) and name.strip().lower().startswith("gptqmodel") for name in quantizers)


def _dynamic_rules(fields: _Fields, base: QuantSettings) -> list[QuantRule]:
    """gptqmodel's `dynamic`: regular expressions to overrides; "-:" before one leaves the module dense."""
    section = fields.object("dynamic") if fields.value("dynamic") is not False else None
    rules = []
    for spelled in section.values if section is not None else ():
        source = spelled[2:] if spelled.startswith(("-:", "+:")) else spelled
        pattern = quick_pattern(source, section.source, section.name(spelled))
        rules.append(QuantRule(pattern, None if spelled.startswith("-:") else _rule_settings(section, spelled, base)))
    return rules


def _auto_round_rules(fields: _Fields, base: QuantSettings) -> list[QuantRule]:
    """auto-round's `extra_config`: full module names to overrides; 16 bits or more leave the module dense."""
    section = fields.object("extra_config")
    rules = []
    for name in section.values if section is not None else ():
        overrides = section.section(name)
        dense = overrides is not None and overrides.optional_integer("bits", 1, 32, base.bits) >= 16
        settings = None if dense else _rule_settings(section, name, base)
        rules.append(QuantRule(re.compile(re.escape(name) + r"\Z"), settings))
    return rules


def _rule_settings(section: Section, key: str, base: QuantSettings) -> QuantSettings:
    """`base` with the overrides of one rule; a null rule changes nothing."""
    overrides = section.section(key) or Section(section.source, {}, section.name(key))
    fields = _Fields.merge([overrides])
    own_format = fields.word("format") or base.format
    if own_format != base.format:
        raise fields.refuse("format", f"the format of the whole checkpoint, {base.format}")
    return _overlay(base, fields)
