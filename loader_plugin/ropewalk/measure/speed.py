"""How fast a model reads prompts and writes tokens, beside the limits of the machine that it runs on.

    decoding   every weight and every cached key and value is read once per token: the limit is reading memory
    reading    every weight is multiplied with every token of the prompt: the limit is multiplying

Limits and speeds take turns within a round, and shares are taken within a round, because clocks and neighbours change.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ropewalk.base.errors import RequestError, UnsupportedError
from ropewalk.model.model import Model
from ropewalk.model.work import met_bytes

READ_FLOATS = 1 << 26  # a quarter of a gigabyte, past every cache
PROBE_S = 0.05  # of multiplying, for one sample
DECODED_TOKENS = 8  # of a sample
FIRST_TOKEN = 300  # past the special ones
Progress = Callable[[int, int], None]


class Sample(NamedTuple):
    """The limits of one round, per second. operations: of the kind that the model's linears are made of."""

    read_bytes: float
    operations: float


@dataclass(frozen=True, slots=True)
class Speed:
    """One way to run the model, measured. tokens_s, read_share, operations_share: one of each round.

    num_bytes, operations: that a token moves and takes at least. The shares are those of the limits of the same round.
    """

    name: str
    num_bytes: float
    operations: float
    tokens_s: tuple[float, ...]
    read_share: tuple[float, ...]
    operations_share: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Speeds:
    """Limits by round, and the speeds. kind: "int8" or "f32", of the operations."""

    machine: str
    kind: str
    limits: tuple[Sample, ...]
    speeds: tuple[Speed, ...]

    @property
    def limit(self) -> Sample:
        """The medians of the rounds."""
        return Sample(*(statistics.median(values) for values in zip(*self.limits, strict=True)))


def measure_speeds(model: Model, lengths: Sequence[int], rounds: int, progress: Progress | None = None) -> Speeds:
    """Read prompts of these lengths and decode after each of them, `rounds` times after a warm-up.

    progress: called with (prompts done, prompts in all).

    Raises:
        UnsupportedError: a backend other than the compiled one. RequestError: a length that the context has no room
            for, or no rounds.
    """
    if model.backend.name != "cpu":
        raise UnsupportedError(
            f"speeds are compared with the limits of a CPU, and this is backend {model.backend.name!r}"
        )
    if rounds < 1 or not lengths:
        raise RequestError(f"at least one round and one length are needed, got {rounds} and {len(lengths)}")
    for length in lengths:
        if not 1 <= length <= model.max_seq_len - DECODED_TOKENS:
            raise RequestError(
                f"a prompt of {length} tokens and {DECODED_TOKENS} more do not fit a context of {model.max_seq_len}: "
                "give another length, or --max-seq-len"
            )
    kind = "int8" if model.backend.compute == "int8" else "f32"
    limits = _Limits(model, kind)
    rates: dict[tuple[int, bool], list[float]] = {(n, reads): [] for n in lengths for reads in (True, False)}
    samples = []
    with torch.inference_mode():
        for number in range(rounds + 1):  # the first warms up
            sample = limits.sample()
            for place, length in enumerate(lengths):
                found = _timed(model, length)
                if number:
                    for reads, rate in zip((True, False), found, strict=True):
                        rates[length, reads].append(rate)
                if progress is not None:
                    progress(number * len(lengths) + place + 1, (rounds + 1) * len(lengths))
            if number:
                samples.append(sample)
    speeds = [
        _speed(model, length, reads, rates[length, reads], samples) for reads in (False, True) for length in lengths
    ]
    runtime = model.backend.runtime
    return Speeds(f"{runtime.threads} threads, {runtime.isa}", kind, tuple(samples), tuple(speeds))


class _Limits:
    """What this machine does a second at most, on the threads of the model."""

    def __init__(self, model: Model, kind: str) -> None:
        self._limits = model.backend.runtime.limits(READ_FLOATS)
        self._kind = kind
        self._steps = 1 << 12
        while self._products()[1] < PROBE_S:
            self._steps *= 2

    def sample(self) -> Sample:
        """One measurement of each."""
        start = time.perf_counter()
        num_bytes = self._limits.read()
        read_s = time.perf_counter() - start
        operations, multiply_s = self._products()
        return Sample(num_bytes / read_s, operations / multiply_s)

    def _products(self) -> tuple[int, float]:
        start = time.perf_counter()
        operations = self._limits.multiply(self._kind, self._steps)
        return operations, time.perf_counter() - start


def _timed(model: Model, length: int) -> tuple[float, float]:
    """(tokens a second of reading a prompt, of decoding after it)."""
    ids = [FIRST_TOKEN % model.config.vocab_size] * length
    cache = model.new_cache(length + DECODED_TOKENS)
    start = time.perf_counter()
    model.forward(ids, cache)
    read = time.perf_counter()
    for _ in range(DECODED_TOKENS):
        model.forward(ids[:1], cache)
    return length / (read - start), DECODED_TOKENS / (time.perf_counter() - read)


def _speed(model: Model, length: int, reads: bool, rates: Sequence[float], samples: Sequence[Sample]) -> Speed:
    layers = [model.weights.layers[instance.weights_index] for instance in model.instances]
    head = model.weights.head
    # Every query meets every key before it, half of them on average while a prompt is read; so do the values.
    keys = length / 2 if reads else length
    operations = model.work.operations(keys)
    head_products = 2 * head.in_features * head.out_features
    if reads:  # some token of a prompt meets every expert
        num_bytes = (sum(layer.num_bytes for layer in layers) + head.num_bytes) / length
        operations += head_products / length
    else:
        num_bytes = sum(met_bytes(model.config, layers)) + head.num_bytes + model.cache_bytes(length)
        operations += head_products
    return Speed(
        name=f"reading {length:,}" if reads else f"decoding after {length:,}",
        num_bytes=num_bytes,
        operations=operations,
        tokens_s=tuple(rates),
        read_share=tuple(rate * num_bytes / sample.read_bytes for rate, sample in zip(rates, samples, strict=True)),
        operations_share=tuple(
            rate * operations / sample.operations for rate, sample in zip(rates, samples, strict=True)
        ),
    )


COLUMNS = ("", "tokens/s", "lowest", "highest", "GB/s", "of memory", "GOP/s", "of products")


def speed_rows(found: Speeds) -> list[tuple[str, ...]]:
    """A row for each limit and each speed: medians, and the range of tokens/s."""
    limit = found.limit
    rows = [
        ("limit: reading memory", "", "", "", f"{limit.read_bytes / 1e9:.1f}", "", "", ""),
        (f"limit: {found.kind} products", "", "", "", "", "", f"{limit.operations / 1e9:.0f}", ""),
    ]
    for speed in found.speeds:
        rate = statistics.median(speed.tokens_s)
        rows.append(
            (
                speed.name,
                *(f"{value:.1f}" for value in (rate, min(speed.tokens_s), max(speed.tokens_s))),
                f"{rate * speed.num_bytes / 1e9:.1f}",
                f"{100 * statistics.median(speed.read_share):.0f}%",
                f"{rate * speed.operations / 1e9:.0f}",
                f"{100 * statistics.median(speed.operations_share):.0f}%",
            )
        )
    return rows
