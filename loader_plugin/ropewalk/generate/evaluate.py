"""Perplexity of a text at several context lengths: how much a model gains from context, and where the gain ends.

    perplexity(L) = exp( mean over windows and positions i >= 1 of  -log p(token i | tokens 0..i-1 of its window) )

For each length L the text is cut into windows of L tokens that do not overlap, and every token of a window but its
first is scored. All lengths see the same tokens: as many as fill whole windows of the longest length. No bos token is
added. This is the usual measure of strided evaluation with stride L (as in the table of the airophin-13b-pntk-16k model
card); numbers compare between models only on the same text and tokenizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from ropewalk.adapters.request import Request
from ropewalk.base.errors import CheckpointError, RequestError
from ropewalk.generate.sampling import top_logprobs
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Cancelled, Progress, Sequence
from ropewalk.model.model import Model, checked_token_ids

LOGITS_BYTES = 64 * 2**20  # logits held at once: 524 rows of a vocabulary of 32,000


@dataclass(frozen=True, slots=True)
class PerplexityRow:
    """One context length. mean_nll: natural log; num_scored: windows times (length - 1)."""

    length: int
    num_windows: int
    num_scored: int
    mean_nll: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(mean_nll), or infinity if that is beyond float64."""
        return _exp(self.mean_nll)

    @property
    def tokens_per_s(self) -> float:
        """Tokens read per second."""
        return self.num_windows * self.length / self.seconds if self.seconds > 0 else 0.0


def perplexity(
    model: Model,
    token_ids: Items[int],
    lengths: Items[int],
    max_tokens: int | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    adapters: Request | None = None,
) -> list[PerplexityRow]:
    """The perplexity of a text at each context length, in the order given.

    max_tokens: use at most this many tokens from the start of the text. progress: called with (tokens read, tokens to
    read), all lengths together. cancelled: asked between the steps of the model; the rows finished so far are returned.
    adapters: as for `Model.forward`.
    Memory beside the model: one cache of the longest length, and logits in blocks of 64 MiB.

    Raises:
        RequestError: no lengths, a length below 2 or beyond the model's max_seq_len, or a text shorter than one window.
        CheckpointError: the model computes NaN or infinity.
    """
    ids = checked_token_ids(token_ids, model.config.vocab_size)
    _check_lengths(lengths, model.max_seq_len)
    longest = max(lengths)
    available = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    num_used = available // longest * longest
    if not num_used:
        raise RequestError(
            f"the text has {available} tokens, but one window of the longest length needs {longest}: "
            "take a longer text or shorter lengths"
        )
    cancelled = cancelled or (lambda: False)
    total = sum(num_used // length * length for length in lengths)
    scheduler = Scheduler(model)
    rows: list[PerplexityRow] = []
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with torch.inference_mode():
        for length in lengths:
            row = _row(scheduler, ids[: num_used // length * length], length, report, cancelled, adapters)
            if row is None:
                break
            rows.append(row)
    return rows


def _row(
    scheduler: Scheduler,
    ids: list[int],
    length: int,
    report: Callable[[int], None],
    cancelled: Cancelled,
    adapters: Request | None,
) -> PerplexityRow | None:
    """All windows of one length; None once cancelled."""
    started = time.perf_counter()
    total_nll = 0.0
    for first in range(0, len(ids), length):
        with scheduler.open(ids[first : first + length], adapters, keep=False) as sequence:
            nll = _window_nll(sequence, report, cancelled)
        if nll is None:
            return None
        total_nll += nll
    num_windows = len(ids) // length
    num_scored = num_windows * (length - 1)
    return PerplexityRow(length, num_windows, num_scored, total_nll / num_scored, time.perf_counter() - started)


def sequence_perplexity(sequence: Sequence, cancelled: Cancelled | None = None) -> float | None:
    """The perplexity of the prompt of an empty sequence, at least two tokens; None once cancelled.

    Raises:
        RequestError: as `Sequence.forward`. CheckpointError: the model computes NaN or infinity.
    """
    nll = _window_nll(sequence, lambda count: None, cancelled or (lambda: False))
    return None if nll is None else _exp(nll / (len(sequence.prompt_ids) - 1))


def _exp(mean_nll: float) -> float:
    """exp(mean_nll), or infinity if that is beyond float64."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf


def token_logprobs(
    sequence: Sequence, count: int = 0, cancelled: Cancelled | None = None
) -> list[tuple[float, tuple[tuple[int, float], ...]]] | None:
    """For every token but the first of the prompt of an empty sequence, its log probability and the `count` most likely
    tokens (id, log probability) there; None once cancelled.

    Raises:
        RequestError: as `Sequence.forward`.
    """
    found = []
    for start, logits in _blocks(sequence, cancelled or (lambda: False)):
        if logits is None:
            return None
        targets = sequence.prompt_ids[start + 1 : start + len(logits) + 1]
        found += [top_logprobs(row, target, count) for row, target in zip(logits.cpu(), targets, strict=False)]
    return found


def _window_nll(sequence: Sequence, report: Callable[[int], None], cancelled: Cancelled) -> float | None:
    """Sum of -log p over all tokens of the prompt but the first; None once cancelled."""
    total, ids = 0.0, sequence.prompt_ids
    for start, logits in _blocks(sequence, cancelled):
        if logits is None:
            return None
        num_rows = len(logits)
        targets = torch.tensor(ids[start + 1 : start + num_rows + 1], device=logits.device)  # [rows or rows - 1]
        logits = logits[: len(targets)]
        chosen = logits.gather(1, targets[:, None]).squeeze(1)
        total += float((torch.logsumexp(logits, dim=1) - chosen).double().sum())
        report(num_rows)
    if not math.isfinite(total):
        raise CheckpointError(
            f"{sequence.source}: the logits of this model are not finite: its weights are damaged, or the RoPE "
            "settings do not fit it"
        )
    return total


def _blocks(sequence: Sequence, cancelled: Cancelled) -> Iterator[tuple[int, torch.Tensor | None]]:
    """(first row, logits [rows, V]) of the prompt, in blocks of `LOGITS_BYTES`; logits None once cancelled."""
    ids = sequence.prompt_ids
    block = max(1, min(sequence.max_input_len, LOGITS_BYTES // (4 * sequence.vocab_size)))
    for start in range(0, len(ids), block):
        part = ids[start : start + block]
        yield start, sequence.forward(part, logits="all", cancelled=cancelled, seq_len=len(ids))


def _check_lengths(lengths: Items[int], max_seq_len: int) -> None:
    if not lengths:
        raise RequestError("no context lengths were given")
    for length in lengths:
        if not isinstance(length, int) or isinstance(length, bool) or length < 2:
            raise RequestError(f"a context length must be an integer of at least 2, got {length!r}")
        if length > max_seq_len:
            raise RequestError(
                f"a context length of {length} is more than the {max_seq_len} positions that the model was loaded for: "
                f"load it with max_seq_len={length}"
            )
