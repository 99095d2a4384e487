"""Decoding and reading prompts at depth, in each cache format, beside llama.cpp in the same run.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/depth.py FOLDER --threads 2
    python scripts/bench/random_gguf.py FILE --shape 1.1b
    python scripts/bench/depth.py FOLDER --peer PATH/llama-batched-bench --peer-model FILE --peer-depths 4096 16384

All formats share one model's weights. A cache is not filled by reading a prompt, which takes most of an hour at 32k:
all of its pages are copies of one that a prompt has filled, and attention has as much to do with them. A measurement is
the time of --tokens tokens, one after the other, or of --rows rows of a prompt, at a depth; formats take turns within a
round, and ratios are taken within a round.

The peer reads a prompt of that length and then writes as many tokens, with keys and values in the type of --peer-types
that stands in the place of the format in --formats. Its prompt is compared with the time of ours at the depths in
between: a row's time grows in a straight line with its depth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from benchmarking import add_engine_arguments, memory_reader, model_folder, paired, print_head, spread
from filled_caches import FORMATS, filled, models_of
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model

PEER_TYPES = {"fp16": "f16", "q8": "q8_0", "q4": "q4_0", "q8_q4": "q8_0,q4_0"}
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
    parser.add_argument("--peer", type=Path, metavar="PATH", help="llama.cpp's llama-batched-bench")
    parser.add_argument("--peer-model", type=Path, metavar="GGUF")
    parser.add_argument("--peer-version", help="where the peer itself does not know")
    parser.add_argument("--peer-depths", type=int, nargs="+", default=[4096])
    parser.add_argument("--peer-rounds", type=int, default=1)
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
        for found, num_rows, at_once in ((decoding, args.tokens, 1), (reading, args.rows, args.rows)):
            if num_rows:
                works = {name: worker(models[name], caches[name], depth, num_rows, at_once) for name in models}
                for name, seconds in paired(works, args.rounds).items():
                    found[name, depth] = [second / num_rows for second in seconds]
    return decoding, reading


def worker(model: Model, cache: KvCache, depth: int, num_rows: int, at_once: int):
    """Appends rows at a depth, so many at once, and forgets them."""

    def work() -> None:
        for first in range(0, num_rows, at_once):
            model.forward([300 + first] * at_once, cache, "last", seq_len=model.max_seq_len)
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
    """Tokens/s of both programs, at the depths and in the formats that both have."""
    print(f"\npeer: llama.cpp {args.peer_version or 'of unknown version'}; {args.peer_model.name}, flash attention on")
    print(f"{'':20}{'writes, tokens/s':20}{'ours':12}{'ours / peer':14}{'reads, tokens/s':20}{'ours':12}ours / peer")
    for depth in args.peer_depths:
        for name in (name for name in args.formats if name in PEER_TYPES):
            rounds = [peer_rates(PEER_TYPES[name], depth, args) for _ in range(args.peer_rounds)]
            reads, writes = (float(np.median(values)) for values in zip(*rounds, strict=True))
            ours = 1 / at_depth(decoding, name, depth, args.depths)
            line = f"{depth:>8,} {name:10} {writes:<20.2f}{ours:<12.2f}{ours / writes:<14.2f}"
            if reading:
                mean = depth / whole_prompt(reading, name, depth, args.depths)
                line += f"{reads:<20.1f}{mean:<12.1f}{mean / reads:.2f}"
            print(line.rstrip(), flush=True)


def peer_rates(types: str, depth: int, args: argparse.Namespace) -> tuple[float, float]:
    """(prompt tokens/s, written tokens/s) of llama.cpp for a prompt of that length."""
    keys, _, values = types.partition(",")
    options = {
        "-m": args.peer_model, "-c": depth + args.tokens + 256, "-t": args.threads, "-tb": args.threads, "-npp": depth,
        "-ntg": args.tokens, "-npl": 1, "-ctk": keys, "-ctv": values or keys, "-fa": "on", "--output-format": "jsonl",
    }  # fmt: skip
    started = time.perf_counter()
    command = [str(args.peer), *(str(part) for pair in options.items() for part in pair)]
    run = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode or not rows:
        after = time.perf_counter() - started
        raise SystemExit(f"{args.peer} ended with {run.returncode} after {after:.0f} s:\n{run.stderr[-2000:]}")
    return rows[0]["speed_pp"], rows[0]["speed_tg"]


def at_depth(found: Measured, name: str, depth: int, depths: list[int]) -> float:
    """Seconds at a depth, on the line between those that were measured."""
    return float(np.interp(depth, depths, [np.median(found[name, other]) for other in depths]))


def whole_prompt(reading: Measured, name: str, length: int, depths: list[int]) -> float:
    """Seconds for all rows of a prompt, each at its depth."""
    places = np.linspace(0, length, 65)
    return length * float(np.mean([at_depth(reading, name, int(place), depths) for place in places]))


if __name__ == "__main__":
    main()
