"""The adapters that a request uses, with what weight and on which layer instances: as text and as values.

    request = use {"+" use}      use = name [":" weight] ["@" instances]      instances = range {"," range}
    range = number ["-" number]

    storm                        the adapter "storm" on all that it was made for
    storm:0.5+poet               half of storm and all of poet
    storm:0.5@10-11+poet@3-5,8   storm on the instances 10 and 11 of the running layer order, poet on 3, 4, 5 and 8

Instances are counted from 0 in the layer order that the model runs, so a repeated layer can have a different adapter
each time. A use that names instances changes the linears of these decoder layers and nothing else: embeddings and head
belong to no instance, and only a use without "@" changes them. One adapter may be used several times with different
weights, on instances that do not overlap.

A name that contains a sign of this notation is written as a JSON string: "my+storm":0.5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ropewalk.base.errors import RequestError
from ropewalk.base.notation import TextCursor, plain_number
from ropewalk.config.layer_order import MAX_INSTANCES

SIGNS = '":@+,'
MAX_TEXT = 2**16
ACCEPTED = 'adapters such as "storm", "storm:0.5+poet" or "storm:0.5@10-11+poet@3-5,8"'


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter of a request. instances: those of the running layer order, ascending; None: everything it changes."""

    name: str
    weight: float = 1.0
    instances: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """The canonical spelling."""
        weight = "" if self.weight == 1.0 else f":{plain_number(self.weight)}"
        instances = "" if self.instances is None else f"@{_ranges(self.instances)}"
        return f"{_printed_name(self.name)}{weight}{instances}"


Request = str | Sequence[AdapterUse | tuple[str, float] | tuple[str, float, Any] | str]


def parse_request(text: str, name: str = "adapters") -> tuple[AdapterUse, ...]:
    """The uses that a text spells, in its order; see the top of this module. name: what errors call the text.

    Raises:
        RequestError: points at the character and says what is accepted there; as `checked_request`.
    """
    _check_length(text, name)
    cursor = TextCursor(text, name, RequestError, ACCEPTED)
    uses = [_use(cursor)]
    while cursor.accepts("+"):
        uses.append(_use(cursor))
    if not cursor.at_end:
        cursor.fail(cursor.position, "a plus sign is needed")
    _check_overlaps(uses, name)
    return tuple(uses)


def format_request(uses: Iterable[AdapterUse]) -> str:
    """The canonical spelling of a request: `parse_request` reads it back as it was."""
    return "+".join(map(str, uses))


def parse_suffix(text: str, position: int, name: str) -> tuple[float | None, tuple[int, ...] | None]:
    """(weight, instances) that a text spells from `position` on, after the name; each is None if it is left out.

    Raises:
        RequestError: as `parse_request`.
    """
    _check_length(text, name)
    accepted = "a folder, then :WEIGHT, then @INSTANCES, as in storm:0.5@10-11"
    cursor = TextCursor(text, name, RequestError, accepted, position)
    weight, instances = _weight(cursor), _instances(cursor)
    if not cursor.at_end:
        cursor.fail(cursor.position, "nothing may follow")
    return weight, instances


def checked_request(request: Request | None) -> tuple[AdapterUse, ...]:
    """A request however it was given: as text, or as a list of names, (name, weight), (name, weight, instances) or
    AdapterUse. Instances are a list of numbers, or text such as "10-11". Names in a list are taken as they are.

    Raises:
        RequestError: of another form, a weight that is not finite, or one adapter twice on the same instances.
    """
    if request is None:
        return ()
    if isinstance(request, str):
        return parse_request(request)
    if isinstance(request, Mapping) or not isinstance(request, Sequence):
        raise RequestError(
            'adapters must be a list such as [("storm", 1.0), ("poet", 0.5)], text such as "storm+poet:0.5", or None, '
            f"got {request!r:.80}"
        )
    uses = [_checked_use(item) for item in request]
    _check_overlaps(uses, "adapters")
    return tuple(uses)


def _use(cursor: TextCursor) -> AdapterUse:
    name = _name(cursor)
    weight, instances = _weight(cursor), _instances(cursor)
    return AdapterUse(name, 1.0 if weight is None else weight, instances)


