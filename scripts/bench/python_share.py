"""How much of a decoded token's time is Python: the time with the kernels, and with kernels that do nothing.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/python_share.py FOLDER --threads 2

The functions of the compiled core that compute (the replay of a layer, linears, norms, embeddings) are replaced for
half of the measurements, so that everything else runs as always: arguments, checks, arrays, scheduling, sampling. Both
kinds take turns within a round. "forward" calls the model alone; "generation" is a greedy reply of one sequence through
the scheduler. What Python would take with the caches of the processor full of weights can only be more than this shows,
so a profile of the whole (perf, py-spy) belongs beside it where the share is near its target.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

import ropewalk
from benchmarking import add_engine_arguments, model_folder, print_head, random_ids, spread
from ropewalk import _core
from ropewalk.generate.generate import Generation
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.model.model import Model

TARGET = 2.0  # percent


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--context", type=int, default=128, help="positions cached before a token is decoded")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each measurement")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.context, args.tokens = 2, 16, 4
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder:
        print_head(f"Python's share of a decoded token, {folder.name}")
        most = args.context + args.tokens
        model = ropewalk.load_model(folder, max_seq_len=most, compute=args.compute, threads=args.threads)
    print(f"{args.compute}, {args.threads} threads, context {args.context}, {args.tokens} tokens, {args.rounds} rounds")
    works = {"forward": forward_s, "generation": generation_s}
    with torch.inference_mode():
        for name, work in works.items():
            report(name, *measured(lambda work=work: work(model, args), args.rounds))


def measured(work: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per token with the kernels and without, after a round to warm up."""
    real, empty = [], []
    for number in range(rounds + 1):
        with_kernels = work()
        with no_kernels():
            without = work()
        if number:
            real.append(with_kernels)
            empty.append(without)
    return real, empty


@contextmanager
def no_kernels() -> Iterator[None]:
    """The core computes nothing while this is active; results are zeros where somebody reads them."""
    replaced = [
        (_core.Layer, "run", lambda *arguments: None),
        (_core.LinearGroup, "run", _zero_linear),
        (_core, "rms_norm", lambda *arguments: None),
        (_core, "embed", lambda *arguments: None),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, stub in replaced:
            setattr(owner, name, stub)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _zero_linear(
    group: _core.LinearGroup, runtime: _core.Runtime, compute: str, x: np.ndarray, out: np.ndarray, change: object
) -> None:
    out.fill(0.0)


def forward_s(model: Model, args: argparse.Namespace) -> float:
    """Seconds per token of `Model.forward`."""
    cache = model.new_cache()
    model.forward(random_ids(args.context, "prompt", model.config.vocab_size), cache, logits="none")
    started = time.perf_counter()
    for number in range(args.tokens):
        model.forward([300 + number], cache)
    return (time.perf_counter() - started) / args.tokens


def generation_s(model: Model, args: argparse.Namespace) -> float:
    """Seconds per token of a greedy reply after its first token."""
    params = SamplingParams(temperature=0, max_new_tokens=args.tokens, ignore_eos=True)
    prompt = random_ids(args.context, "prompt", model.config.vocab_size)
    with Scheduler(model).open(prompt, keep=False) as sequence:
        steps = Generation(sequence, params)
        next(steps)
        started = time.perf_counter()
        count = sum(1 for _ in steps)
    return (time.perf_counter() - started) / count


def report(name: str, real: list[float], empty: list[float]) -> None:
    """Three lines of the table."""
    shares = [100 * without / with_kernels for with_kernels, without in zip(real, empty, strict=True)]
    print(f"\n{name:24}median (middle half)")
    print(f"  ms a token            {spread([1000 * seconds for seconds in real])}")
    print(f"  ms without kernels    {spread([1000 * seconds for seconds in empty])}")
    print(f"  share of Python, %    {spread(shares)}   (target: below {TARGET:g})")


if __name__ == "__main__":
    main()
