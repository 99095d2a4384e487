"""How far one setting is from another, token by token: Kullback-Leibler divergence and agreement.

    KL(i) = sum over tokens t of  p(t | i) log( p(t | i) / q(t | i) )      p: the base, q: the other setting

at every position i of windows that do not overlap. Of the KL the mean, the median and the 99th percentile tell more
than perplexity does: what happens rarely and what cancels out is seen. Agreement is the share of positions at which
both find the same token most likely. The ratio of perplexities, q to p, has a standard error of its own, from the
differences token by token, which is far below that of either perplexity (base/estimate.py).

Both settings read a window side by side, block of logits by block, and of each position only numbers are kept: the
logits of a whole text lie neither in memory nor on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ropewalk.base.errors import CheckpointError
from ropewalk.base.estimate import estimate
from ropewalk.generate.evaluate import BLOCK, BlockSums, exp_or_inf, logits_blocks, stretches, tokens_used
from ropewalk.generate.generate import Cancelled, Progress
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Sequence as OpenSequence
from ropewalk.measure.settings import OpenSetting
from ropewalk.measure.tables import csv_text, with_error
from ropewalk.model.token_ids import checked_token_ids

ROWS = 64  # whose probabilities are held in float64 at once
KL_DIGITS = 6  # of each value that is kept


@dataclass(frozen=True, slots=True)
class Divergence:
    """What two settings have in common over a text. kl_*: in nats; agreement: 0 to 1; error: the standard errors of the
    mean KL and of the ratio of perplexities, None where the text is too short to tell."""

    name: str
    num_windows: int
    num_tokens: int
    kl_mean: float
    kl_error: float | None
    kl_median: float
    kl_99: float
    agreement: float
    base_perplexity: float
    perplexity: float
    ratio_error: float | None

    @property
    def ratio(self) -> float:
        """The perplexity of the setting divided by that of the base."""
        return self.perplexity / self.base_perplexity


@dataclass(frozen=True, slots=True)
class _Window:
    """One window. kl: of every position but the last; same: at how many of them the most likely token is the same."""

    kl: tuple[float, ...]
    same: int
    base: BlockSums
    other: BlockSums


def divergence(
    base: OpenSetting,
    other: OpenSetting,
    token_ids: Sequence[int],
    length: int,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    kept: MutableMapping[str, Any] | None = None,
) -> Divergence | None:
    """The divergence of `other` from `base` over the windows of that length; of those read so far once cancelled, None
    if there are none.

    max_tokens: use at most this many tokens from the start of the text. progress: called with (tokens read, tokens to
    read). kept: windows that are there are not read again; those that are read are added.

    Raises:
        RequestError: a length below 2 or beyond either model's max_seq_len, or a text shorter than one window.
        CheckpointError: a model computes NaN or infinity.
    """
    ids = checked_token_ids(token_ids, base.model.config.vocab_size)
    longest = min(base.model.max_seq_len, other.model.max_seq_len)
    num_used = tokens_used(len(ids), [length], max_tokens, longest)
    kept = {} if kept is None else kept
    windows: list[_Window] = []
    schedulers = Scheduler(base.model), Scheduler(other.model)
    for start in range(0, num_used, length):
        key = f"{length} {len(windows)}"
        if key not in kept:
            found = _read(base, other, schedulers, ids[start : start + length], cancelled or (lambda: False))
            if found is None:
                break
            kept[key] = found
        windows.append(_window(length, kept[key]))
        if progress is not None:
            progress(start + length, num_used)
    return _joined(other.setting.name, windows) if windows else None


def divergences_csv(found: Sequence[Divergence]) -> str:
    """One line per setting."""
    columns = ("setting", "kl_mean", "kl_standard_error", "kl_median", "kl_99", "agreement", "base_perplexity")
    columns += ("perplexity", "perplexity_ratio", "ratio_standard_error", "windows", "tokens")
    rows = [
        (
            d.name,
            *(_number(value) for value in (d.kl_mean, d.kl_error, d.kl_median, d.kl_99, d.agreement)),
            *(_number(value) for value in (d.base_perplexity, d.perplexity, d.ratio, d.ratio_error)),
            d.num_windows,
            d.num_tokens,
        )
        for d in found
    ]
    return csv_text(columns, rows)


def divergence_rows(found: Sequence[Divergence]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a table for people."""
    rows = [
        (
            one.name,
            f"{one.kl_mean:.2e}",
            f"{one.kl_median:.2e}",
            f"{one.kl_99:.2e}",
            f"{100 * one.agreement:.2f}%",
            f"{one.perplexity:.4f}",
            with_error(one.ratio, one.ratio_error, 5),
        )
        for one in found
    ]
    return ("setting", "mean KL", "median KL", "99% KL", "same top", "perplexity", "ratio to the base"), rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _read(
    base: OpenSetting,
    other: OpenSetting,
    schedulers: tuple[Scheduler, Scheduler],
    ids: list[int],
    cancelled: Cancelled,
) -> dict[str, Any] | None:
    """One window, as it is kept; None once cancelled."""
    kl: list[float] = []
    nlls: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    same = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        sequences = [
            stack.enter_context(scheduler.open(ids, setting.adapters, keep=False))
            for scheduler, setting in zip(schedulers, (base, other), strict=True)
        ]
        for start, ours, theirs in _side_by_side(sequences, cancelled):
            if ours is None or theirs is None:
                return None
            for first in range(start, min(start + len(ours), len(ids) - 1), ROWS):
                rows = slice(first - start, min(first - start + ROWS, len(ids) - 1 - start))
                p, q = (_log_probabilities(logits[rows]) for logits in (ours, theirs))  # [rows, V] float64
                kl += (p.exp() * (p - q)).sum(dim=1).clamp_min(0).tolist()
                same += int((p.argmax(dim=1) == q.argmax(dim=1)).sum())
                targets = torch.tensor(ids[first + 1 : first + 1 + len(p)])[:, None]
                for found, logs in zip(nlls, (p, q), strict=True):
                    found.append(-logs.gather(1, targets).squeeze(1))
    for setting, sums in zip((base, other), nlls, strict=True):
        if not all(bool(torch.isfinite(part).all()) for part in sums):
            raise CheckpointError(
                f"{setting.model.config.source}: the logits under {setting.setting.name!r} are not finite: the weights "
                "are damaged, or the RoPE settings do not fit the model"
            )
    return {
        "kl": [float(f"{value:.{KL_DIGITS}g}") for value in kl],
        "same": same,
        "base": _block_sums(nlls[0]),
        "other": _block_sums(nlls[1]),
    }


