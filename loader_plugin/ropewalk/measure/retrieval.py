"""Retrieval by depth and length: does the model remember what it read long ago?

The tasks are those of measure/tasks.py. A token of an answer counts as found if it is the most likely one after the
tokens before it (the true ones, so that one mistake costs one token); an answer is found if all of its tokens are,
which is when greedy generation would write it. The share of tokens is reported beside it: with small models it shows a
slope where the share of whole answers is zero throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ropewalk.adapters.sets import Request
from ropewalk.base.errors import RequestError
from ropewalk.generate.generate import Cancelled, Progress
from ropewalk.measure.tables import csv_text
from ropewalk.measure.tasks import Task, Trial
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model


@dataclass(frozen=True, slots=True)
class RetrievalCell:
    """One length and depth (0: at the start, 1: just before the question). found: share of whole answers;
    tokens_found: share of their tokens; all_found: share of the contexts of that length that were asked at several
    depths and gave every answer; None where a context is asked once."""

    length: int
    depth: float
    trials: int
    found: float
    tokens_found: float
    all_found: float | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    depth: float
    right: int
    tokens: int


def retrieval_map(
    model: Model,
    task: Task,
    lengths: Sequence[int],
    depths: Sequence[float],
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    adapters: Request | None = None,
    kept: MutableMapping[str, Any] | None = None,
) -> list[RetrievalCell]:
    """All cells, length by length.

    progress: called with (questions asked, all questions). cancelled: asked between the steps of the model; the lengths
    finished so far are returned, and of the last one the depths. kept: trials that are there are not run again; those
    that are run are added. What consecutive trials have in common is computed once.

    Raises:
        RequestError: no lengths or depths; a depth outside of 0 to 1; a length beyond the model's max_seq_len or too
            short for the task.
    """
    _check(model, task, lengths, depths)
    kept = {} if kept is None else kept
    cache = model.new_cache(max(lengths))
    cells: list[RetrievalCell] = []
    planned = [(length, task.trials(length, depths)) for length in lengths]
    total = sum(len(trial.questions) for _, trials in planned for trial in trials)
    done = 0
    for length, trials in planned:
        found: list[list[_Answer]] = []
        for trial in trials:
            key = f"{length} {trial.name}"
            if key not in kept:
                answers = _ask(model, cache, trial, length, cancelled or (lambda: False), adapters)
                if answers is None:
                    return cells + _cells(length, depths, found, len(trials))
                kept[key] = [[answer.depth, answer.right, answer.tokens] for answer in answers]
            found.append([_Answer(*values) for values in kept[key]])
            done += len(trial.questions)
            if progress is not None:
                progress(done, total)
        cells += _cells(length, depths, found, len(trials))
    return cells


def kept_cells(kept: Mapping[str, Any], depths: Sequence[float]) -> list[RetrievalCell]:
    """The cells of trials that were kept by a map of these depths, the shortest length first."""
    by_length: dict[int, list[list[_Answer]]] = {}
    for key, answers in kept.items():
        by_length.setdefault(int(key.split()[0]), []).append([_Answer(*answer) for answer in answers])
    return [cell for length, found in sorted(by_length.items()) for cell in _cells(length, depths, found, len(found))]


def cells_csv(cells: Sequence[RetrievalCell]) -> str:
    """One line per cell."""
    columns = ("length", "depth", "trials", "keys_found", "tokens_found", "all_found")
    rows = [
        (c.length, f"{c.depth:g}", c.trials, f"{c.found:.4f}", f"{c.tokens_found:.4f}", _share(c.all_found))
        for c in cells
    ]
    return csv_text(columns, rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cells(
    length: int, depths: Sequence[float], found: Sequence[Sequence[_Answer]], num_trials: int
) -> list[RetrievalCell]:
    """The depths of which every trial is over."""
    several = len(depths) > 1 and all(len(answers) > 1 for answers in found) and bool(found)
    together = None
    if several:
        together = sum(all(a.right == a.tokens for a in answers) for answers in found) / len(found)
    per_depth = num_trials if several or len(depths) == 1 else num_trials // len(depths)
    cells = []
    for depth in depths:
        answers = [answer for trial in found for answer in trial if answer.depth == depth]
        if len(answers) < per_depth:
            continue
        whole = sum(answer.right == answer.tokens for answer in answers) / len(answers)
        tokens = sum(answer.right / answer.tokens for answer in answers) / len(answers)
        cells.append(RetrievalCell(length, depth, len(answers), whole, tokens, together))
    return cells


def _ask(
    model: Model, cache: KvCache, trial: Trial, length: int, cancelled: Cancelled, adapters: Request | None
) -> list[_Answer] | None:
    """The answers to all questions of a trial; None once cancelled."""
    answers = []
    for asked in trial.questions:
        ids = [*trial.context, *asked.ids, *asked.answer]
        reused = model.reusable_prefix(cache, ids, adapters)
        cache.truncate(min(reused, length - len(asked.answer) - 1))
        head, tail = ids[cache.length : -len(asked.answer) - 1], ids[-len(asked.answer) - 1 : -1]
        with torch.inference_mode():
            if head:
                model.forward(head, cache, "none", cancelled=cancelled, seq_len=length, adapters=adapters)
            if cancelled():
                return None
            logits = model.forward(tail, cache, "all", cancelled=cancelled, seq_len=length, adapters=adapters)  # [A, V]
        if logits is None:
            return None
        right = logits.argmax(dim=1).cpu() == torch.tensor(asked.answer)
        answers.append(_Answer(asked.depth, int(right.sum()), len(asked.answer)))
    return answers


def _check(model: Model, task: Task, lengths: Sequence[int], depths: Sequence[float]) -> None:
    for what, values in (("lengths", lengths), ("depths", depths)):
        if not len(values):
            raise RequestError(f"a retrieval map needs {what}, and there are none")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise RequestError(f"a depth is a number from 0 (the start) to 1 (just before the question), got {depth!r}")
    least = task.least(depths)
    for length in lengths:
        if length < least:
            raise RequestError(f"a length must be at least {least}, which the task takes, got {length}")
        if length > model.max_seq_len:
            raise RequestError(
                f"a length must be at most {model.max_seq_len}, which the model was loaded for, got {length}"
            )
