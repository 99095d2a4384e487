"""Compute modes and kinds of folders beside each other: decoding and prompts, all taking turns in one process.

    python scripts/bench/modes.py FOLDER --others FOLDER_OF_2_BITS FOLDER_WITH_ACT_ORDER

The first line is FOLDER in the first of the modes; then come its other modes, and the other folders in the first mode.
Prompts stand beside float32 products of the same shapes by torch as well: all linears of all layers, and nothing else
that a forward pass does.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarking import add_speed_arguments, paired, print_head, spread
from ropewalk.model.model import Model
from speed import DECODED, decoder, loaded, prefiller, streamed_bytes, torch_products


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_speed_arguments(parser)
    parser.add_argument("--others", type=Path, nargs="+", default=[], help="folders to be measured in the first mode")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_head(f"compute modes of {args.folder.name}")
    models = {f"{args.folder.name} {compute}": loaded(args.folder, compute, args) for compute in args.compute}
    models |= {f"{folder.name} {args.compute[0]}": loaded(folder, args.compute[0], args) for folder in args.others}
    with torch.inference_mode():
        report_decoding(models, args)
        report_prompts(models, args)


def report_decoding(models: Mapping[str, Model], args: argparse.Namespace) -> None:
    """Tokens per second, and beside the first model."""
    times = paired({name: decoder(model, args.context) for name, model in models.items()}, args.rounds * 5)
    print(f"\ndecoding after {args.context} tokens; {next(iter(models.values())).backend.arithmetic}")
    for name, model in models.items():
        moved = f"{streamed_bytes(model) / 1e9:.3f} GB per token"
        print_line(name, DECODED, times[name], next(iter(times.values())), moved)


def report_prompts(models: Mapping[str, Model], args: argparse.Namespace) -> None:
    """Tokens per second beside the first model, products of torch among them."""
    tokens = args.prompt_tokens
    works = {name: prefiller(model, tokens) for name, model in models.items()}
    works["torch's float32 products"] = torch_products(next(iter(models.values())), tokens, torch.float32)
    times = paired(works, args.rounds)
    print(f"\nprompts of {tokens} tokens")
    for name, seconds in times.items():
        print_line(name, tokens, seconds, next(iter(times.values())))


def print_line(name: str, tokens: int, seconds: Sequence[float], first: Sequence[float], rest: str = "") -> None:
    """One model: its speed, and how many times as fast as the first it is."""
    ratios = [one / own for one, own in zip(first, seconds, strict=True)]
    print(f"  {name:28} {spread([tokens / s for s in seconds])} tokens/s  {spread(ratios)} times  {rest}".rstrip())


if __name__ == "__main__":
    main()