def _side_by_side(
    sequences: list[OpenSequence], cancelled: Cancelled
) -> Iterator[tuple[int, torch.Tensor | None, torch.Tensor | None]]:
    """(first row, logits of one, logits of the other), in blocks of rows that both have: the sequences may be of models
    that read in chunks of different sizes."""
    readers = [logits_blocks(sequence, cancelled) for sequence in sequences]
    pending: list[torch.Tensor | None] = [None, None]
    start = 0
    while start < len(sequences[0].prompt_ids):
        for side, reader in enumerate(readers):
            if pending[side] is None:
                pending[side] = next(reader)[1]
                if pending[side] is None:
                    yield start, None, None
                    return
        count = min(len(part) for part in pending)
        yield start, pending[0][:count], pending[1][:count]
        pending = [part[count:] if len(part) > count else None for part in pending]
        start += count


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double().cpu(), dim=1)


def _block_sums(nlls: list[torch.Tensor]) -> list[float]:
    """As `evaluate.BlockSums` has them: position 0 counts as nothing."""
    whole = torch.cat([torch.zeros(1, dtype=torch.float64), *nlls])
    return [float(block.sum()) for block in whole.split(BLOCK)]


def _window(length: int, value: Any) -> _Window:
    base, other = (BlockSums(length, tuple(value[side]), 0.0) for side in ("base", "other"))
    return _Window(tuple(value["kl"]), value["same"], base, other)


def _joined(name: str, windows: list[_Window]) -> Divergence:
    length = windows[0].base.length
    kl = torch.tensor([value for window in windows for value in window.kl], dtype=torch.float64)
    base, counts = stretches([window.base for window in windows], 0, length)
    other, _ = stretches([window.other for window in windows], 0, length)
    base_nll, other_nll = (math.fsum(sums) / sum(counts) for sums in (base, other))
    change = estimate([b - a for a, b in zip(base, other, strict=True)], counts)
    kl_sums, kl_counts = stretches([_kl_blocks(window, length) for window in windows], 0, length)
    mean = estimate(kl_sums, kl_counts)
    ratio = exp_or_inf(change.mean)
    return Divergence(
        name=name,
        num_windows=len(windows),
        num_tokens=len(kl),
        kl_mean=mean.mean,
        kl_error=mean.error,
        kl_median=float(kl.quantile(0.5)),
        kl_99=float(kl.quantile(0.99)),
        agreement=sum(window.same for window in windows) / len(kl),
        base_perplexity=exp_or_inf(base_nll),
        perplexity=exp_or_inf(other_nll),
        ratio_error=None if change.error is None else ratio * change.error,
    )


def _kl_blocks(window: _Window, length: int) -> BlockSums:
    """The KL in the blocks of the tokens that are predicted."""
    whole = [0.0, *window.kl]
    return BlockSums(length, tuple(math.fsum(whole[i : i + BLOCK]) for i in range(0, length, BLOCK)), 0.0)
