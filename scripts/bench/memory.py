"""Loading time and peak memory, and how prefill memory grows with the prompt.

    python scripts/bench/random_checkpoint.py FOLDER --shape 7b
    python scripts/bench/memory.py FOLDER

With --order it also measures what a layer order costs: every layer twice beside every layer once, and the time that a
change of the order takes.

Every measurement runs in a process of its own, because a process's peak never falls. Reading and loading are timed
twice: from the disk (the system is asked to forget the files before each run), and with the files in the page cache;
reading once through a small buffer, and once into memory that holds the whole model, which any loader must do and which
can cost more than the reading (on a virtual machine, fresh memory is not free).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarking import print_head, spread

MIB = 1 << 20


def main() -> None:
    """Measure and print a table, or (in a child process) one measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-seq-len", type=int, default=2048, help="for loading")
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="prompt lengths to prefill")
    parser.add_argument("--rounds", type=int, default=3, help="of loading; 0: leave it out")
    parser.add_argument("--order", type=int, metavar="TOKENS", help="measure layer orders, with a prompt this long")
    parser.add_argument("--child", choices=("load", "read", "hold", "import", "order"), help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    print_head(f"loading and memory of {args.folder.name}")
    if args.rounds:
        report_loading(args)
    if args.prompts:
        report_prefill(args)
    if args.order:
        report_order(args)


def report_loading(args: argparse.Namespace) -> None:
    """Loading beside reading the files; peak memory beside file size."""
    size = sum(f.stat().st_size for f in weight_files(args.folder))
    print(f"  files                              {size / MIB:9.0f} MiB")
    for place, cold in (("disk", True), ("page cache", False)):
        times: dict[str, list[float]] = {"read": [], "hold": [], "load": []}
        run_child(args, "read")
        for _ in range(args.rounds):
            for work, seconds in times.items():
                result = run_child(args, work, cold=cold)
                seconds.append(result["seconds"])
        peak = result["peak"]
        print(f"  from the {place}")
        print(f"    reading them, s                  {spread(times['read'])}")
        print(f"    reading them into memory, s      {spread(times['hold'])}")
        print(f"    loading, s                       {spread(times['load'])}")
        for work, name in (("read", "reading          "), ("hold", "reading to memory")):
            ratios = [load / read for load, read in zip(times["load"], times[work], strict=True)]
            print(f"    loading / {name}      {spread(ratios)}")
    base = run_child(args, "import")["peak"]
    print(f"  peak memory                        {peak / MIB:9.0f} MiB")
    print(f"  of that: imports                   {base / MIB:9.0f} MiB")
    print(f"  peak beyond files                  {(peak - size) / MIB:9.0f} MiB")


def report_prefill(args: argparse.Namespace) -> None:
    """Peak memory by prompt length, beside what the cache itself takes."""
    print("  prompt tokens   peak MiB   cache MiB   peak beyond the first, without cache, MiB")
    first = None
    for prompt in args.prompts:
        result = run_child(args, "load", prompt)
        beyond = result["peak"] - result["cache"]
        first = beyond if first is None else first
        print(
            f"  {prompt:13d}  {result['peak'] / MIB:9.1f}  {result['cache'] / MIB:10.1f}"
            f"   {(beyond - first) / MIB:9.1f}   ({result['seconds']:.1f} s)"
        )


def report_order(args: argparse.Namespace) -> None:
    """Memory in use after a prompt with every layer once and twice, beside the caches; the time of the change."""
    result = run_child(args, "order", args.order)
    (once, cache), (twice, more_cache) = result["used"]
    growth, more = twice - once, more_cache - cache
    print(f"  every layer twice, after a prompt of {args.order} tokens")
    print(f"    memory in use, once              {once / MIB:9.1f} MiB")
    print(f"    memory in use, twice             {twice / MIB:9.1f} MiB")
    print(f"    growth                           {growth / MIB:9.1f} MiB")
    print(f"    of that: more cache              {more / MIB:9.1f} MiB")
    print(f"    beyond the cache                 {(growth - more) / MIB:9.1f} MiB   (target: nothing)")
    print(f"    set_layer_order, ms              {spread([1e3 * s for s in result['change']])}")
    print(f"    and a new cache, ms              {spread([1e3 * s for s in result['cache']])}   (target: below 1000)")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights."""
    return sorted(folder.glob("*.safetensors"))


def forget_files(folder: Path) -> None:
    """Ask the system to drop the weight files from its page cache."""
    for file in weight_files(folder):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_child(args: argparse.Namespace, work: str, prompt: int = 0, cold: bool = False) -> dict:
    """One measurement in a process of its own."""
    if cold:
        forget_files(args.folder)
    command = [sys.executable, __file__, str(args.folder), "--child", work, "--prompt", str(prompt)]
    command += ["--threads", str(args.threads), "--max-seq-len", str(prompt or args.max_seq_len)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """Seconds, peak bytes and cache bytes of one measurement."""
    if args.child == "read":
        start = time.perf_counter()
        for file in weight_files(args.folder):
            with file.open("rb", buffering=0) as stream:
                buffer = bytearray(16 * MIB)
                while stream.readinto(buffer):
                    pass
        return {"seconds": time.perf_counter() - start}
    if args.child == "hold":
        start = time.perf_counter()
        held = [file.read_bytes() for file in weight_files(args.folder)]
        return {"seconds": time.perf_counter() - start, "bytes": sum(map(len, held))}
    if args.child == "order":
        return measure_order(args)
    import torch

    import ropewalk

    torch.set_num_threads(args.threads)
    _ = ropewalk.load_model
    start = time.perf_counter()
    cache_bytes = 0
    if args.child == "load":
        model = ropewalk.load_model(args.folder, max_seq_len=args.max_seq_len, threads=args.threads)
        cache = model.new_cache()
        if args.prompt:
            with torch.inference_mode():
                model.forward([i % 31000 + 1 for i in range(args.prompt)], cache)
        cache_bytes = cache.num_bytes  # of the pages that it has taken
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak, "cache": cache_bytes}


def measure_order(args: argparse.Namespace) -> dict:
    """[bytes in use, cache bytes] with every layer once and twice, and the seconds that changes of the order take."""
    import torch

    import ropewalk

    torch.set_num_threads(args.threads)
    model = ropewalk.load_model(args.folder, max_seq_len=args.max_seq_len, threads=args.threads)
    last = model.config.num_layers - 1
    used, changes, caches = [], [], []
    for order in (f"0-{last}", ",".join(f"{layer}*2" for layer in range(last + 1))):
        model.set_layer_order(order)
        cache = model.new_cache()
        for _ in range(2):  # the first one also takes what a prompt leaves behind in the allocator
            cache.truncate(0)
            with torch.inference_mode():
                model.forward([i % 31000 + 1 for i in range(args.prompt)], cache)
        used.append([memory_in_use(), cache.num_bytes])
        del cache
    for number in range(20):
        start = time.perf_counter()
        model.set_layer_order(f"0-{last},0-{last}" if number % 2 else None)
        changes.append(time.perf_counter() - start)
        start = time.perf_counter()
        model.new_cache()
        caches.append(changes[-1] + time.perf_counter() - start)
    return {"used": used, "change": changes, "cache": caches}


def memory_in_use() -> int:
    """Bytes of this process that lie in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
