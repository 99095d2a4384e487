"""Attention over a cache in each format, beside float16: nanoseconds a key, and the bytes that are read a second.

    python scripts/bench/attention.py                                # heads of a 1.1B model, group of 8
    python scripts/bench/attention.py --heads 32 32 --dim 128        # heads of a 7B model, each with keys of its own

A step of a few rows over a long context, as in decoding, and one of many, as in reading a prompt. The formats take
turns within each round and are compared within it. Several layers are walked one after the other, so that keys come
from memory and not from a cache of the processor, as in a model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarking import paired, print_head
from ropewalk import native

FORMATS = ("f16", "q8", "q6", "q4", "q8_q4")
CHUNK = 1024  # rows appended at once


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs=2, type=int, default=[32, 4], metavar=("Hq", "Hkv"))
    parser.add_argument("--dim", type=int, default=64, help="of a head")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64], help="new tokens of a step")
    parser.add_argument("--depths", nargs="+", type=int, default=[2048, 32768], help="positions that they see")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa")
    parser.add_argument("--smoke", action="store_true", help="small numbers: does the script run?")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.depths, args.layers, args.rounds = [1, 3], [130], 1, 1
    runtime = native.Runtime(args.isa, args.threads)
    print_head("attention over a cache in each format")
    print(f"# {runtime.isa}, {args.threads} threads, {args.heads[0]} query heads over {args.heads[1]} of {args.dim}")
    print("# format   rows   depth   ns a key   GB/s   times as fast as the first, quartiles")
    for depth in args.depths:
        caches = {kind: [filled(runtime, args, kind, depth) for _ in range(args.layers)] for kind in args.formats}
        for num_rows in args.rows:
            report(args, caches, num_rows, depth)
    print("# append: microseconds a row of one layer")
    for kind, seconds in append_seconds(runtime, args).items():
        print(f"{kind:8}  {1e6 * seconds:8.2f}")


def filled(runtime: native.Runtime, args: argparse.Namespace, kind: str, depth: int) -> native.KvCache:
    """A cache of `depth` positions of random keys and values."""
    _, num_kv_heads = args.heads
    cache = native.KvCache(runtime, num_kv_heads, args.dim, depth, kind)
    rows = random_rows(CHUNK, num_kv_heads, args.dim)
    for start in range(0, depth, CHUNK):
        part = rows[: min(CHUNK, depth - start)]
        cache.append_(part, part, start)
    return cache


def report(args: argparse.Namespace, caches: dict[str, list[native.KvCache]], num_rows: int, depth: int) -> None:
    """A line for each format."""
    q = random_rows(num_rows, args.heads[0], args.dim)

    def walk(kind: str) -> Callable[[], None]:
        def work() -> None:
            for cache in caches[kind]:
                cache.attend(q, depth - num_rows)

        return work

    times = paired({kind: walk(kind) for kind in caches}, args.rounds)
    first = times[next(iter(caches))]
    for kind, seconds in times.items():
        layer = statistics.median(seconds) / args.layers
        ratios = [before / now for before, now in zip(first, seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        speed = caches[kind][0].num_bytes / layer / 1e9
        key = 1e9 * layer / depth
        print(f"{kind:8} {num_rows:6} {depth:7} {key:10.2f} {speed:6.1f}   {middle:.2f}  ({low:.2f} to {high:.2f})")


def append_seconds(runtime: native.Runtime, args: argparse.Namespace) -> dict[str, float]:
    """Of one row, in each format."""
    rows = random_rows(CHUNK, args.heads[1], args.dim)
    caches = {kind: native.KvCache(runtime, args.heads[1], args.dim, CHUNK, kind) for kind in args.formats}

    def work(kind: str) -> Callable[[], None]:
        return lambda: caches[kind].append_(rows, rows, 0)

    times = paired({kind: work(kind) for kind in caches}, args.rounds)
    return {kind: statistics.median(seconds) / CHUNK for kind, seconds in times.items()}


def random_rows(num_rows: int, num_heads: int, dim: int) -> torch.Tensor:
    """[T, H, D] float32."""
    return torch.randn(num_rows, num_heads, dim, generator=torch.Generator().manual_seed(num_rows))


if __name__ == "__main__":
    main()
