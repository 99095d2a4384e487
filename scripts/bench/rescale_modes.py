"""Rotating a cache to another RoPE beside computing it anew: by depth of layer, by method and factor.

    python scripts/bench/rescale_modes.py [FOLDER]

A text is read as the model's files declare, and the cache is then given another RoPE: by turning its keys, and by
computing it anew. The next tokens are read from either. "one layer" is the model with its first layer alone, where both
should agree up to rounding. The distance of a layer is that of its keys, rotated against computed, relative to their
size. In plain torch with float32 caches, so that nothing but the mode differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import ropewalk
from agreement import Agreement
from benchmarking import print_head
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model

METHODS = ("linear", "ntk", "ntk-by-parts", "yarn")


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=demo_model_path())
    parser.add_argument("--text", type=Path, default=demo_model_path() / "held_out.txt")
    parser.add_argument("--length", type=int, default=256, help="tokens that are read before the change")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--factors", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--next", type=int, default=64, help="tokens that are read after it, and compared")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print_head(f"rotated against computed anew, {args.folder.name}")
    ids = ropewalk.load_tokenizer(args.folder).encode(args.text.read_text())[: args.length + args.next]
    print(f"{args.length} tokens cached, then {args.next} read; KL in nats, of computed anew from rotated")
    for layers, name in (("0", "one layer"), (None, "all layers")):
        for method in args.methods:
            for factor in args.factors:
                print(f"{name:10} {method:13} {factor:5g}  {compared(args, ids, layers, method, factor)}", flush=True)


def compared(args: argparse.Namespace, ids: list[int], layers: str | None, method: str, factor: float) -> str:
    """One line of the table."""
    scaling = {"rope_type": method, "factor": factor}
    rows = [after(args, ids, layers, mode, scaling) for mode in ("recompute", "rotate")]
    (expected, exact_keys), (got, keys) = rows
    agreement = Agreement()
    agreement.add(expected, got)
    distances = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(keys, exact_keys, strict=True)]
    by_layer = " ".join(f"{distance:.2e}" for distance in distances)
    largest = float((got - expected).abs().max())
    return f"KL {agreement.mean_kl:.2e}  top-1 {100 * agreement.top_part:5.1f} %  logits {largest:.1e}  keys {by_layer}"


def after(
    args: argparse.Namespace, ids: list[int], layers: str | None, mode: str, scaling: dict[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [next, V] of what follows a cache that was given another RoPE in this mode, and its keys by layer."""
    model = ropewalk.load_model(
        args.folder, backend="reference", compute="exact", cache_type="fp32", layer_order=layers, max_seq_len=len(ids)
    )
    cache = model.new_cache()
    with torch.inference_mode():
        model.forward(ids[: args.length], cache, "none")
        model.rescale(scaling, mode)
        keys = keys_of(model, cache)
        return model.forward(ids[args.length :], cache, "all"), keys


def keys_of(model: Model, cache: KvCache) -> list[torch.Tensor]:
    """The keys of each layer instance: [Hkv, cached, D]."""
    pages = [held.page for held in cache.pages]
    return [
        torch.cat([page.keys.read(instance) for page in pages], dim=1)[:, : cache.length]
        for instance in range(len(model.instances))
    ]


if __name__ == "__main__":
    main()
