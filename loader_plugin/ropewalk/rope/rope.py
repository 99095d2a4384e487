"""RoPE as the model uses it: `resolve_rope` turns a config.json and overrides into a Rope, which gives rotation tables.

    config.json, arguments -> resolve_rope -> Rope -> inverse_frequencies(seq_len), rotation_tables(start, end, seq_len)

rope/methods.py computes each method, rope/spellings.py reads its object, rope/decision.py chooses among the sources.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ropewalk.base.errors import ConfigError
from ropewalk.base.json import Section, shown
from ropewalk.base.limits import MAX_POSITIONS
from ropewalk.config.rotary import MAX_THETA
from ropewalk.rope.decision import RopeDecision, decide, decide_by_knobs, read_facts
from ropewalk.rope.methods import LinearNtkScaling, LinearScaling, NoScaling, NtkScaling, RopeMethod
from ropewalk.rope.spellings import MAX_FACTOR, MIN_FACTOR

logger = logging.getLogger(__name__)

GROWTH = 8  # a sequence grows by this part of its length, before its keys are turned for another one,
GROWN_TO = 64  # in multiples of this, the positions of a page


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary position embedding of one model, decided and checked."""

    method: RopeMethod
    theta: float
    head_dim: int  # D
    rotary_dim: int  # R: features 0..R-1 of a head turn, i together with i + R/2
    original_length: int  # positions before the context was extended
    covers: int | None  # positions that the method was made for; None: any number
    decided_by: str  # which key of which file, or which argument
    sliding_theta: float | None  # of layers with a window, where they have a table of their own that nothing scales
    default_length: int  # positions if nobody names a length: as declared, or as far as an argument reaches

    @property
    def depends_on_length(self) -> bool:
        """True if the frequencies depend on the sequence length, so that a longer call rotates all its keys anew."""
        return self.method.depends_on_length

    def inverse_frequencies(self, seq_len: int) -> tuple[np.ndarray, float]:
        """([R/2] float64 radians per position, the factor of cos and sin) for a call that reaches seq_len positions.

        Raises:
            ConfigError: seq_len is not a positive integer.
        """
        return self.method.frequencies(self.theta, self.rotary_dim, _length(seq_len, "seq_len", 1))

    def rotation_tables(self, start: int, end: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of positions start..end-1, for a call that reaches seq_len positions.

        Results: [end - start, R/2] float32 each, with the attention scale folded in. Angles are computed in float64: in
        float32 they would be off by up to 1e-3 at position 8191.

        Raises:
            ConfigError: not 0 <= start <= end, or seq_len is not a positive integer.
        """
        start, end = _length(start, "start", 0), _length(end, "end", 0)
        if end < start:
            raise ConfigError(f"rotation_tables: end must be at least start, {start}, found {end}")
        return self.tables_at(np.arange(start, end), seq_len)

    def tables_at(self, positions: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of any positions: [T] integers -> [T, R/2] float32 each. See `rotation_tables`."""
        inv, scale = self.inverse_frequencies(seq_len)
        angles = positions.astype(np.float64)[:, None] * inv  # [T, R/2]
        return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)

    def all_tables_at(self, positions: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of every table that layers turn by: [T] integers -> [tables, T, R/2] float32 each."""
        tables = [self.tables_at(positions, seq_len)]
        inv = self.sliding_frequencies()
        if inv is not None:
            angles = positions.astype(np.float64)[:, None] * inv  # [T, R/2]
            tables.append((np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)))
        cos, sin = zip(*tables, strict=True)
        return np.stack(cos), np.stack(sin)

    def sliding_frequencies(self) -> np.ndarray | None:
        """[R/2] float64 radians per position in layers with a window; None: they turn as all others do."""
        if self.sliding_theta is None:
            return None
        return NoScaling().frequencies(self.sliding_theta, self.rotary_dim, 1)[0]

    def turns_like(self, other: Rope) -> bool:
        """True if both rotate every key of every sequence alike, whatever decided them."""
        mine, theirs = (
            (rope.method, rope.theta, rope.sliding_theta, rope.head_dim, rope.rotary_dim) for rope in (self, other)
        )
        return mine == theirs

    def grown_length(self, length: int) -> int:
        """The length whose frequencies a sequence gets that has outgrown those of its keys: `length`, or somewhat more.

        It is the next of a fixed row of lengths, each an eighth longer than the one before and in whole pages, so that
        keys that follow the length are turned a few times and not with every token. The row begins where the
        frequencies begin to change, and depends on nothing else.
        """
        if not self.depends_on_length:
            return length
        grown = self.method.steady_length
        while grown < length:
            grown = -(-grown * (GROWTH + 1) // (GROWTH * GROWN_TO)) * GROWN_TO
        return grown

    def describe(self) -> str:
        """One line for people: the method with its values, and what decided it."""
        method = self.method
        numbers = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "original"}
        values = [f"{name} {value:g}" for name, value in numbers.items() if type(value) in (int, float)]
        part = [f"{self.rotary_dim} of {self.head_dim} features"] if self.rotary_dim != self.head_dim else []
        covers = f"covers {self.covers} positions" if self.covers is not None else "adapts to the length"
        facts = [f"RoPE scaling: {method.name}", *values, f"original length {self.original_length}", covers]
        part += [f"theta {self.sliding_theta:g} without scaling in layers with a window"] if self.sliding_theta else []
        return ", ".join([*facts, f"theta {self.theta:g}", *part]) + f"; decided by {self.decided_by}"


def resolve_rope(
    config: Mapping[str, Any],
    seq_len: int | None = None,
    *,
    rope_scaling: Mapping[str, Any] | None = None,
    compress_pos_emb: float | None = None,
    alpha_value: float | None = None,
    rope_theta: float | None = None,
    source: str = "config.json",
    why: str | None = None,
) -> Rope:
    """The RoPE of a model: what its config.json asks for, or what the arguments put in its place.

    config: a parsed config.json; `source` names it in messages.
    seq_len: the context intended, if known: beyond what the method covers, a warning says what would cover it.
    rope_scaling: an object as in config.json, in place of its scaling ({"rope_type": "default"} turns scaling off). The
        types are those of transformers plus "ntk" and "ntk-by-parts" (factor) and "dynamic-linear",
        "dynamic-ntk-by-parts" and "dynamic-yarn", which follow the length.
    compress_pos_emb: linear scaling by this factor, in place of config.json's scaling.
    alpha_value: NTK-aware scaling by this alpha, in place of config.json's scaling; both knobs together divide the
        NTK-aware frequencies by compress_pos_emb. 1 means no scaling. Neither goes together with rope_scaling.
    rope_theta: the base, in place of config.json's; it combines with everything else.
    why: what decided, in place of the names of arguments.

    Raises:
        ConfigError: a key or an argument has the wrong type, is out of range, or contradicts another.
        UnsupportedError: a rope type that is not implemented.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{source} must hold a JSON object, found {shown(config)}")
    given = Section(
        "arguments", {"compress_pos_emb": compress_pos_emb, "alpha_value": alpha_value, "rope_theta": rope_theta}
    )
    factor = given.optional_number("compress_pos_emb", MIN_FACTOR, MAX_FACTOR, None)
    alpha = given.optional_number("alpha_value", MIN_FACTOR, MAX_FACTOR, None)
    theta = given.optional_number("rope_theta", 1.0, MAX_THETA, None, above=True)
    by_knobs = factor is not None or alpha is not None
    if by_knobs and rope_scaling is not None:
        raise ConfigError(
            "arguments: rope_scaling replaces the whole scaling, so it does not go together with compress_pos_emb or "
            "alpha_value: give one or the other"
        )
    facts = read_facts(config, source, rope_scaling)
    decision = decide_by_knobs(facts, factor, alpha) if by_knobs else decide(facts)
    declared = facts.max_positions
    reach = decision.covers or declared
    # In a config.json with a factor, max_position_embeddings may be the extended or the original length; either is safe
    # to take. An argument, however, is given for the length that it reaches.
    default_length = reach if by_knobs or rope_scaling is not None else min(reach, declared)
    rope = _rope(decision, theta, default_length)
    if why is not None:
        rope = replace(rope, decided_by=why)
    if seq_len is not None:
        _warn_beyond(rope, _length(seq_len, "seq_len", 1))
    return rope


def _rope(decision: RopeDecision, theta: float | None, default_length: int) -> Rope:
    decided = {field.name: getattr(decision, field.name) for field in fields(decision)}
    rope = Rope(**decided, default_length=default_length)
    if theta is None:
        return rope
    return replace(rope, theta=theta, decided_by=f"{rope.decided_by}, theta by argument rope_theta")


def _warn_beyond(rope: Rope, seq_len: int) -> None:
    if rope.covers is None or seq_len <= rope.covers:
        return
    logger.warning(
        "a context of %d is beyond the %d positions that the RoPE scaling (%s, decided by %s) covers, and text gets "
        "worse there: %s would cover it",
        seq_len,
        rope.covers,
        rope.method.name,
        rope.decided_by,
        remedy(rope, seq_len),
    )


def remedy(rope: Rope, seq_len: int) -> str:
    """The argument and value with which resolve_rope would cover seq_len positions."""
    ratio = math.ceil(100 * seq_len / rope.original_length) / 100
    method = rope.method
    if isinstance(method, NtkScaling):
        # A model may be trained with a large alpha (Hunyuan's 1000): a smaller one would not extend it.
        return f"alpha_value={max(ratio, math.ceil(method.alpha * seq_len / (rope.covers or seq_len))):.10g}"
    if isinstance(method, NoScaling):
        return f"alpha_value={ratio:.10g}"
    if isinstance(method, LinearScaling):
        return f"compress_pos_emb={ratio:.10g}"
    if isinstance(method, LinearNtkScaling):
        alpha = math.ceil(100 * ratio / method.factor) / 100
        return f"compress_pos_emb={method.factor:.10g} with alpha_value={alpha:.10g}"
    rope_type = "ntk-by-parts" if method.name == "ntk-by-parts" else "yarn"
    options = {"rope_type": rope_type, "factor": ratio, "original_max_position_embeddings": rope.original_length}
    return f"rope_scaling={options}"


def _length(value: int, name: str, low: int) -> int:
    """A number of positions; numpy integers count, booleans do not."""
    try:
        length = operator.index(value)
    except TypeError:
        length = -1
    if isinstance(value, bool) or not low <= length <= MAX_POSITIONS:
        raise ConfigError(f"{name} must be an integer from {low} to {MAX_POSITIONS}, found {shown(value)}")
    return length
