"""What adapters cost: decode and prefill with none, one of rank 16, four of rank 16, and one of rank 64.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/adapters.py FOLDER

The adapters are PEFT folders of random matrices for all seven linears of every layer, loaded as a user would. The sets
take turns within each round, and costs are ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import ropewalk
from benchmarking import add_speed_arguments, paired, print_head, spread
from ropewalk.config.model import ModelConfig
from ropewalk.model.model import Model

RANKS = {"a": 16, "b": 16, "c": 16, "d": 16, "wide": 64}
SETS = {"none": "", "one of rank 16": "a", "four of rank 16": "a+b:0.5+c:0.5+d:-1", "one of rank 64": "wide"}
MOST_OF_DECODE = 0.05  # what one adapter of rank 16 may cost
MOST_OF_STACKING = 0.10  # what four of rank 16 may cost beyond one of rank 64


def main() -> None:
    """Measure and print a table per compute mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_speed_arguments(parser)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread, measured in processor time: for machines that are busy with other work",
    )
    parser.add_argument("--rounds", type=int, default=9, help="of prefill; decode takes eight times as many")
    args = parser.parse_args()
    args.threads = 1 if args.processor_time else args.threads
    torch.set_num_threads(args.threads)
    print_head(f"adapters on {args.folder.name}")
    with tempfile.TemporaryDirectory() as scratch:
        for compute in args.compute:
            model = ropewalk.load_model(
                args.folder, max_seq_len=4096, compute=compute, threads=args.threads, isa=args.isa
            )
            for seed, (name, rank) in enumerate(RANKS.items()):
                model.load_adapter(write_adapter(Path(scratch) / f"{compute}-{name}", model.config, rank, seed), name)
            report(model, args)


def write_adapter(folder: Path, config: ModelConfig, rank: int, seed: int) -> Path:
    """A PEFT folder with random float16 matrices for every linear of every layer."""
    generator, size = torch.Generator().manual_seed(seed), config.sizes
    entries = config.layer_table(0).linears
    tensors = {}
    for index in range(config.num_layers):
        for entry in entries:
            shapes = {"lora_A": (rank, size[entry.inputs]), "lora_B": (size[entry.outputs], rank)}
            for side, shape in shapes.items():
                name = f"base_model.model.{config.table.layer_prefix(index)}{entry.name}.{side}.weight"
                tensors[name] = (0.02 * torch.randn(shape, generator=generator)).half()
    targets = [entry.name.rpartition(".")[2] for entry in entries]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def report(model: Model, args: argparse.Namespace) -> None:
    """One compute mode: speeds, and the costs beside their targets."""
    print(f"\n{model.backend.compute}, {model.backend.runtime.isa}, {args.threads} threads")
    clock = time.thread_time if args.processor_time else time.perf_counter
    with torch.inference_mode():
        decode = paired(
            {name: decoder(model, args.context, text) for name, text in SETS.items()}, args.rounds * 8, clock
        )
        works = {name: prefiller(model, args.prompt_tokens, text) for name, text in SETS.items()}
        prefill = paired(works, args.rounds, clock)
    for name, tokens, times in (
        ("decode", 1, decode),
        (f"prefill of {args.prompt_tokens}", args.prompt_tokens, prefill),
    ):
        print(f"  {name}, tokens/s")
        for adapters, seconds in times.items():
            print(f"    {adapters:31s}  {spread([tokens / s for s in seconds])}")
        for adapters in list(SETS)[1:]:
            bound = MOST_OF_DECODE if (tokens, adapters) == (1, "one of rank 16") else None
            print_cost(f"{adapters} beside none", times[adapters], times["none"], bound)
        print_cost("four of 16 beside one of 64", times["four of rank 16"], times["one of rank 64"], MOST_OF_STACKING)


def print_cost(name: str, seconds: list[float], base: list[float], bound: float | None) -> None:
    """How much longer than the base, round by round."""
    ratios = [100 * (s / b - 1) for s, b in zip(seconds, base, strict=True)]
    target = "" if bound is None else f"   (target: below {100 * bound:.0f})"
    print(f"    {name + ', %':31s}  {spread(ratios)}{target}")


def decoder(model: Model, context: int, adapters: str) -> Callable[[], object]:
    """A function that decodes one token after `context` cached ones."""
    cache, chosen = model.new_cache(context + 1), adapters or None
    model.forward([i % 31000 + 1 for i in range(context)], cache, logits="none", adapters=chosen)

    def decode() -> None:
        cache.truncate(context)
        model.forward([7], cache, adapters=chosen)

    return decode


def prefiller(model: Model, tokens: int, adapters: str) -> Callable[[], object]:
    """A function that runs a prompt of `tokens` tokens."""
    cache, chosen = model.new_cache(tokens), adapters or None
    ids = [i % 31000 + 1 for i in range(tokens)]

    def prefill() -> None:
        cache.truncate(0)
        model.forward(ids, cache, adapters=chosen)

    return prefill


if __name__ == "__main__":
    main()
