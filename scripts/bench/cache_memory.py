"""Memory of a cached token in each format: resident, beside the arithmetic of the format.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/cache_memory.py FOLDER --depth 8192

The memory of the process is read before a cache is filled and after. A recent window counts apart: it does not grow.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarking import add_engine_arguments, model_folder, print_head
from filled_caches import FORMATS, filled, models_of
from ropewalk.backends.protocol import PAGE_TOKENS


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--depth", type=int, default=8192)
    args = parser.parse_args()
    if args.smoke:
        args.depth = 512
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder, torch.inference_mode():
        print_head(f"memory of cached tokens, {folder.name}")
        models = models_of(folder, args.formats, args.depth + PAGE_TOKENS, compute=args.compute, threads=args.threads)
        print(f"{'':12}{'bytes a token':>15}{'arithmetic':>12}{'ratio':>8}{'of fp16':>9}{'window, MiB':>13}")
        for name, model in models.items():
            filled(model, PAGE_TOKENS)  # what a first prompt leaves behind in the allocator
            before = resident_bytes()
            cache = filled(model, args.depth)
            window = sum(held.num_bytes for held in cache.recent.values())
            found = (resident_bytes() - before - window) / args.depth
            one, fp16 = (
                len(model.instances) * kind.position_bytes(model.config.num_kv_heads, model.config.head_dim)
                for kind in (model.cache_format, model.cache_format.exact)
            )
            ratios = f"{found / one:8.4f}{one / fp16:9.4f}"
            print(f"{name:12}{found:15,.0f}{one:12,}{ratios}{window / (1 << 20):13.1f}", flush=True)
            del cache


def resident_bytes() -> int:
    """Bytes of this process that lie in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
