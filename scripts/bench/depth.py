"""Decoding and reading prompts at depth, in each cache format, beside llama.cpp in the same run.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/depth.py FOLDER --threads 2
    python scripts/bench/random_gguf.py FILE --shape 1.1b
    python scripts/bench/depth.py FOLDER --peer at_depth --peer-model FILE --peer-depths 4096 16384

All formats share one model's weights. A cache is not filled by reading a prompt, which takes most of an hour at 32k:
all of its pages are copies of one that a prompt has filled, and attention has as much to do with them. A measurement is
the time of --tokens tokens, one after the other, or of --rows rows of a prompt, at a depth; formats take turns within a
round, and ratios are taken within a round.

The peer is llama.cpp through llama_cpp/at_depth.cpp, which says how it is built. Its cache is filled in the same way,
with keys and values in the type that stands for the format in PEER_TYPES; it takes its turn within each round.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarking import add_engine_arguments, memory_reader, model_folder, paired, print_head, spread
from filled_caches import FORMATS, filled, models_of, varied_ids
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model

PEER_TYPES = {"fp16": ("f16", "f16"), "q8": ("q8_0", "q8_0"), "q4": ("q4_0", "q4_0"), "q8_q4": ("q8_0", "q4_0")}
PEER = "llama.cpp "  # before the format, in the names of measurements
GIB = 1 << 30
Measured = dict[tuple[str, int], list[float]]  # seconds by (format, depth), for each round


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 4096, 16384, 32768])
    parser.add_argument("--tokens", type=int, default=8, help="decoded in each measurement")
    parser.add_argument("--rows", type=int, default=128, help="of a prompt in each measurement; 0: leave prompts out")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="the program of llama_cpp/at_depth.cpp")
    parser.add_argument("--peer-model", type=Path, metavar="GGUF")
    parser.add_argument("--peer-version", default="of unknown version")
    parser.add_argument("--peer-depths", type=int, nargs="+", default=[4096])
    args = parser.parse_args()
    if (args.peer is None) != (args.peer_model is None):
        parser.error("--peer and --peer-model belong together")
    if args.smoke:
        args.rounds, args.depths, args.tokens, args.rows = 1, [0, 256], 2, 8
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder, torch.inference_mode():
        print_head(f"decoding and reading at depth, {folder.name}")
        longest = max(args.depths) + max(args.rows, args.tokens) + PAGE_TOKENS
        models = models_of(folder, args.formats, longest, compute=args.compute, threads=args.threads)
        decoding, reading = measured(models, args)
        report(models, decoding, reading, args)
        if args.peer is not None:
            report_peer(decoding, reading, args)


def measured(models: dict[str, Model], args: argparse.Namespace) -> tuple[Measured, Measured]:
    """Seconds of a token, and of a row of a prompt."""
    decoding: Measured = {}
    reading: Measured = {}
    for depth in args.depths:
        caches = {name: filled(model, depth) if depth else model.new_cache() for name, model in models.items()}
        with peers(depth, args) as others:
            for found, num_rows, at_once in ((decoding, args.tokens, 1), (reading, args.rows, args.rows)):
                if not num_rows:
                    continue
                works = {name: worker(models[name], caches[name], depth, num_rows, at_once) for name in models}
                works |= {name: peer.worker(num_rows, at_once) for name, peer in others.items()}
                for name, seconds in paired(works, args.rounds).items():
                    found[name, depth] = [second / num_rows for second in seconds]
    return decoding, reading


class Peer:
    """llama.cpp in a process of its own, with a filled cache."""

    def __init__(self, types: tuple[str, str], depth: int, args: argparse.Namespace) -> None:
        context = depth + max(args.rows, args.tokens) + PAGE_TOKENS
        command = [args.peer, args.peer_model, args.threads, *types, context]
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()
        self._ask(f"fill {depth}")

    def worker(self, num_rows: int, at_once: int):
        """Appends rows at the depth, so many at once, and forgets them."""
        return lambda: self._ask(f"run {num_rows} {at_once}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> None:
        print(line, file=self._process.stdin, flush=True)
        self._answer()

    def _answer(self) -> None:
        if not self._process.stdout.readline():
            raise SystemExit(f"the peer ended with {self._process.wait()}")


@contextmanager
def peers(depth: int, args: argparse.Namespace) -> Iterator[dict[str, Peer]]:
    """A peer for each format that it has, at the depths where it is asked for."""
    wanted = [name for name in args.formats if name in PEER_TYPES] if depth in args.peer_depths and args.peer else []
    started = {PEER + name: Peer(PEER_TYPES[name], depth, args) for name in wanted}
    yield started
    for peer in started.values():
        peer.close()


def worker(model: Model, cache: KvCache, depth: int, num_rows: int, at_once: int, logits: str = "last"):
    """Appends rows at a depth, so many at once, and forgets them."""

    def work() -> None:
        for first in range(0, num_rows, at_once):
            ids = varied_ids(first, at_once, model.config.vocab_size)
            model.forward(ids, cache, logits, seq_len=model.max_seq_len)
        cache.truncate(depth)

    return work


def report(models: dict[str, Model], decoding: Measured, reading: Measured, args: argparse.Namespace) -> None:
    """Times, beside the first format, and the bytes of cache that attention reads in a second."""
    limit = GIB / min(paired({"read": memory_reader(GIB)}, 3)["read"])
    first = args.formats[0]
    print(f"{args.compute}, {args.threads} threads, {args.rounds} rounds; memory is read at {limit / 1e9:.1f} GB/s")
    for title, found in (("a token", decoding), ("a row of a prompt", reading)):
        if not found:
            continue
        print(f"\n{title:20}" + f"{'ms':34}{f'{first} / this':34}" + ("cache read, GB/s" if found is decoding else ""))
        for depth in args.depths:
            for name in args.formats:
                times, others = found[name, depth], found[first, depth]
                ratios = [other / mine for mine, other in zip(times, others, strict=True)]
                line = f"{depth:>8,} {name:10} {spread([1e3 * t for t in times]):33} {spread(ratios):33}"
                if found is decoding and depth:
                    line += f" {cache_rate(models[name], times, found[name, args.depths[0]], depth) / 1e9:9.1f}"
                print(line.rstrip())


def cache_rate(model: Model, times: list[float], shallow: list[float], depth: int) -> float:
    """Bytes of keys and values read in a second of what depth adds to a token's time."""
    added = np.median(times) - np.median(shallow)
    return model.store.page_bytes * depth / PAGE_TOKENS / max(added, 1e-9)


def report_peer(decoding: Measured, reading: Measured, args: argparse.Namespace) -> None:
    """Times of the peer, and in how much of them we do the same."""
    print(f"\nllama.cpp {args.peer_version}, {args.peer_model.name}, flash attention")
    print(f"{'':20}{'a token, ms':34}{'this / ours':34}{'a row of a prompt, ms':34}this / ours")
    for name, depth in decoding:
        if not name.startswith(PEER):
            continue
        line = f"{depth:>8,} {PEER_TYPES[name.removeprefix(PEER)][0]:11}"
        for found in (decoding, reading) if reading else (decoding,):
            times, ours = found[name, depth], found[name.removeprefix(PEER), depth]
            ratios = [other / mine for mine, other in zip(ours, times, strict=True)]
            line += f"{spread([1e3 * t for t in times]):34}{spread(ratios):34}"
        print(line.rstrip())


if __name__ == "__main__":
    main()
