"""Which RoPE scaling a config.json, or an argument in its place, asks for: every spelling in use.

Precedence, as in transformers 5.23 (modeling_rope_utils.py):
- a non-empty `rope_scaling` replaces `rope_parameters`;
- theta: inside that object, else top-level `rope_theta`, else 10000; `partial_rotary_factor` likewise;
- the original length: top-level `original_max_position_embeddings`, else inside the object, else
  `max_position_embeddings`.
Beyond transformers, for llama models without any scaling: a top-level `original_max_position_embeddings` means
NTK-by-parts with factor max // original (bhenrym14's Airophin models), and an `auto_map` to `modelling_llama` with more
than 2048 positions means linear scaling by max / 2048 (SuperHOT models).
Whatever other readers silently ignore, or read in different ways, is refused by name or gives a warning.
docs/formats.md, "RoPE scaling", has all of this in tables.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.base.json import Section
from ropewalk.base.limits import MAX_FEATURES, MAX_HEAD_DIM, MAX_HEADS, MAX_POSITIONS
from ropewalk.config.model import read_max_positions
from ropewalk.config.rotary import MAX_THETA, PARTIAL, read_rotary_dim, read_sliding_theta, scaling_object
from ropewalk.families import FAMILIES, UNNAMED
from ropewalk.families.family import Family
from ropewalk.rope.methods import (
    DynamicNtkScaling,
    LinearNtkScaling,
    LinearScaling,
    NoScaling,
    NtkByPartsScaling,
    NtkScaling,
    RopeMethod,
)
from ropewalk.rope.spellings import ORIGINAL, RopeObject

logger = logging.getLogger(__name__)

LLAMA1_POSITIONS = 2048  # what the models that SuperHOT extended were trained with


@dataclass(frozen=True, slots=True)
class RopeDecision:
    """The scaling in force, and what decided it."""

    method: RopeMethod
    theta: float
    head_dim: int
    rotary_dim: int
    original_length: int  # positions before the context was extended
    covers: int | None  # positions that the method was made for; None: any number
    decided_by: str
    sliding_theta: float | None = None  # of layers with a window, where they have one of their own


@dataclass(frozen=True, slots=True)
class RopeFacts:
    """The scaling object of config.json, or the argument in its place, with the facts around it."""

    top: Section
    own: Section  # rope_scaling or rope_parameters of config.json; empty if there is neither
    argument: Section | None  # the argument rope_scaling
    family: Family
    head_dim: int
    max_positions: int
    may_be_extended: bool

    @property
    def scaling(self) -> Section:
        """The object in force."""
        return self.argument or self.own

    def holder(self, key: str) -> Section:
        """The object that a key is read from, if it may be inside the scaling object or at the top level."""
        order = (self.argument, self.own) if self.argument else (self.own,)
        return next((section for section in order if section.has(key)), self.top)

    def theta(self) -> float:
        section, key = self.holder("rope_theta"), self.family.theta
        name = key.name if section is self.top else "rope_theta"
        return section.optional_number(name, 1.0, MAX_THETA, key.default, above=True)

    def original(self) -> int | None:
        """The declared original length: in an argument, else at the top level of config.json, else in its object."""
        order = (self.argument, self.top, self.own) if self.argument else (self.top, self.own)
        found = [(section, section.integer(ORIGINAL, 2, MAX_POSITIONS)) for section in order if section.has(ORIGINAL)]
        if len(found) > 1 and not self.argument and found[0][1] != found[1][1]:
            logger.warning(
                "%s: %s is %d, but %s is %d; the first is used, as in transformers 5 (4.x used the second)",
                self.top.source,
                ORIGINAL,
                found[0][1],
                self.own.name(ORIGINAL),
                found[1][1],
            )
        return found[0][1] if found else None

    def rotary_dim(self) -> int:
        """R: how many features of a head are rotated, by partial_rotary_factor or the family's own key.

        Raises:
            UnsupportedError: an argument asks for another part, of queries and keys that are ordered for their own.
        """
        objects = [self.argument, self.own] if self.argument else [self.own]
        rotary_dim = read_rotary_dim((*objects, self.top), self.family, self.head_dim)
        if self.family.pairs and self.argument:
            own = read_rotary_dim((self.own, self.top), self.family, self.head_dim)
            if rotary_dim != own:
                raise UnsupportedError(
                    f"{self.top.source}: the weights of this {self.family.name} model are in order for a rotation of "
                    f"{own} features of a head, and the argument rope_scaling asks for {rotary_dim}: leave "
                    f"{PARTIAL} out"
                )
        return rotary_dim


def read_facts(config: Mapping[str, Any], source: str, argument: Mapping[str, Any] | None) -> RopeFacts:
    """Find the scaling object of config.json and the facts around it; `argument` replaces the object.

    Raises:
        ConfigError: the head size, the number of positions or an object has the wrong type or is out of range.
    """
    top = Section(source, config)
    own, parameters = top.section("rope_scaling"), top.section("rope_parameters")
    if own is None or not own.values:
        own = parameters or Section(source, {}, "rope_scaling")
    elif parameters is not None and parameters.values and parameters.values != own.values:
        logger.warning("%s: rope_parameters and rope_scaling differ; rope_scaling is used", source)
    named = FAMILIES.get(top.text("model_type") or UNNAMED.name)
    family = named or UNNAMED
    read = {family.theta.name} | ({family.partial_rotary.name} if family.partial_rotary else set())
    for key in ("compress_pos_emb", "alpha_value", "rotary_emb_base", "rotary_pct"):
        if top.has(key) and key not in read and (key, top.values[key]) != ("rotary_pct", 1.0):
            logger.warning(
                "%s: %s is ignored, as everywhere; the arguments are rope_theta, compress_pos_emb, alpha_value and "
                "rope_scaling",
                source,
                key,
            )
    if family.sliding_theta is not None:
        own = scaling_object(top)  # of the layers without a window
    architectures = top.values.get("architectures")
    if not isinstance(architectures, (list, tuple)) or not architectures:
        architectures = family.architectures
    may_be_extended = named is not None and named.extended_in_the_wild and architectures[0] in named.architectures
    given = Section("arguments", {"rope_scaling": argument}).section("rope_scaling") if argument is not None else None
    head_dim = _head_dim(top, family.head_dim)
    return RopeFacts(top, own, given, family, head_dim, read_max_positions(top, family), may_be_extended)


def decide(facts: RopeFacts) -> RopeDecision:
    """The scaling that the object in force names; without one, the scaling that config.json implies.

    Raises:
        ConfigError: a key has the wrong type, is out of range, missing, or contradicts another.
        UnsupportedError: a rope type, or an option of one, that is not implemented.
    """
    rope = RopeObject(facts.scaling, facts.original(), facts.max_positions, facts.family.rope_types)
    key, name = rope.rope_type()
    if name == "default" and not facts.argument:
        implied = _airophin(facts) or _superhot(facts)
        if implied is not None:
            return implied
    rotary_dim = facts.head_dim if name == "proportional" else facts.rotary_dim()
    if (
        name == "default"
        and facts.family.partial_rotary is None
        and rotary_dim != facts.head_dim
        and facts.holder("partial_rotary_factor") is not facts.argument
    ):
        raise UnsupportedError(
            f"{facts.top.source}: partial_rotary_factor without a scaling is read in two ways (transformers 4 rotates "
            "that part of the head, transformers 5 the whole head): give the argument rope_scaling={'rope_type': "
            "'default', 'partial_rotary_factor': ...} with the value meant, or 1.0"
        )
    method = rope.method(rotary_dim)
    if facts.argument:
        decided_by = "argument rope_scaling"
    elif facts.own.has(key):
        decided_by = f"{facts.own.name(key)} of {facts.top.source}"
    else:
        decided_by = f"no scaling key in {facts.top.source}"
    return _decision(facts, method, rotary_dim, rope.length, _covers(method, rope, not facts.argument), decided_by)


def decide_by_knobs(facts: RopeFacts, compress_pos_emb: float | None, alpha_value: float | None) -> RopeDecision:
    """The scaling that the knobs of the exllama loaders ask for, in place of whatever config.json asks for."""
    names = [n for n, v in (("compress_pos_emb", compress_pos_emb), ("alpha_value", alpha_value)) if v is not None]
    factor, alpha = compress_pos_emb or 1.0, alpha_value or 1.0
    if factor != 1 and alpha != 1:
        method: RopeMethod = LinearNtkScaling(factor, alpha)
    elif factor != 1:
        method = LinearScaling(factor)
    elif alpha != 1:
        method = NtkScaling(alpha)
    else:
        method = NoScaling()
    length = facts.original() or (LLAMA1_POSITIONS if _is_superhot(facts) else facts.max_positions)
    decided_by = f"argument{'s' if len(names) > 1 else ''} {' and '.join(names)}"
    return _decision(facts, method, facts.rotary_dim(), length, _positions(length * factor * alpha), decided_by)


def _decision(
    facts: RopeFacts, method: RopeMethod, rotary_dim: int, length: int, covers: int | None, decided_by: str
) -> RopeDecision:
    # These multiply theta by alpha ** (R / (R - 2)).
    if rotary_dim < 4 and ("ntk" in method.name or isinstance(method, DynamicNtkScaling)):
        raise ConfigError(
            f"{facts.top.source}: {method.name} scaling needs at least 4 rotated features, found {rotary_dim}"
        )
    sliding_theta = read_sliding_theta(facts.top, facts.family)
    return RopeDecision(method, facts.theta(), facts.head_dim, rotary_dim, length, covers, decided_by, sliding_theta)


def _covers(method: RopeMethod, rope: RopeObject, by_config: bool) -> int | None:
    """How many positions a method named by an object was made for.

    If config.json declares an original length, its max_position_embeddings is the extended length, and the larger of
    that and factor * original counts. llama3 and longrope models are trained at exactly max_position_embeddings.
    """
    if method.name.startswith("dynamic"):
        return None
    if isinstance(method, NoScaling) or (by_config and rope.section.has("alpha")):
        return rope.max_positions  # a model whose config.json has alpha was trained with it (Hunyuan)
    scaled = _positions(rope.length * (method.alpha if isinstance(method, NtkScaling) else method.factor))
    if not by_config or rope.original is None:
        return scaled
    if method.name in ("llama3", "longrope") and rope.max_positions > rope.original:
        return rope.max_positions
    return max(scaled, rope.max_positions)


def _positions(length: float) -> int:
    """Whole positions of a scaled length, at least one; 1.15 * 2000 must count as 2300."""
    return max(1, int(length + 1e-6))


def _airophin(facts: RopeFacts) -> RopeDecision | None:
    """The rule of bhenrym14's NTK-by-parts models: a top-level original length and no scaling object."""
    original = facts.original() if facts.top.has(ORIGINAL) else None
    if not facts.may_be_extended or original is None or original >= facts.max_positions:
        return None
    method = NtkByPartsScaling(float(facts.max_positions // original), original)  # an integer division there, too
    decided_by = f"{ORIGINAL} of {facts.top.source}"
    return _decision(facts, method, facts.rotary_dim(), original, facts.max_positions, decided_by)


def _superhot(facts: RopeFacts) -> RopeDecision | None:
    if not _is_superhot(facts):
        return None
    method = LinearScaling(facts.max_positions / LLAMA1_POSITIONS)
    decided_by = f"auto_map to modelling_llama and max_position_embeddings of {facts.top.source}"
    return _decision(facts, method, facts.rotary_dim(), LLAMA1_POSITIONS, facts.max_positions, decided_by)


def _is_superhot(facts: RopeFacts) -> bool:
    """True for folders that came with modelling_llama.py, which divides positions by max_position_embeddings / 2048."""
    auto_map = facts.top.values.get("auto_map")
    classes = auto_map.values() if isinstance(auto_map, Mapping) else ()
    named = any(isinstance(name, str) and name.split(".")[0] == "modelling_llama" for name in classes)
    return named and facts.may_be_extended and facts.max_positions > LLAMA1_POSITIONS


def _head_dim(top: Section, default: int | None) -> int:
    head_dim = top.optional_integer("head_dim", 2, MAX_HEAD_DIM, default)
    if head_dim is None:
        hidden_size = top.integer("hidden_size", 1, MAX_FEATURES)
        head_dim = hidden_size // top.integer("num_attention_heads", 1, MAX_HEADS)
    if head_dim < 2 or head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"{top.source}: the head size (head_dim, or hidden_size / num_attention_heads) must be even and at most "
            f"{MAX_HEAD_DIM}, found {head_dim}: RoPE rotates pairs of features"
        )
    return head_dim
