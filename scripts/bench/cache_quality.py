"""What the formats of keys and values cost in perplexity, beside fp16, and what llama.cpp's cost it.

    python scripts/bench/cache_quality.py                          the embedded model on its held-out text
    python scripts/bench/cache_quality.py FOLDER ... --tokens 16384
    python scripts/bench/cache_quality.py --peer at_depth          and llama.cpp, with the same weights in float32

A folder without a held-out text is measured on what its own model writes at temperature 1, in windows that it writes
one by one: even a model of random weights has something to lose there. Ratios are of perplexities in the same windows,
with the standard error of the difference. For --peer see llama_cpp/at_depth.cpp; it needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import ropewalk
from benchmarking import print_head
from ropewalk.files.embedded import demo_model_path
from ropewalk.measure.divergence import divergence
from ropewalk.measure.settings import OpenSetting, Setting, open_base, open_beside
from ropewalk.model.options import LoadOptions
from ropewalk.model.step import Span

FORMATS = ("fp32", "q8", "q6", "q4", "q4+256", "q8_q4")
PEER_TYPES = ("q8_0", "q4_0")


def main() -> None:
    """Measure and print a table for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--compute", default="int8")
    parser.add_argument("--length", type=int, default=512, help="of a window")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", type=Path, metavar="PATH", help="the program of llama_cpp/at_depth.cpp")
    args = parser.parse_args()
    if not 2 <= args.length <= args.tokens:
        parser.error(f"--length must be from 2 to --tokens, {args.tokens}, got {args.length}")
    torch.set_num_threads(args.threads)
    print_head("perplexity by cache format")
    for folder in args.folders or [demo_model_path()]:
        options = LoadOptions(backend="cpu", compute=args.compute, threads=args.threads)
        model = ropewalk.load_model(folder, options=options)
        base = open_base(Setting("fp16", folder, options), model)
        ids, text = text_of(folder, model, args)
        size = f"{model.config.num_layers} layers, heads of {model.config.head_dim}"
        print(f"\n{folder.name}: {size}, {args.compute}, {text}, {len(ids):,} tokens in windows of {args.length}")
        print(f"{'':10}{'perplexity, %':16}{'standard error':16}mean KL")
        report(base, ids, args)
        if args.peer is not None:
            report_peer(folder, ids, args)


def text_of(folder: Path, model: ropewalk.Model, args: argparse.Namespace) -> tuple[list[int], str]:
    """Token ids in whole windows, and where they are from."""
    held_out = folder / "held_out.txt"
    if not held_out.exists():
        return written_by(model, args.length, args.tokens // args.length), "its own text"
    ids = ropewalk.load_tokenizer(folder).encode(held_out.read_text(encoding="utf-8"))[: args.tokens]
    return ids[: len(ids) // args.length * args.length], held_out.name


def written_by(model: ropewalk.Model, length: int, count: int) -> list[int]:
    """What the model writes by itself, at temperature 1, in so many texts side by side."""
    generator = torch.Generator().manual_seed(0)
    caches = [model.new_cache() for _ in range(count)]
    texts = torch.randint(model.config.vocab_size, (count, 1), generator=generator)  # [texts, tokens]
    while texts.shape[1] < length:
        spans = [Span([int(text[-1])], cache) for text, cache in zip(texts, caches, strict=True)]
        logits = torch.cat(model.step(spans))  # [texts, V]
        texts = torch.cat([texts, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return texts.flatten().tolist()


def report(base: OpenSetting, ids: list[int], args: argparse.Namespace) -> None:
    """One line for each format."""
    for name in args.formats:
        options = replace(base.setting.options, cache_type=name)
        other = open_beside(base, Setting(name, base.setting.folder, options))
        found = divergence(base, other, ids, args.length)
        error = f"{100 * found.ratio_error:.3f}" if found.ratio_error is not None else ""
        if name == args.formats[0]:
            print(f"{'fp16':10}{found.base_perplexity:.4f}")
        print(f"{name:10}{100 * (found.ratio - 1):<+16.3f}{error:16}{found.kl_mean:.1e}", flush=True)


def report_peer(folder: Path, ids: list[int], args: argparse.Namespace) -> None:
    """llama.cpp's types beside its f16, on the same windows."""
    from dense_gguf import write_dense_gguf

    with tempfile.TemporaryDirectory() as scratch:
        model, windows = Path(scratch) / "model.gguf", []
        write_dense_gguf(folder, model)
        for first in range(0, len(ids), args.length):
            windows.append(Path(scratch) / f"{first}.ids")
            np.array(ids[first : first + args.length], np.int32).tofile(windows[-1])
        base = scores(model, "f16", windows, args)
        perplexity = math.exp(sum(base) / (len(base) * (args.length - 1)))
        print(f"{'f16':10}{perplexity:<32.4f}llama.cpp")
        for name in PEER_TYPES:
            found = scores(model, name, windows, args)
            changes = [(mine - theirs) / (args.length - 1) for mine, theirs in zip(found, base, strict=True)]
            change, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
            print(f"{name:10}{100 * math.expm1(change):<+16.3f}{100 * error:<16.3f}llama.cpp", flush=True)


def scores(model: Path, name: str, windows: Sequence[Path], args: argparse.Namespace) -> list[float]:
    """The negative log-likelihood of each window."""
    command = [args.peer, model, args.threads, name, name, args.length + 64]
    lines = "".join(f"score {window} {args.length}\n" for window in windows)
    run = subprocess.run([str(part) for part in command], input=lines, capture_output=True, text=True, check=True)
    return [float(line) for line in run.stdout.split()[1:]]


if __name__ == "__main__":
    main()
