"""The objects that name a RoPE scaling ({"rope_type": "yarn", "factor": 4, ...}): one reader per rope type.

`METHODS` lists the types with the keys of each (docs/formats.md, "The scaling object"). An object comes from
config.json (`rope_scaling` or `rope_parameters`) or from the argument `rope_scaling`; rope/decision.py finds it and the
facts around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.base.json import Section, shown
from ropewalk.rope.methods import (
    DynamicNtkScaling,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    NtkByPartsScaling,
    NtkScaling,
    ProportionalScaling,
    RopeMethod,
    YarnScaling,
)

logger = logging.getLogger(__name__)

ORIGINAL = "original_max_position_embeddings"
# Far beyond what is in use (factors 1 to 64, alpha up to 1000), and safe from overflow in float64.
MIN_FACTOR, MAX_FACTOR = 0.01, 1e6

# mrope is plain RoPE for text: its sections tell image positions apart.
TYPE_ALIASES = MappingProxyType({"su": "longrope", "mrope": "default"})
COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", ORIGINAL)
# Keys that change the result and are not implemented; any other unknown key gives a warning.
REFUSED_KEYS = ("short_mscale", "long_mscale", "llama_4_scaling_beta")


@dataclass(frozen=True, slots=True)
class RopeObject:
    """A scaling object, and the facts that its meaning depends on."""

    section: Section
    original: int | None  # the declared original length
    max_positions: int  # max_position_embeddings: the original length if none is declared
    renamed: Mapping[str, str] = field(default_factory=dict)  # types that mean another one in the model's family

    @property
    def length(self) -> int:
        """The length that the model had before scaling."""
        return self.original or self.max_positions

    def rope_type(self) -> tuple[str, str]:
        """(the key that names the type, the type by its main name)."""
        section = self.section
        for key, value in section.values.items():
            if isinstance(value, Mapping):
                raise UnsupportedError(
                    f"{section.source}: {section.name(str(key))} is an object: a RoPE per layer type is not supported "
                    "for these models; give one object with a rope_type for all layers"
                )
        names = {key: section.text(key) for key in ("rope_type", "type") if section.has(key)}
        if not names:
            unnamed = [key for key in section.values if key not in COMMON_KEYS and section.has(key)]
            if unnamed:
                raise ConfigError(
                    f"{section.source}: {section.name('rope_type')} is missing beside {', '.join(map(str, unnamed))}; "
                    f"accepted are {accepted_types()}"
                )
            return "rope_type", "default"
        types = {TYPE_ALIASES.get(name, self.renamed.get(name, name)) for name in names.values()}
        if len(types) > 1:
            raise ConfigError(
                f"{section.source}: {section.name('rope_type')} is {shown(names['rope_type'])}, but "
                f"{section.name('type')} is {shown(names['type'])}, and readers disagree on which counts: remove "
                "one, or give the argument rope_scaling"
            )
        return next(iter(names)), types.pop()

    def method(self, rotary_dim: int) -> RopeMethod:
        """The method that the object names, for R rotated features.

        Raises:
            ConfigError: a key of the wrong type, out of range or missing.
            UnsupportedError: a rope type, or an option of one, that is not implemented.
        """
        key, name = self.rope_type()
        if name not in METHODS:
            raise UnsupportedError(
                f"{self.section.source}: {self.section.name(key)} {shown(name)} is not supported; accepted are "
                f"{accepted_types()}"
            )
        reader, keys = METHODS[name]
        for key in REFUSED_KEYS:
            if self.section.has(key):
                raise UnsupportedError(
                    f"{self.section.source}: {self.section.name(key)} is not supported for these models; remove it "
                    "if the model was trained without it"
                )
        unread = [key for key in self.section.values if key not in (*COMMON_KEYS, *keys) and self.section.has(key)]
        if unread:
            names = ", ".join(self.section.name(str(key)) for key in unread)
            logger.warning("%s: %s: not a key of rope type %s, ignored", self.section.source, names, name)
        return reader(self, rotary_dim)

    def factor(self) -> float:
        """The required `factor`; if it is missing, max_position_embeddings / the declared original length."""
        if self.section.has("factor"):
            return self.section.number("factor", MIN_FACTOR, MAX_FACTOR)
        if self.original is None or self.original >= self.max_positions:
            raise self.section.error("factor", f"a number from {MIN_FACTOR:g} to {MAX_FACTOR:g}")
        factor = self.max_positions / self.original
        logger.warning(
            "%s: %s is missing; using max_position_embeddings / %s = %g",
            self.section.source,
            self.section.name("factor"),
            ORIGINAL,
            factor,
        )
        return factor


def accepted_types() -> str:
    """For messages."""
    return ", ".join((*METHODS, *TYPE_ALIASES))


def _none(rope: RopeObject, rotary_dim: int) -> NoScaling:
    return NoScaling()


def _linear(rope: RopeObject, rotary_dim: int) -> LinearScaling:
    return LinearScaling(rope.factor())


def _ntk(rope: RopeObject, rotary_dim: int) -> NtkScaling:
    if rope.section.has("alpha"):
        return NtkScaling(rope.section.number("alpha", MIN_FACTOR, MAX_FACTOR))
    return NtkScaling(rope.factor())


def _dynamic(rope: RopeObject, rotary_dim: int) -> DynamicNtkScaling | NtkScaling:
    section = rope.section
    if section.has("alpha"):
        # Hunyuan's model code: a fixed base * alpha ** (d / (d - 2)), whatever the length and the factor.
        logger.warning(
            "%s: %s makes this static NTK-aware scaling (transformers ignores it in llama models)",
            section.source,
            section.name("alpha"),
        )
        return _ntk(rope, rotary_dim)
    if rope.length != rope.max_positions:
        logger.warning(
            "%s: dynamic scaling starts at %s = %d (transformers starts at max_position_embeddings, %d)",
            section.source,
            ORIGINAL,
            rope.length,
            rope.max_positions,
        )
    return DynamicNtkScaling(section.number("factor", MIN_FACTOR, MAX_FACTOR), rope.length)


def _ntk_by_parts(rope: RopeObject, rotary_dim: int) -> NtkByPartsScaling:
    return NtkByPartsScaling(rope.factor(), rope.length)


def _yarn(rope: RopeObject, rotary_dim: int) -> YarnScaling:
    return _yarn_with(rope, rope.factor())


def _yarn_with(rope: RopeObject, factor: float) -> YarnScaling:
    section = rope.section
    beta_fast, beta_slow = _turns(section, "beta_fast", 32.0), _turns(section, "beta_slow", 1.0)
    if beta_fast < beta_slow:
        raise section.error("beta_fast", f"at least beta_slow, {beta_slow:g}")
    return YarnScaling(
        factor=factor,
        original=rope.length,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=section.boolean("truncate", True),
        attention_factor=section.optional_number("attention_factor", MIN_FACTOR, MAX_FACTOR, None),
        mscale=section.optional_number("mscale", 0.0, MAX_FACTOR, None),
        mscale_all_dim=section.optional_number("mscale_all_dim", 0.0, MAX_FACTOR, None),
    )


def _turns(section: Section, key: str, default: float) -> float:
    """beta_fast or beta_slow; zero means "the default", as in transformers."""
    given = section.optional_number(key, 0.0, MAX_FACTOR, 0.0)
    return section.number(key, MIN_FACTOR, MAX_FACTOR) if given else default


def _dynamic_linear(rope: RopeObject, rotary_dim: int) -> DynamicScaling:
    return _growing(rope, LinearScaling(1.0))


def _dynamic_ntk_by_parts(rope: RopeObject, rotary_dim: int) -> DynamicScaling:
    return _growing(rope, NtkByPartsScaling(1.0, rope.length))


def _dynamic_yarn(rope: RopeObject, rotary_dim: int) -> DynamicScaling:
    return _growing(rope, _yarn_with(rope, 1.0))


def _growing(rope: RopeObject, inner: LinearScaling | NtkByPartsScaling | YarnScaling) -> DynamicScaling:
    """A fine-tuned model is scaled to its extended length at once; any other is plain up to its original length."""
    start = rope.max_positions if rope.section.boolean("finetuned", False) else rope.length
    return DynamicScaling(inner, rope.length, max(start, rope.length))


def _llama3(rope: RopeObject, rotary_dim: int) -> Llama3Scaling:
    section = rope.section
    low = section.number("low_freq_factor", MIN_FACTOR, MAX_FACTOR)
    high = section.number("high_freq_factor", MIN_FACTOR, MAX_FACTOR)
    if high <= low:
        raise section.error("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    return Llama3Scaling(section.number("factor", MIN_FACTOR, MAX_FACTOR), low, high, rope.length)


def _longrope(rope: RopeObject, rotary_dim: int) -> LongRopeScaling:
    section = rope.section
    default_factor = rope.max_positions / rope.length
    return LongRopeScaling(
        factor=section.optional_number("factor", MIN_FACTOR, MAX_FACTOR, default_factor),
        original=rope.length,
        short_factor=_factor_list(section, "short_factor", rotary_dim // 2),
        long_factor=_factor_list(section, "long_factor", rotary_dim // 2),
        attention_factor=section.optional_number("attention_factor", MIN_FACTOR, MAX_FACTOR, None),
    )


def _factor_list(section: Section, key: str, count: int) -> tuple[float, ...]:
    values = section.values.get(key)
    if not isinstance(values, (list, tuple)) or len(values) != count:
        found = f"a list of {len(values)}" if isinstance(values, (list, tuple)) else shown(values)
        raise ConfigError(
            f"{section.source}: {section.name(key)} must be a list of {count} numbers (half of the rotated features), "
            f"found {found}"
        )
    entries = Section(section.source, {f"{key}[{i}]": value for i, value in enumerate(values)}, section.path)
    return tuple(entries.number(entry, MIN_FACTOR, MAX_FACTOR) for entry in entries.values)


def _proportional(rope: RopeObject, rotary_dim: int) -> ProportionalScaling:
    section = rope.section
    proportion = section.optional_number("partial_rotary_factor", 0.0, 1.0, 1.0)
    if proportion * rotary_dim < 2:
        raise section.error("partial_rotary_factor", f"a part of head_dim, {rotary_dim}, that holds a pair of features")
    return ProportionalScaling(proportion, section.optional_number("factor", MIN_FACTOR, MAX_FACTOR, 1.0))


YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")

# rope type -> (reader, the keys it reads besides COMMON_KEYS)
METHODS: Mapping[str, tuple[Callable[[RopeObject, int], RopeMethod], tuple[str, ...]]] = MappingProxyType(
    {
        "default": (_none, ()),
        "linear": (_linear, ("factor",)),
        "ntk": (_ntk, ("factor", "alpha")),
        "ntk-by-parts": (_ntk_by_parts, ("factor",)),
        "dynamic": (_dynamic, ("factor", "alpha")),
        # "finetuned" says how the model was made; it changes nothing in a static method.
        "yarn": (_yarn, ("factor", "finetuned", *YARN_KEYS)),
        "dynamic-linear": (_dynamic_linear, ("factor", "finetuned")),
        "dynamic-ntk-by-parts": (_dynamic_ntk_by_parts, ("factor", "finetuned")),
        "dynamic-yarn": (_dynamic_yarn, ("factor", "finetuned", *YARN_KEYS)),
        "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor")),
        "longrope": (_longrope, ("factor", "short_factor", "long_factor", "attention_factor")),
        "proportional": (_proportional, ("factor",)),
    }
)
# Those that a factor alone completes, for lists to choose from; the second kind also follows the length of the text.
BY_FACTOR = ("linear", "ntk", "dynamic", "ntk-by-parts", "yarn")
SCALINGS = ("none", *BY_FACTOR)  # what models are compared under
AS_LOADED = "as loaded"  # beside them: what the options of loading asked for
FOLLOWING_THE_LENGTH = ("dynamic-linear", "dynamic-ntk-by-parts", "dynamic-yarn")