def _name(cursor: TextCursor) -> str:
    cursor.skip_space()
    at, text = cursor.position, cursor.text
    if text.startswith('"', at):
        try:
            name, cursor.position = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            cursor.fail(at, "a name in quotes must be a JSON string")
    else:
        end = next((i for i in range(at, len(text)) if text[i] in SIGNS), len(text))
        name, cursor.position = text[at:end].rstrip(), end
    if not name:
        cursor.fail(at, "the name of an adapter is needed")
    return name


def _weight(cursor: TextCursor) -> float | None:
    if not cursor.accepts(":"):
        return None
    at, weight = cursor.decimal("the weight after the colon must be a number")
    if not math.isfinite(weight):
        cursor.fail(at, "the weight must be a finite number")
    return weight


def _instances(cursor: TextCursor) -> tuple[int, ...] | None:
    if not cursor.accepts("@"):
        return None
    found: set[int] = set()
    while True:
        at, first = cursor.integer("the number of a layer instance")
        last_at, last = cursor.integer("the number of a layer instance") if cursor.accepts("-") else (at, first)
        if max(first, last) >= MAX_INSTANCES:
            cursor.fail(
                at if first >= MAX_INSTANCES else last_at, f"there are never more than {MAX_INSTANCES} instances"
            )
        if last < first:
            cursor.fail(last_at, f"a range counts up: {last} comes before {first}")
        found.update(range(first, last + 1))
        if not cursor.accepts(","):
            return tuple(sorted(found))


def _checked_use(item: Any) -> AdapterUse:
    if isinstance(item, AdapterUse):
        item = (item.name, item.weight, item.instances)
    if not isinstance(item, (tuple, list)) or not 2 <= len(item) <= 3:
        item = (item, 1.0)
    name, weight, instances = item if len(item) == 3 else (*item, None)
    if not isinstance(name, str) or not name:
        raise RequestError(f"adapters: an item must be a name or (name, weight, instances), got {name!r:.80}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise RequestError(f"adapters: the weight of {name!r} must be a finite number, got {weight!r:.80}")
    return AdapterUse(name, float(weight), _checked_instances(name, instances))


def _checked_instances(name: str, instances: Any) -> tuple[int, ...] | None:
    if instances is None:
        return None
    if isinstance(instances, str):
        return parse_suffix(f"@{instances}", 0, f"adapters: the instances of {name!r}")[1]
    if not isinstance(instances, Iterable) or not (numbers := list(instances)):
        raise RequestError(
            f'adapters: the instances of {name!r} must be None, a list of numbers, or text such as "10-11", got '
            f"{instances!r:.80}"
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Integral) or not 0 <= number < MAX_INSTANCES:
            raise RequestError(
                f"adapters: the instances of {name!r} must be numbers from 0 to {MAX_INSTANCES - 1}, got {number!r:.80}"
            )
    return tuple(sorted({int(number) for number in numbers}))


def _check_overlaps(uses: Sequence[AdapterUse], name: str) -> None:
    """An adapter may be used once on an instance: to name it twice there is taken for a mistake."""
    seen: dict[str, list[AdapterUse]] = {}
    for use in uses:
        for other in seen.setdefault(use.name, []):
            if use.instances is None or other.instances is None:
                raise RequestError(
                    f"{name}: {use.name!r} is named twice: give it once, with one weight, or each time with the "
                    'instances it is for, as in "storm:0.5@0-9+storm@10-19"'
                )
            both = sorted(set(use.instances) & set(other.instances))
            if both:
                raise RequestError(f"{name}: {use.name!r} is named twice for the instances {_ranges(both)}")
        seen[use.name].append(use)


def _check_length(text: str, name: str) -> None:
    if len(text) > MAX_TEXT:
        raise RequestError(f"{name}: the text has {len(text)} characters, at most {MAX_TEXT} are accepted")


def _printed_name(name: str) -> str:
    plain = name == name.strip() and not any(sign in name for sign in SIGNS) and name.isprintable()
    return name if plain else json.dumps(name)


def _ranges(instances: Sequence[int]) -> str:
    """Ascending numbers as "3-5,8"."""
    runs: list[list[int]] = []
    for number in instances:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
