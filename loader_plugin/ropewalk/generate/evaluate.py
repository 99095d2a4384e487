"""Perplexity of a text at several context lengths: how much a model gains from context, and where the gain ends.

    perplexity(L) = exp( mean over windows and positions i >= 1 of  -log p(token i | tokens 0..i-1 of its window) )

For each length L the text is cut into windows of L tokens that do not overlap, and every token of a window but its
first is scored. All lengths see the same tokens: as many as fill whole windows of the longest length. No bos token is
added. This is the usual measure of strided evaluation with stride L (as in the table of the airophin-13b-pntk-16k model
card); numbers compare between models only on the same text and tokenizer.

The standard error takes stretches of `STRETCH` tokens for independent samples (base/estimate.py).

What was found in a window can be kept, so that an interrupted measurement goes on: sums of -log p over blocks of
`BLOCK` positions (`BlockSums`), from which measure/positions.py also tells how it changes within a window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch

from ropewalk.adapters.request import Request
from ropewalk.base.errors import CheckpointError, RequestError
from ropewalk.base.estimate import estimate
from ropewalk.generate.sampling import top_logprobs
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Cancelled, Progress, Sequence
from ropewalk.model.model import Model, checked_token_ids

LOGITS_BYTES = 64 * 2**20  # logits held at once: 524 rows of a vocabulary of 32,000
BLOCK = 64  # positions whose sum is kept
STRETCH = 512  # tokens of text that count as one sample of a standard error

Kept = MutableMapping[str, Any]  # what was measured before, under keys of our own; written to after every window


@dataclass(frozen=True, slots=True)
class PerplexityRow:
    """One context length. mean_nll: natural log; num_scored: windows times (length - 1); nll_error: the standard error
    of mean_nll, None where the text is too short to tell."""

    length: int
    num_windows: int
    num_scored: int
    mean_nll: float
    seconds: float
    nll_error: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(mean_nll), or infinity if that is beyond float64."""
        return exp_or_inf(self.mean_nll)

    @property
    def error(self) -> float | None:
        """The standard error of the perplexity."""
        return None if self.nll_error is None else self.perplexity * self.nll_error

    @property
    def tokens_per_s(self) -> float:
        """Tokens read per second."""
        return self.num_windows * self.length / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class BlockSums:
    """One window: sums[b] is the sum of -log p of the tokens at positions BLOCK b .. BLOCK (b + 1) - 1 of the window,
    but for position 0, which nothing predicts. seconds: for reading it."""

    length: int
    sums: tuple[float, ...]
    seconds: float

    def counts(self) -> list[int]:
        """How many tokens each sum is of."""
        ends = [min(BLOCK * (b + 1), self.length) - max(BLOCK * b, 1) for b in range(len(self.sums))]
        return [max(0, count) for count in ends]


