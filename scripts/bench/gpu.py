"""Everything that the GPU backend should be measured for, on one card, in one run.

    python scripts/bench/gpu.py                                models of 1.1, 7 and 13 billion parameters
    python scripts/bench/gpu.py --shapes 7b --parts decode depth --work FOLDER
    TRITON_INTERPRET=1 python scripts/bench/gpu.py --tiny      without a card: does the script run?

Random weights of these shapes are written to a scratch folder (8 GB for 13b), loaded and measured:

    decode      tokens/s of one sequence, and bytes read for a token as a share of the copy bandwidth of this card; the
                time outside of kernels
    prefill     tokens/s of a prompt, and operations as a share of this card's rate for float16 matrices
    depth       decode after 16,384 and 32,768 cached positions
    sequences   tokens/s together of 1 to 64 sequences
    act-order   what act-order costs: groups of 32, shuffled and not, in turns
    products    a product of 7b's shape beside torch's int4 product, its float16 product, and what else is installed
    peers       decode of the same folder by gptqmodel and vLLM, where they are installed

Bandwidth and rate are measured first, so that shares hold for the card at hand. Medians, with the range of the middle
half. What does not fit into the card's memory is named and left out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import ropewalk
from benchmarking import paired, print_head, random_ids, spread, timed
from gpu_peers import measure_peers, measure_products
from random_checkpoint import write_random_checkpoint
from ropewalk.backends.gpu.device import checked_device, describe
from ropewalk.base.errors import RopewalkError
from ropewalk.model.model import Model
from ropewalk.model.step import Span

PARTS = ("decode", "prefill", "depth", "sequences", "act-order", "products", "peers")


@dataclass(frozen=True)
class Sizes:
    """How much of everything is measured."""

    shapes: tuple[str, ...]
    rounds: int
    tokens: int  # decoded in a measurement
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    sequences: tuple[int, ...]
    copied_bytes: int
    matrix: int


FULL = Sizes(("1.1b", "7b", "13b"), 7, 64, (512, 2048), (16384, 32768), (1, 2, 4, 8, 16, 32, 64), 1 << 30, 8192)
TINY = Sizes(("tiny",), 1, 1, (9,), (12,), (1, 3), 1 << 20, 64)


@dataclass(frozen=True)
class Yardsticks:
    """What this card does at best: bytes/s of a copy (read and written), operations/s of float16 matrices."""

    bandwidth: float
    rate: float


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=("1.1b", "7b", "13b"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model in Triton's interpreter")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints, kept (default: a scratch folder)")
    args = parser.parse_args()
    sizes = TINY if args.tiny else FULL
    device = checked_device("cpu" if args.tiny else args.device)
    print_head(f"the GPU backend on {describe(device)}")
    yardsticks = measure_yardsticks(device, sizes)
    with tempfile.TemporaryDirectory() as scratch:
        folders = Folders(args.work or Path(scratch))
        for shape in args.shapes or sizes.shapes:
            measure_shape(shape, folders, device, sizes, yardsticks, args.parts)
        if "products" in args.parts:
            measure_products(device, args.tiny, sizes.rounds)
        if "peers" in args.parts and not args.tiny:
            measure_peers(folders.of("7b", 128, act_order=False), sizes.tokens)
    return 0


class Folders:
    """Checkpoints, written when they are first needed."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent

    def of(self, shape: str, group_size: int, act_order: bool) -> Path:
        """The folder of one checkpoint."""
        folder = self._parent / f"{shape}-g{group_size}{'-act' if act_order else ''}"
        if not (folder / "model.safetensors.index.json").exists():
            write_random_checkpoint(folder, shape, group_size, act_order)
        return folder


def measure_yardsticks(device: torch.device, sizes: Sizes) -> Yardsticks:
    """The card's own limits."""
    given = torch.empty(sizes.copied_bytes, dtype=torch.uint8, device=device)
    taken, side = torch.empty_like(given), sizes.matrix
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    works = {
        "copy": lambda: synced(device, lambda: taken.copy_(given)),
        "matrix": lambda: synced(device, lambda: a @ b),
    }
    times = paired(works, 3 * sizes.rounds)
    found = Yardsticks(2 * given.nbytes / min(times["copy"]), 2 * side**3 / min(times["matrix"]))
    print(f"copy bandwidth {found.bandwidth / 1e9:.0f} GB/s, float16 matrices {found.rate / 1e12:.1f} TFLOP/s (best)")
    return found


