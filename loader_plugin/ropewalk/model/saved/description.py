"""What a saved cache says of itself: JSON in the header of its file, read back with types.

Everything that decides the bits of keys and values is in it, by content: an adapter by a digest of its matrices, not by
its number in the process that wrote the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.adapters.sets import SavedUse
from ropewalk.base.errors import ConfigError
from ropewalk.base.json import Section
from ropewalk.base.limits import MAX_POSITIONS
from ropewalk.model.cache import Frequencies, Shifted, Turned, num_pages

MAX_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class SavedSegment:
    """Positions from `start` up to the next segment, as `cache.Segment`, with adapters by their content. moves: what
    was done to them since they were computed."""

    start: int
    seq_len: int
    frequencies: Frequencies
    adapters: tuple[SavedUse, ...]
    moves: tuple[Turned | Shifted, ...] = ()


@dataclass(frozen=True, slots=True)
class Description:
    """ropewalk: its version. model: the name of the folder, for people. facts: see identity.py. rope: for people.

    reach: the length that the frequencies of all keys are for.
    part_bytes: of a page, in each place that holds a part of it. recent: which of the pages are held in float16 as
    well, for a format with a recent window; recent_bytes: of such a page. about: texts that the caller wanted to keep.
    """

    ropewalk: str
    model: str
    facts: Mapping[str, Any]
    rope: str
    num_tokens: int
    part_bytes: tuple[int, ...]
    segments: tuple[SavedSegment, ...]
    about: Mapping[str, str]
    reach: int
    recent: tuple[int, ...] = ()
    recent_bytes: tuple[int, ...] = ()

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """(name, number, bytes of each) of the parts of pages, as they follow each other in the file."""
        count = num_pages(self.num_tokens)
        codes = [(f"pages.{place}", count, size) for place, size in enumerate(self.part_bytes)]
        exact = [(f"recent.{place}", len(self.recent), size) for place, size in enumerate(self.recent_bytes)]
        return codes + exact

    def to_json(self) -> str:
        """The text that `read_description` reads back as it was."""
        return json.dumps(
            {
                "ropewalk": self.ropewalk,
                "model": self.model,
                "facts": dict(self.facts),
                "rope": self.rope,
                "num_tokens": self.num_tokens,
                "reach": self.reach,
                "part_bytes": list(self.part_bytes),
                "recent": list(self.recent),
                "recent_bytes": list(self.recent_bytes),
                "segments": [_segment_to_json(segment) for segment in self.segments],
                "about": dict(self.about),
            },
            separators=(",", ":"),
        )


def read_description(text: str, source: str) -> Description:
    """The description that a text holds; `source` names it in messages.

    Raises:
        ConfigError: something is missing or of a wrong type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: the description is not JSON") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: the description is not a JSON object")
    top = Section(source, values)
    num_tokens = top.integer("num_tokens", 1, MAX_POSITIONS)
    return Description(
        ropewalk=_text(top, "ropewalk"),
        model=_text(top, "model"),
        facts=_object(top, "facts"),
        rope=_text(top, "rope"),
        num_tokens=num_tokens,
        part_bytes=_integers(top, "part_bytes", 1, MAX_BYTES, at_least=1),
        segments=_segments(top, num_tokens),
        about=_about(top),
        reach=top.integer("reach", 1, MAX_POSITIONS),
        recent=_recent(top, num_pages(num_tokens)),
        recent_bytes=_integers(top, "recent_bytes", 1, MAX_BYTES, at_least=0),
    )


def _segment_to_json(segment: SavedSegment) -> dict[str, Any]:
    return {
        "start": segment.start,
        "seq_len": segment.seq_len,
        **_frequencies_to_json(segment.frequencies),
        "moves": [
            _frequencies_to_json(move.before)
            if isinstance(move, Turned)
            else {"start": move.start, "dropped": move.dropped.hex()}
            for move in segment.moves
        ],
        "adapters": [
            {"name": use.name, "digest": use.digest, "weight": use.weight, "instances": use.instances}
            for use in segment.adapters
        ],
    }


def _frequencies_to_json(frequencies: Frequencies) -> dict[str, Any]:
    return {
        "inverse_frequencies": frequencies.inverse_frequencies.hex(),  # float64, as numpy lays them out
        "attention_scale": frequencies.attention_scale,
    }


def _segments(top: Section, num_tokens: int) -> tuple[SavedSegment, ...]:
    segments = [_segment(section, num_tokens) for section in _sections(top, "segments")]
    starts = [segment.start for segment in segments]
    if starts[:1] != [0] or any(one >= other for one, other in zip(starts, starts[1:], strict=False)):
        raise top.error("segments", "stretches of positions that begin at 0 and ascend")
    return tuple(segments)


def _segment(section: Section, num_tokens: int) -> SavedSegment:
    return SavedSegment(
        start=section.integer("start", 0, num_tokens - 1),
        seq_len=section.integer("seq_len", 1, MAX_POSITIONS),
        frequencies=_frequencies(section),
        adapters=tuple(_use(use) for use in _sections(section, "adapters")),
        moves=tuple(_move(move) for move in _sections(section, "moves")),
    )


def _move(section: Section) -> Turned | Shifted:
    if not section.has("dropped"):
        return Turned(_frequencies(section))
    return Shifted(section.integer("start", 0, MAX_POSITIONS), _bytes(section, "dropped"))


def _frequencies(section: Section) -> Frequencies:
    scale = section.number("attention_scale", 0.0, 1e6, above=True)
    return Frequencies(_bytes(section, "inverse_frequencies"), scale)


def _bytes(section: Section, key: str) -> bytes:
    try:
        return bytes.fromhex(_text(section, key))
    except ValueError as error:
        raise section.error(key, "hexadecimal digits") from error


def _use(section: Section) -> SavedUse:
    weight, instances = section.values.get("weight"), section.values.get("instances")
    if type(weight) is not float or not math.isfinite(weight):
        raise section.error("weight", "a finite number")
    if instances is not None:
        if not isinstance(instances, list) or not all(type(item) is int and item >= 0 for item in instances):
            raise section.error("instances", "null or a list of layer instances")
        instances = tuple(instances)
    return SavedUse(_text(section, "name"), _text(section, "digest"), weight, instances)


def _sections(section: Section, key: str) -> list[Section]:
    values = section.values.get(key)
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise section.error(key, "a list of objects")
    return [Section(section.source, value, f"{section.name(key)}.{i}") for i, value in enumerate(values)]


def _integers(top: Section, key: str, low: int, end: int, at_least: int) -> tuple[int, ...]:
    values = top.values.get(key)
    if (
        not isinstance(values, list)
        or len(values) < at_least
        or not all(type(v) is int and low <= v < end for v in values)
    ):
        raise top.error(key, f"a list of at least {at_least} integers from {low} to {end - 1}")
    return tuple(values)


def _recent(top: Section, count: int) -> tuple[int, ...]:
    indices = _integers(top, "recent", 0, count, at_least=0)
    if any(one >= other for one, other in zip(indices, indices[1:], strict=False)):
        raise top.error("recent", "ascending numbers of pages")
    return indices


def _about(top: Section) -> dict[str, str]:
    about = _object(top, "about")
    if not all(isinstance(value, str) for value in about.values()):
        raise top.error("about", "an object of texts")
    return about


def _object(section: Section, key: str) -> dict[str, Any]:
    found = section.section(key)
    if found is None:
        raise section.error(key, "an object")
    return dict(found.values)


def _text(section: Section, key: str) -> str:
    found = section.text(key)
    if found is None:
        raise section.error(key, "a string")
    return found
