"""Curves and maps that were measured when a model was made, and come with it: drawn at once, measured by nobody again.

    FOLDER/curves.json   a record of kind "perplexity", as `ropewalk compare --record` writes it: a part per curve
    FOLDER/maps.json     a record of kind "retrieval", as `ropewalk retrieval --record` writes it: a part per map

Their numbers are computed from what the records keep by the functions that the measurements use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ropewalk.base.errors import RequestError
from ropewalk.generate.evaluate import kept_rows
from ropewalk.generate.generate import Progress
from ropewalk.measure.compare import Curve, compare_perplexity, part_of
from ropewalk.measure.record import Record, read_parts, text_facts
from ropewalk.measure.retrieval import RetrievalCell, kept_cells, retrieval_map
from ropewalk.measure.settings import facts_of
from ropewalk.measure.tasks import Task
from ropewalk.model.model import Model
from ropewalk.model.variants import Variant, open_variant

CURVES, MAPS = "curves.json", "maps.json"

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Map:
    """What a way to run the model finds again, by depth and length."""

    name: str
    cells: tuple[RetrievalCell, ...]


@dataclass(frozen=True, slots=True)
class StoredLab:
    """All that is stored with a model; both are empty where nothing is."""

    curves: tuple[Curve, ...] = ()
    maps: tuple[Map, ...] = ()


def read_lab(folder: Path) -> StoredLab:
    """What is stored in a folder.

    Raises:
        RequestError: a record that is damaged or of another kind; the message names the file and the part.
    """
    curves = _parts(folder / CURVES, "perplexity", _curve)
    return StoredLab(tuple(curves), tuple(_parts(folder / MAPS, "retrieval", _map)))


def store_curves(
    folder: Path,
    model: Model,
    token_ids: Sequence[int],
    lengths: Sequence[int],
    variants: Sequence[Variant],
    max_tokens: int,
    progress: Progress | None = None,
) -> None:
    """Measure a curve per variant, and store them; what is stored already is not measured again. Arguments and errors
    as for `compare_perplexity` and `Record`."""
    record = Record(folder / CURVES, "perplexity", text_facts(token_ids))
    compare_perplexity(model, token_ids, lengths, variants, max_tokens, progress, record=record)


def store_maps(
    folder: Path,
    model: Model,
    token_ids: Sequence[int],
    task: Task,
    lengths: Sequence[int],
    depths: Sequence[float],
    variants: Sequence[Variant],
    progress: Progress | None = None,
) -> None:
    """As `store_curves`, a map per variant. token_ids: of the text that `task` hides something in. Further arguments
    and errors as for `retrieval_map`."""
    record = Record(folder / MAPS, "retrieval", text_facts(token_ids))
    for number, variant in enumerate(variants):
        made, adapters = open_variant(model, variant, max(lengths))
        facts = {**facts_of(made, variant.adapters), **task.facts, "depths": list(depths)}
        report = part_of(progress, number, len(variants))
        retrieval_map(made, task, lengths, depths, report, adapters=adapters, kept=record.part(variant.name, facts))


def _parts(path: Path, kind: str, read: Callable[[str, Mapping[str, Any]], Found]) -> list[Found]:
    if not path.exists():
        return []
    found = []
    for name, part in read_parts(path, kind).items():
        try:
            found.append(read(name, part))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise RequestError(
                f"{path}: {name} is not what a record of {kind} keeps ({type(error).__name__}: {error}): remove the "
                "file, and measure again"
            ) from error
    return found


def _curve(name: str, part: Mapping[str, Any]) -> Curve:
    return Curve(name, str(part["settings"]["RoPE"]), tuple(kept_rows(part["kept"])))


def _map(name: str, part: Mapping[str, Any]) -> Map:
    return Map(name, tuple(kept_cells(part["kept"], part["settings"]["depths"])))
