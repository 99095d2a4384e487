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
BITS_BY_FORMAT = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "gptq_p": (2, 3, 4, 5, 6, 7, 8)}
REQUANTISE = "quantise the original model with gptqmodel (format gptq), or take a GPTQ copy of it"
REMEDIES = {
    "marlin": "use the checkpoint it was repacked from, or " + REQUANTISE,
    "bitblas": "use the checkpoint it was repacked from, or " + REQUANTISE,
    "auto-round": "export it again with auto-round's format auto_gptq",
}
MAX_GROUP_SIZE = 2**20
# Limits of a regular expression in `dynamic`; published ones have three repetitions and 40 characters.
MAX_REPETITIONS = 5
MAX_PATTERN = 4096


@dataclass(frozen=True, slots=True)
class QuantSettings:
    """How one linear layer was quantised."""

    bits: int
    group_size: int  # rows per group; -1: one group for all rows
    desc_act: bool  # informational: the order of the rows is in g_idx
    sym: bool
    format: str  # "gptq" (zero points stored minus one) | "gptq_v2" (stored as they are) | "gptq_p" (v2, bit planes)
    word_borrow: bool  # the minus one was subtracted from whole words (gptqmodel's v1 files), not from each field


@dataclass(frozen=True, slots=True)
class QuantRule:
    """Settings of the modules whose full name begins with a match of the pattern; None: they are dense."""

    pattern: re.Pattern[str]
    settings: QuantSettings | None


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """What a checkpoint declares. `declared` is False if it was inferred from tensor shapes instead."""

    source: str
    default: QuantSettings
    rules: tuple[QuantRule, ...]
    lm_head: bool
    model_file_base_name: str | None
    declared: bool

    def for_module(self, name: str) -> QuantSettings | None:
        """The settings of a linear such as "model.layers.0.mlp.up_proj"; None: it is dense. The first match wins."""
        for rule in self.rules:
            if rule.pattern.match(name):
                return rule.settings
        return None if name == "lm_head" and not self.lm_head else self.default


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
    nested = top.section("quantization_config")
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
        """The error for a value that is known but not implemented, with what to do instead."""
        section, key = self.place(name)
        value = section.values.get(key)
        remedy = next((text for word, text in REMEDIES.items() if word in str(value).lower()), REQUANTISE)
        return UnsupportedError(
            f"{section.source}: {section.name(key)} {shown(value)} is not supported; accepted is {accepted}: {remedy}"
        )


def _format(fields: _Fields) -> str:
    """The layout of the packed tensors. Whatever is not GPTQ is refused by name."""
    method = fields.word("method")
    if method is None:
        # AWQ's files of 2023 name the kernel that the layout is for, not a method; those of bitsandbytes only a switch.
        if fields.word("version") is not None:
            raise fields.refuse("version", "a GPTQ checkpoint (this one looks like AWQ)")
        for name in ("load_in_8bit", "load_in_4bit"):
            if fields.boolean(name, False):
                raise fields.refuse(name, "a GPTQ checkpoint (this one is for bitsandbytes)")
    elif method in ("auto-round", "intel/auto-round"):
        if fields.word("packing_format") not in ("auto_round:auto_gptq", "auto_gptq"):
            name = "packing_format" if fields.has("packing_format") else "method"
            raise fields.refuse(name, "packing_format auto_round:auto_gptq")
    elif method != "gptq":
        raise fields.refuse("method", "gptq")
    if fields.boolean("is_marlin_format", False):
        raise UnsupportedError(
            f"{fields.section('is_marlin_format').source}: is_marlin_format is true, and the marlin layout is not "
            f"supported; accepted are {', '.join(BITS_BY_FORMAT)}: {REMEDIES['marlin']}"
        )
    if (fields.word("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise fields.refuse("pack_dtype", "int32")
    name = fields.word("format") or "gptq"
    if name not in BITS_BY_FORMAT:
        raise fields.refuse("format", ", ".join(BITS_BY_FORMAT))
    return name


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
    return _overlay(QuantSettings(4, -1, False, True, format_name, written_by_words), fields)


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
        try:
            require_quick_pattern(source)
            pattern = re.compile(source)
        except (ValueError, re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{section.source}: {section.name(spelled):.200} is not a regular expression that can be used ({error})"
            ) from error
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


def require_quick_pattern(source: str) -> None:
    """Refuse a regular expression that could take hours on a name: files are untrusted, and `re` knows no time limit.

    Time is exponential if a repeated group holds a repetition or a choice, as in `(.+)+`. Otherwise it is polynomial,
    and the degree is the number of repetitions and choices: with five, a name of 50 characters takes 1 to 3 ms.

    Raises:
        ValueError: for either of the two, or an expression that is too long to be searched for them.
    """
    if len(source) > MAX_PATTERN:
        raise ValueError(f"{len(source)} characters, at most {MAX_PATTERN} are accepted")
    # Escapes and character classes stand for one character each; a lazy repetition counts like a greedy one.
    rest = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "a", source, flags=re.DOTALL)
    rest = re.sub(r"([*+?}])[?+]", r"\1", rest)
    num_choices = 0
    while group := re.search(r"\(([^()]*)\)([*+{]?)", rest):
        body = group[1].removeprefix("?")
        if group[2] and re.search(r"[*+{?|]", body):
            raise ValueError("a repeated group holds repetitions or choices")
        num_choices += "|" in body
        rest = rest[: group.start()] + body.replace("|", "") + group[2] + rest[group.end() :]
    if len(re.findall(r"[*+{?]", rest)) + num_choices > MAX_REPETITIONS:
        raise ValueError(f"more than {MAX_REPETITIONS} repetitions and choices")
