"""Loading a model beside reading its files, both from the system's cache of files.

    python scripts/bench/random_checkpoint.py FOLDER --shape 7b
    python scripts/bench/load.py FOLDER

Three things take turns, each in a process of its own: reading the files through a small buffer, which is as little as
can be done with them; reading them into memory that holds them all, as whoever keeps a model in memory must (on a
virtual machine, memory that is new to a process can take longer to get than to fill); and `load_model`. All three run
on as many threads, and what is held lies in huge pages. Ratios are taken round by round.

--before DIR: an older version of the code, as `pip install --target DIR` leaves it, loads the model in the same rounds.
--parts: where the time of one loading goes, by the functions that take it.
--packing: besides, packing alone beside a copy of the same bytes, with rows in order and with an order that says so,
which takes the way of other orders and widths.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarking import paired, print_head, spread

MIB = 1 << 20
PIECE_BYTES = MIB  # read at a time: it stays in the second cache
HUGE_PAGE = 2 * MIB


def main() -> None:
    """Print the table, or (in a child process) one measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", type=Path, metavar="DIR", help="where an older version is installed")
    parser.add_argument("--parts", action="store_true", help="also where the time of one loading goes")
    parser.add_argument("--packing", action="store_true", help="also packing beside a plain copy")
    parser.add_argument("--child", choices=("read", "hold", "load", "parts"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    print_head(f"loading {args.folder.name} from the cache of files, {args.threads} threads")
    report(args)
    if args.parts:
        for name, seconds in run_child(args, "parts")["parts"].items():
            print(f"    {name:34} {seconds:9.3f}")
    if args.packing:
        report_packing(args.threads)


def report(args: argparse.Namespace) -> None:
    """Seconds of each, and what loading takes beside reading."""
    works = ["read", "hold", "load", *(["before"] if args.before else [])]
    found: dict[str, list[dict]] = {work: [] for work in works}
    run_child(args, "read")  # brings the files into the cache
    for number in range(args.rounds):
        for work in works if number % 2 == 0 else reversed(works):
            found[work].append(run_child(args, work))
    times = {work: [result["seconds"] for result in results] for work, results in found.items()}
    names = {"read": "reading them", "hold": "reading them into memory", "load": "loading", "before": "loading, before"}
    size = sum(file.stat().st_size for file in weight_files(args.folder))
    print(f"  files, MiB                         {size / MIB:9.0f}")
    for work in works:
        print(f"  {names[work] + ', s':34} {spread(times[work])}")
    for first, second in [(work, yard) for work in works[2:] for yard in ("hold", "read")]:
        ratios = [load / read for load, read in zip(times[first], times[second], strict=True)]
        print(f"  {names[first]} / {names[second]:{31 - len(names[first])}} {spread(ratios)}")
    if args.before:
        ratios = [load / before for load, before in zip(times["load"], times["before"], strict=True)]
        print(f"  {'loading / before':34} {spread(ratios)}")
    for work in works[2:]:
        peak = max(result["peak"] for result in found[work])
        print(f"  {'peak memory of ' + names[work] + ', MiB':34} {peak / MIB:9.0f}", flush=True)


def report_packing(threads: int, num_inputs: int = 4096, num_outputs: int = 11008) -> None:
    """Packing a linear of 4 bits again and again, into memory that this process has already."""
    import torch

    from ropewalk import native

    torch.set_num_threads(threads)
    runtime = native.Runtime(threads=threads)
    qweight = torch.randint(-(2**31), 2**31 - 1, (num_inputs // 8, num_outputs), dtype=torch.int32)
    num_groups = num_inputs // 128
    parts = {
        "bits": 4,
        "in_features": num_inputs,
        "scales": torch.ones(num_groups, num_outputs).half(),
        "zeros": torch.full((num_groups, num_outputs), 8, dtype=torch.uint8),
        "group_starts": torch.arange(num_groups + 1) * 128,
    }
    order = torch.arange(num_inputs, dtype=torch.int32)
    copy = torch.empty_like(qweight)
    times = paired(
        {
            "a copy, ms": lambda: copy.copy_(qweight),
            "packed in order, ms": lambda: native.pack_gptq(runtime, qweight, **parts),
            "packed by an order, ms": lambda: native.pack_gptq(runtime, qweight, order=order, **parts),
        },
        rounds=15,
    )
    print(f"  packing {num_inputs} x {num_outputs}")
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds, times["a copy, ms"], strict=True)]
        print(f"    {name:24} {spread([1e3 * value for value in seconds])}   of a copy: {spread(ratios).strip()}")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights."""
    return sorted(folder.glob("*.safetensors"))


def run_child(args: argparse.Namespace, work: str) -> dict:
    """One measurement in a process of its own."""
    environment = os.environ | ({"PYTHONPATH": str(args.before)} if work == "before" else {})
    command = [sys.executable, __file__, str(args.folder), "--threads", str(args.threads), "--child"]
    command.append("load" if work == "before" else work)
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """Seconds and peak bytes of one measurement."""
    if args.child in ("load", "parts"):
        return measure_loading(args)
    start = time.perf_counter()
    read_files(weight_files(args.folder), args.threads, held=args.child == "hold")
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes()}


def read_files(files: list[Path], threads: int, held: bool) -> mmap.mmap | None:
    """Read all files by several threads, into memory that holds them or through a buffer of each thread."""
    pieces, end = [], 0
    for file in files:
        size = file.stat().st_size
        pieces += [(file, first, min(PIECE_BYTES, size - first), end + first) for first in range(0, size, PIECE_BYTES)]
        end += size
    memory = huge_pages(end) if held else None
    rest = iter(pieces)
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        opened = {file: file.open("rb", buffering=0) for file in files}
        while True:
            with lock:
                piece = next(rest, None)
            if piece is None:
                return
            file, first, size, place = piece
            opened[file].seek(first)
            opened[file].readinto(buffer[:size] if memory is None else memoryview(memory)[place : place + size])

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return memory


def huge_pages(num_bytes: int) -> mmap.mmap:
    """Memory new to this process, in huge pages where the system has them."""
    memory = mmap.mmap(-1, -(-num_bytes // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def measure_loading(args: argparse.Namespace) -> dict:
    """The same of loading; with "parts" the seconds that each step takes itself, without those within it."""
    import torch

    import ropewalk

    torch.set_num_threads(args.threads)
    load_model = ropewalk.load_model
    parts = watch_parts() if args.child == "parts" else {}
    start = time.perf_counter()
    model = load_model(args.folder, max_seq_len=2048, backend="cpu", threads=args.threads)
    seconds = time.perf_counter() - start
    assert model.config.num_layers > 0  # so that it is not dropped before the clock is read
    rest = {"everything else": seconds - sum(parts.values())} if parts else {}
    ordered = dict(sorted(parts.items(), key=lambda part: -part[1]))
    return {"seconds": seconds, "peak": peak_bytes(), "parts": ordered | rest}


def watch_parts() -> dict[str, float]:
    """Has the steps of loading count the seconds that they take."""
    from ropewalk import native
    from ropewalk.files import folder, safetensors
    from ropewalk.gptq import linear
    from ropewalk.model import loader, opened
    from ropewalk.weights import read

    parts: dict[str, float] = defaultdict(float)
    inner: list[float] = []

    def watch(owner: object, name: str, title: str) -> None:
        function: Callable = getattr(owner, name)

        def watched(*positional: object, **keywords: object) -> object:
            start = time.perf_counter()
            inner.append(0.0)
            try:
                return function(*positional, **keywords)
            finally:
                seconds = time.perf_counter() - start
                parts[title] += seconds - inner.pop()
                if inner:
                    inner[-1] += seconds

        setattr(owner, name, watched)

    watch(safetensors.SafetensorsFile, "_read", "reading")
    watch(folder, "tensor_sample", "fingerprint")
    watch(linear, "_read_scales_and_zeros", "zero points")
    watch(linear, "read_groups", "order of rows")
    for module in (linear, read):
        watch(module, "require_finite", "are scales and norms finite")
    watch(native, "pack_gptq", "packing")
    watch(loader, "held_head", "rounding the head")
    watch(opened, "check_tensors", "checking names and shapes")
    watch(loader, "plan_loading", "JSON files")
    return parts


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
