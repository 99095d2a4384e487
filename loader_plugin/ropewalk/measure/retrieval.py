"""Retrieval by depth and length: does the model remember what it read long ago?

A pass key is hidden at some depth of a text of some length, and the text ends with the beginning of the same sentence:

    filler ... The pass key is 71432. ... filler The pass key is    ->    71432 ?

A token of the key counts as found if it is the most likely one after the tokens before it (the true ones, so that one
mistake costs one token); a key is found if all of its tokens are, which is when greedy generation would write it. This
is the passkey test of Mohtashami and Jaggi 2023 (arXiv:2305.16300). The share of tokens is reported beside it: with
small models it shows a slope where the share of whole keys is zero throughout.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ropewalk.adapters.sets import Request
from ropewalk.base.errors import RequestError
from ropewalk.generate.generate import Cancelled, Progress
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import Tokenizer

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nThe pass key is "
KEY_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Probe:
    """A key in token ids: the text that tells it, the text that asks for it, and the key itself."""

    needle: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        """The number of tokens that it takes, without the filler."""
        return len(self.needle) + len(self.question) + len(self.answer)


@dataclass(frozen=True, slots=True)
class RetrievalCell:
    """One length and depth (0: at the start, 1: just before the question). found: share of whole keys;
    tokens_found: share of their tokens."""

    length: int
    depth: float
    trials: int
    found: float
    tokens_found: float


def make_probes(tokenizer: Tokenizer, trials: int, seed: int = 0) -> list[Probe]:
    """Keys drawn at random, the same for the same seed."""
    draw = random.Random(seed)
    return [_probe(tokenizer, "".join(draw.choices("0123456789", k=KEY_DIGITS))) for _ in range(trials)]


def retrieval_map(
    model: Model,
    filler: Sequence[int],
    probes: Sequence[Probe],
    lengths: Sequence[int],
    depths: Sequence[float],
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    adapters: Request | None = None,
) -> list[RetrievalCell]:
    """All cells, length by length. filler: token ids of a text, used from its start and repeated if it is short.

    progress: called with (cells done, all cells). cancelled: asked between the steps of the model; the cells finished
    so far are returned. What consecutive trials have in common is computed once.

    Raises:
        RequestError: no filler, lengths, depths or probes; a depth outside of 0 to 1; a length beyond the model's
            max_seq_len or too short for a key.
    """
    _check(model, filler, probes, lengths, depths)
    cache = model.new_cache(max(lengths))
    cells: list[RetrievalCell] = []
    with torch.inference_mode():
        for length in lengths:
            for depth in depths:
                shares = _trials(model, cache, filler, probes, length, depth, cancelled or (lambda: False), adapters)
                if shares is None:
                    return cells
                found = sum(share == 1.0 for share in shares) / len(shares)
                cells.append(RetrievalCell(length, depth, len(shares), found, sum(shares) / len(shares)))
                if progress is not None:
                    progress(len(cells), len(lengths) * len(depths))
    return cells


def cells_csv(cells: Sequence[RetrievalCell]) -> str:
    """One line per cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["length", "depth", "trials", "keys_found", "tokens_found"])
    for cell in cells:
        writer.writerow([cell.length, f"{cell.depth:g}", cell.trials, f"{cell.found:.4f}", f"{cell.tokens_found:.4f}"])
    return out.getvalue()


def _probe(tokenizer: Tokenizer, key: str) -> Probe:
    """The tokens of the key are those after the question, whose last word a tokenizer may join with the key."""
    question = tokenizer.encode(QUESTION, add_bos=False)
    whole = tokenizer.encode(QUESTION + key, add_bos=False)
    common = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
    needle = tokenizer.encode(NEEDLE.format(key=key), add_bos=False)
    return Probe(tuple(needle), tuple(whole[:common]), tuple(whole[common:]))


def _trials(
    model: Model,
    cache: KvCache,
    filler: Sequence[int],
    probes: Sequence[Probe],
    length: int,
    depth: float,
    cancelled: Cancelled,
    adapters: Request | None,
) -> list[float] | None:
    """The share of tokens found for each probe; None once cancelled."""
    shares = []
    for probe in probes:
        ids = _hidden(filler, probe, length, depth)
        reused = model.reusable_prefix(cache, ids, adapters)
        cache.truncate(min(reused, length - len(probe.answer) - 1))
        head, tail = ids[cache.length : -len(probe.answer) - 1], ids[-len(probe.answer) - 1 : -1]
        if head:
            model.forward(head, cache, "none", cancelled=cancelled, seq_len=length, adapters=adapters)
        if cancelled():
            return None
        logits = model.forward(tail, cache, "all", cancelled=cancelled, seq_len=length, adapters=adapters)  # [A, V]
        if logits is None:
            return None
        right = logits.argmax(dim=1).cpu() == torch.tensor(probe.answer)
        shares.append(float(right.double().mean()))
    return shares


def _hidden(filler: Sequence[int], probe: Probe, length: int, depth: float) -> list[int]:
    """`length` tokens: the filler with the needle at that depth, the question, and the answer."""
    num_filler = length - probe.length
    rounds = -(-num_filler // len(filler))
    text = (list(filler) * rounds)[:num_filler]
    place = round(depth * num_filler)
    return [*text[:place], *probe.needle, *text[place:], *probe.question, *probe.answer]


def _check(
    model: Model, filler: Sequence[int], probes: Sequence[Probe], lengths: Sequence[int], depths: Sequence[float]
) -> None:
    for what, values in (("filler text", filler), ("pass keys", probes), ("lengths", lengths), ("depths", depths)):
        if not len(values):
            raise RequestError(f"a retrieval map needs {what}, and there are none")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise RequestError(f"a depth is a number from 0 (the start) to 1 (just before the question), got {depth!r}")
    least = max(probe.length for probe in probes) + 1
    for length in lengths:
        if not least <= length <= model.max_seq_len:
            raise RequestError(
                f"a length must be from {least}, which a key and its question take, to the {model.max_seq_len} "
                f"positions that the model was loaded for, got {length}"
            )