def perplexity(
    model: Model,
    token_ids: Items[int],
    lengths: Items[int],
    max_tokens: int | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    adapters: Request | None = None,
    kept: Kept | None = None,
) -> list[PerplexityRow]:
    """The perplexity of a text at each context length, in the order given.

    max_tokens: use at most this many tokens from the start of the text. progress: called with (tokens read, tokens to
    read), all lengths together. cancelled: asked between the steps of the model; the rows finished so far are returned.
    adapters: as for `Model.forward`. kept: windows that are there are not read again; those that are read are added.
    Memory beside the model: one cache of the longest length, and logits in blocks of 64 MiB.

    Raises:
        RequestError: no lengths, a length below 2 or beyond the model's max_seq_len, or a text shorter than one window.
        CheckpointError: the model computes NaN or infinity.
    """
    ids = checked_token_ids(token_ids, model.config.vocab_size)
    num_used = tokens_used(len(ids), lengths, max_tokens, model.max_seq_len)
    total = sum(num_used // length * length for length in lengths)
    rows: list[PerplexityRow] = []
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for length in lengths:
        windows = read_windows(model, ids[: num_used // length * length], length, report, cancelled, adapters, kept)
        if windows is None:
            break
        rows.append(row_of(windows))
    return rows


def tokens_used(available: int, lengths: Items[int], max_tokens: int | None, max_seq_len: int) -> int:
    """How many tokens from the start of a text count, so that all lengths see the same.

    Raises:
        RequestError: as `perplexity`.
    """
    _check_lengths(lengths, max_seq_len)
    longest = max(lengths)
    available = available if max_tokens is None else min(available, max_tokens)
    num_used = available // longest * longest
    if max_tokens is not None and max_tokens < longest:
        raise RequestError(
            f"max_tokens is {max_tokens}, but one window of the longest length needs {longest}: use more tokens or "
            "shorter lengths"
        )
    if num_used <= 0:
        raise RequestError(
            f"the text has {available} tokens, but one window of the longest length needs {longest}: "
            "take a longer text or shorter lengths"
        )
    return num_used


def read_windows(
    model: Model,
    ids: Items[int],
    length: int,
    report: Callable[[int], None],
    cancelled: Cancelled | None = None,
    adapters: Request | None = None,
    kept: Kept | None = None,
) -> list[BlockSums] | None:
    """All whole windows of one length; None once cancelled. report: called with numbers of tokens read."""
    kept = {} if kept is None else kept
    scheduler = Scheduler(model)
    windows = []
    for number in range(len(ids) // length):
        key = f"{length} {number}"
        if key in kept:
            windows.append(_kept_window(length, kept[key]))
            report(length)
            continue
        started = time.perf_counter()
        with torch.inference_mode(), scheduler.open(ids[number * length :][:length], adapters, keep=False) as sequence:
            nlls = token_nlls(sequence, report, cancelled or (lambda: False))
        if nlls is None:
            return None
        sums = tuple(float(block.sum()) for block in torch.cat([nlls.new_zeros(1), nlls]).split(BLOCK))
        windows.append(BlockSums(length, sums, time.perf_counter() - started))
        kept[key] = {"sums": list(sums), "seconds": windows[-1].seconds}
    return windows


def kept_rows(kept: Mapping[str, Any]) -> list[PerplexityRow]:
    """A row for each length of which windows were kept, the shortest first."""
    by_length: dict[int, list[BlockSums]] = {}
    for key, value in kept.items():
        length = int(key.split()[0])
        by_length.setdefault(length, []).append(_kept_window(length, value))
    return [row_of(windows) for _, windows in sorted(by_length.items())]


def row_of(windows: Items[BlockSums]) -> PerplexityRow:
    """What windows of one length say together."""
    length = windows[0].length
    sums, counts = stretches(windows, 0, length)
    found = estimate(sums, counts)
    seconds = math.fsum(window.seconds for window in windows)
    return PerplexityRow(length, len(windows), found.count, found.mean, seconds, found.error)


def stretches(windows: Items[BlockSums], start: int, end: int) -> tuple[list[float], list[int]]:
    """Sums of -log p and numbers of tokens over stretches of text, of the positions start..end-1 of all windows.

    A stretch has STRETCH tokens, or what there is of it in a window; whole windows shorter than that share one with
    their neighbours. start: a multiple of BLOCK.
    """
    sums: list[float] = []
    counts: list[int] = []
    num_open = STRETCH  # tokens in the last stretch, which is full at first
    for window in windows:
        if window.length >= STRETCH or end - start < window.length:
            num_open = STRETCH
        for block, count in list(enumerate(window.counts()))[start // BLOCK : -(-end // BLOCK)]:
            if num_open >= STRETCH:
                sums.append(0.0)
                counts.append(0)
                num_open = 0
            sums[-1] += window.sums[block]
            counts[-1] += count
            num_open += BLOCK if window.length >= BLOCK else window.length
    return sums, counts


def sequence_perplexity(sequence: Sequence, cancelled: Cancelled | None = None) -> float | None:
    """The perplexity of the prompt of an empty sequence, at least two tokens; None once cancelled.

    Raises:
        RequestError: as `Sequence.forward`. CheckpointError: the model computes NaN or infinity.
    """
    nlls = token_nlls(sequence, lambda count: None, cancelled or (lambda: False))
    return None if nlls is None else exp_or_inf(float(nlls.mean()))


def exp_or_inf(mean_nll: float) -> float:
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
    for start, logits in logits_blocks(sequence, cancelled or (lambda: False)):
        if logits is None:
            return None
        targets = sequence.prompt_ids[start + 1 : start + len(logits) + 1]
        found += [top_logprobs(row, target, count) for row, target in zip(logits.cpu(), targets, strict=False)]
    return found


def token_nlls(sequence: Sequence, report: Callable[[int], None], cancelled: Cancelled) -> torch.Tensor | None:
    """-log p of every token of the prompt of an empty sequence but the first: [T - 1] float64; None once cancelled.

    Raises:
        RequestError: as `Sequence.forward`. CheckpointError: the model computes NaN or infinity.
    """
    ids, found = sequence.prompt_ids, []
    for start, logits in logits_blocks(sequence, cancelled):
        if logits is None:
            return None
        num_rows = len(logits)
        targets = torch.tensor(ids[start + 1 : start + num_rows + 1], device=logits.device)  # [rows or rows - 1]
        logits = logits[: len(targets)]
        chosen = logits.gather(1, targets[:, None]).squeeze(1)
        found.append((torch.logsumexp(logits, dim=1) - chosen).double().cpu())
        report(num_rows)
    nlls = torch.cat(found)
    if not bool(torch.isfinite(nlls).all()):
        raise CheckpointError(
            f"{sequence.source}: the logits of this model are not finite: its weights are damaged, or the RoPE "
            "settings do not fit it"
        )
    return nlls


def logits_blocks(sequence: Sequence, cancelled: Cancelled) -> Iterator[tuple[int, torch.Tensor | None]]:
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


def _kept_window(length: int, value: Any) -> BlockSums:
    return BlockSums(length, tuple(value["sums"]), value["seconds"])
