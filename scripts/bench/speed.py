"""Decode and prefill speed beside the machine's limits: memory bandwidth, and torch's bf16 matrix products.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/speed.py FOLDER --threads 2

Decode streams all weights once per token: its limit is the memory bandwidth, measured in the same run by reading a
gigabyte. Prefill is compared with the matrix products of the same shapes, all linears of all layers, in bf16 by torch
(which leaves out attention, norms and everything else that a forward pass also does).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import ropewalk
from benchmarking import add_speed_arguments, memory_reader, paired, print_head, spread
from ropewalk.model.model import Model

READ_BYTES = 1 << 30
DECODED = 8  # tokens of one measurement: torch's threads stay awake for a while after reading, and the first one pays


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_speed_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_head(f"speed of {args.folder.name}")
    for compute in args.compute:
        report(loaded(args.folder, compute, args), args)


def loaded(folder: Path, compute: str, args: argparse.Namespace) -> Model:
    """A model to measure."""
    return ropewalk.load_model(folder, max_seq_len=4096, compute=compute, threads=args.threads, isa=args.isa)


def report(model: Model, args: argparse.Namespace) -> None:
    """One compute mode: decode beside bandwidth, prefill beside bf16 products."""
    print(f"\n{model.backend.compute}, {model.backend.runtime.isa}, {args.threads} threads")
    with torch.inference_mode():
        decode = paired({"read": memory_reader(READ_BYTES), "decode": decoder(model, args.context)}, args.rounds * 3)
        prefill = paired(
            {
                "bf16": torch_products(model, args.prompt_tokens, torch.bfloat16),
                "prefill": prefiller(model, args.prompt_tokens),
            },
            args.rounds,
        )
    streamed = streamed_bytes(model)
    bandwidth = [READ_BYTES / s / 1e9 for s in decode["read"]]
    speed = [DECODED / s for s in decode["decode"]]
    used = [streamed * tokens / 1e9 for tokens in speed]
    print(f"  memory read, GB/s                  {spread(bandwidth)}")
    print(f"  decode, tokens/s                   {spread(speed)}")
    print(f"  decode, GB/s of weights            {spread(used)}   ({streamed / 1e9:.3f} GB per token)")
    print(f"  decode, share of memory read       {spread([u / b for u, b in zip(used, bandwidth, strict=True)])}")
    tokens = args.prompt_tokens
    print(f"  prefill of {tokens}, tokens/s           {spread([tokens / s for s in prefill['prefill']])}")
    work = 2 * tokens * linear_weights(model)
    print(f"  prefill, GOP/s of the linears      {spread([work / s / 1e9 for s in prefill['prefill']])}")
    print(f"  torch bf16 products, GOP/s         {spread([work / s / 1e9 for s in prefill['bf16']])}")
    ratios = [b / p for b, p in zip(prefill["bf16"], prefill["prefill"], strict=True)]
    print(f"  prefill beside bf16 products       {spread(ratios)}   (above 1: the whole forward pass is faster)")


def streamed_bytes(model: Model) -> int:
    """Bytes of weights that one decoded token reads: all but the embedding table."""
    return sum(layer.num_bytes for layer in model.weights.layers) + model.weights.head.num_bytes


def linear_shapes(model: Model) -> list[tuple[int, int]]:
    """(K, N) of every linear of the decoder layers."""
    shapes = []
    for layer in model.weights.layers:
        shapes += [(p.in_features, p.out_features) for p in layer.linears.values()]
    return shapes


def linear_weights(model: Model) -> int:
    """Weights in the decoder layers."""
    return sum(k * n for k, n in linear_shapes(model))


def decoder(model: Model, context: int) -> Callable[[], object]:
    """A function that decodes DECODED tokens after `context` cached ones."""
    cache = model.new_cache(context + DECODED)
    model.forward([i % 31000 + 1 for i in range(context)], cache, logits="none")

    def decode() -> None:
        cache.truncate(context)
        for _ in range(DECODED):
            model.forward([7], cache)

    return decode


def prefiller(model: Model, tokens: int) -> Callable[[], object]:
    """A function that runs a prompt of `tokens` tokens."""
    cache = model.new_cache(tokens)
    ids = [i % 31000 + 1 for i in range(tokens)]

    def prefill() -> None:
        cache.truncate(0)
        model.forward(ids, cache)

    return prefill


def torch_products(model: Model, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    """A function that multiplies activations of `tokens` rows with one weight of torch per linear of the model."""
    shapes = linear_shapes(model)
    weights = {shape: torch.randn(shape[1], shape[0], dtype=dtype) for shape in set(shapes)}
    inputs = {k: torch.randn(tokens, k, dtype=dtype) for k, _ in weights}

    def products() -> None:
        for shape in shapes:
            torch.nn.functional.linear(inputs[shape[0]], weights[shape])

    return products


if __name__ == "__main__":
    main()
