"""What config.json says of RoPE that is part of the architecture: which features turn, and thetas of single layers.

rope/decision.py reads the rest, and what arguments put in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.base.json import Section
from ropewalk.families.family import Family

# Far beyond what is in use (theta up to 1e11, alpha up to 1000), and safe from overflow in float64.
MAX_THETA = 1e15
PARTIAL = "partial_rotary_factor"
BY_TYPE = ("full_attention", "sliding_attention")  # keys of rope_parameters that hold an object for each type of layer


def scaling_object(section: Section, layer_type: str = BY_TYPE[0]) -> Section:
    """`rope_scaling`, or if that is empty `rope_parameters`: that of a type of layers, where each has its own."""
    own = section.section("rope_scaling")
    if own is None or not own.values:
        own = section.section("rope_parameters") or Section(section.source, {}, "rope_scaling")
    return own.section(layer_type) or Section(own.source, {}, own.name(layer_type)) if _has_types(own) else own


def _has_types(own: Section) -> bool:
    """True for an object that holds one for each type of layer (transformers 5 writes it for Gemma 3)."""
    return any(own.has(key) for key in BY_TYPE)


def read_rotary_dim(holders: Sequence[Section], family: Family, head_dim: int) -> int:
    """R: how many features of a head are rotated. holders: scaling objects in the order of precedence, config.json.

    Raises:
        ConfigError: not a part of the head that is an even number of features.
    """
    *objects, top = holders
    key = PARTIAL if family.partial_rotary is None else family.partial_rotary.name
    default = 1.0 if family.partial_rotary is None else family.partial_rotary.default
    section, key = next(((each, PARTIAL) for each in objects if each.has(PARTIAL)), (top, key))
    part = section.optional_number(key, 0.0, 1.0, default, above=True)
    rotary_dim = int(head_dim * part)
    if rotary_dim < 2 or rotary_dim % 2:
        raise section.error(key, f"a part of head_dim, {head_dim}, that is an even number")
    return rotary_dim


def read_sliding_theta(section: Section, family: Family) -> float | None:
    """The theta of layers with a window; None: that of all layers."""
    key = family.sliding_theta
    if key is None:
        return None
    own = scaling_object(section, BY_TYPE[1])
    if own.path.endswith(BY_TYPE[1]) and own.has("rope_theta"):
        return own.number("rope_theta", 1.0, MAX_THETA, above=True)
    return section.optional_number(key.name, 1.0, MAX_THETA, key.default, above=True)