def synced(device: torch.device, work: Callable[[], object]) -> None:
    """Do it, and wait for the card."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_shape(
    shape: str, folders: Folders, device: torch.device, sizes: Sizes, yardsticks: Yardsticks, parts: tuple[str, ...]
) -> None:
    """All parts that need a model of this shape."""
    print(f"\n## {shape}, groups of 128", flush=True)
    longest = max((*sizes.depths, *sizes.prompts)) + sizes.tokens + 8
    group = 128 if shape != "tiny" else 64
    model = load(folders.of(shape, group, act_order=False), device, longest)
    measures = {"decode": decode, "prefill": prefill, "depth": depth, "sequences": together}
    for name, measure in measures.items():
        if name in parts:
            attempted(name, partial(measure, model, device, sizes, yardsticks))
    del model
    gc.collect()
    if "act-order" in parts:
        attempted("act-order", lambda: act_order(shape, folders, device, sizes))


def attempted(name: str, measure: Callable[[], None]) -> None:
    """Measure, or say why not: too little memory is no reason to lose the rest."""
    try:
        measure()
    except (RopewalkError, torch.cuda.OutOfMemoryError) as error:
        print(f"{name}: not measured: {' '.join(str(error).split())}")
    sys.stdout.flush()


def load(folder: Path, device: torch.device, length: int) -> Model:
    """The model, ready for sequences of that length."""
    return ropewalk.load_model(folder, backend="gpu", device=device, max_seq_len=length)


def filled(model: Model, length: int) -> ropewalk.KvCache:
    """A cache of so many positions."""
    cache = model.new_cache()
    if length:
        model.forward(random_ids(length, 0, model.config.vocab_size), cache, "none")
    return cache


def read_bytes(model: Model, depth: int) -> int:
    """What a decoded token reads at least: packed weights, the head, keys and values."""
    weights = sum(layer.num_bytes for layer in model.weights.layers) + model.weights.head.num_bytes
    return weights + model.cache_bytes(depth)


def decoding(model: Model, cache: ropewalk.KvCache, depth: int, tokens: int) -> Callable[[], object]:
    """Decodes so many tokens from that depth on, each after the logits of the one before are in main memory."""

    def work() -> None:
        cache.truncate(depth)
        for number in range(tokens):
            model.forward([300 + number], cache).cpu()

    return work


def decode(model: Model, device: torch.device, sizes: Sizes, yardsticks: Yardsticks) -> None:
    """One sequence after 128 positions."""
    start = sizes.prompts[0]
    report_decode(model, filled(model, start), start, sizes, yardsticks)
    if device.type == "cuda":
        print(f"outside of kernels: {100 * outside_kernels(model, start, sizes.tokens):.1f} % of the time")


def depth(model: Model, device: torch.device, sizes: Sizes, yardsticks: Yardsticks) -> None:
    """Decode after long contexts."""
    for length in sizes.depths:
        report_decode(model, filled(model, length), length, sizes, yardsticks)


def report_decode(model: Model, cache: ropewalk.KvCache, length: int, sizes: Sizes, yardsticks: Yardsticks) -> None:
    """One line."""
    times = paired({"": decoding(model, cache, length, sizes.tokens)}, sizes.rounds)[""]
    rates = [sizes.tokens / seconds for seconds in times]
    share = read_bytes(model, length) * statistics.median(rates) / yardsticks.bandwidth
    print(f"decode at {length:6}: {spread(rates)} tokens/s, {100 * share:5.1f} % of the copy bandwidth")


def outside_kernels(model: Model, length: int, tokens: int) -> float:
    """The share of decoding in which no kernel runs."""
    work = decoding(model, filled(model, length), length, tokens)
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    return 1 - busy / min(timed(work) for _ in range(3))


def prefill(model: Model, device: torch.device, sizes: Sizes, yardsticks: Yardsticks) -> None:
    """Prompts in one chunk."""
    config = model.config
    weights = sum(p.in_features * p.out_features for layer in model.weights.layers for p in layer.linears.values())
    for rows in sizes.prompts:
        ids = random_ids(rows, 1, config.vocab_size)
        times = paired({"": lambda ids=ids: model.forward(ids, model.new_cache()).cpu()}, sizes.rounds)[""]
        attention = 2 * rows * rows * config.num_heads * config.head_dim * config.num_layers  # half of it is masked
        share = (2 * rows * weights + attention) / statistics.median(times) / yardsticks.rate
        rates = [rows / seconds for seconds in times]
        print(f"prefill of {rows:5}: {spread(rates)} tokens/s, {100 * share:5.1f} % of the matrix rate")


def together(model: Model, device: torch.device, sizes: Sizes, yardsticks: Yardsticks) -> None:
    """Several sequences in a step."""
    start = sizes.prompts[0] // 4
    for count in sizes.sequences:
        caches = [filled(model, start) for _ in range(count)]

        def work(caches: list[ropewalk.KvCache] = caches) -> None:
            for cache in caches:
                cache.truncate(start)
            for number in range(sizes.tokens):
                for logits in model.step([Span([300 + number], cache) for cache in caches]):
                    logits.cpu()

        times = paired({"": work}, sizes.rounds)[""]
        print(
            f"{count:3} sequences:   {spread([count * sizes.tokens / seconds for seconds in times])} tokens/s together"
        )


def act_order(shape: str, folders: Folders, device: torch.device, sizes: Sizes) -> None:
    """Groups of 32 with the rows shuffled and in order, in turns."""
    print(f"\n## {shape}, groups of 32")
    start = sizes.prompts[-1]
    works: dict[str, Callable[[], object]] = {}
    for name, shuffled in (("in order", False), ("act-order", True)):
        model = load(folders.of(shape, 32, shuffled), device, start + sizes.tokens + 8)
        cache, ids = filled(model, sizes.prompts[0]), random_ids(start, 1, model.config.vocab_size)
        works[f"decode {name}"] = decoding(model, cache, sizes.prompts[0], sizes.tokens)
        works[f"prefill {name}"] = lambda model=model, ids=ids: model.forward(ids, model.new_cache()).cpu()
    times = paired(works, sizes.rounds)
    for kind in ("decode", "prefill"):
        pairs = zip(times[f"{kind} act-order"], times[f"{kind} in order"], strict=True)
        print(f"{kind}: act-order takes {spread([100 * (mine / plain - 1) for mine, plain in pairs])} % longer")


if __name__ == "__main__":
    sys.exit(main())
