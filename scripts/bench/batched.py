"""Several sequences decoding together: tokens a second of 1, 4, 8 and 16 of them, beside llama.cpp in the same run.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/batched.py FOLDER --threads 2
    python scripts/bench/batched.py FOLDER --adapters 4     # besides: sequences that use 4 different LoRAs in turn
    python scripts/bench/random_gguf.py FILE --shape 1.1b
    python scripts/bench/batched.py FOLDER --peer PATH/llama-batched-bench --peer-model FILE

A measurement decodes --tokens steps of `model.step` after --context cached positions. The peer decodes as many after
as many, in a process of its own each round. Numbers of sequences and the two programs take turns within a round, and
ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch

import ropewalk
from adapters import write_adapter
from benchmarking import add_engine_arguments, model_folder, print_head, random_ids, spread
from ropewalk.model.model import Model

ADAPTER_RANK = 16
POSITIONS_PER_SEQUENCE = 256  # to spare in the peer's cache, which it divides into equal parts of whole blocks
OWN, PEER = "ropewalk", "llama.cpp"
Rates = dict[int, list[float]]  # tokens/s together, by number of sequences, for each round


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--isa")
    parser.add_argument("--backend", default="cpu", help="reference: to try the script where there is no compiled core")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--context", type=int, default=128, help="positions cached before a token is decoded")
    parser.add_argument("--tokens", type=int, default=32, help="decoded per sequence and measurement")
    parser.add_argument("--adapters", type=int, default=0, metavar="N", help="different LoRAs of rank 16 in a step")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="llama.cpp's llama-batched-bench")
    parser.add_argument("--peer-model", type=Path, metavar="GGUF")
    parser.add_argument("--peer-version", help="where the peer itself does not know")
    parser.add_argument("--peer-options", nargs=argparse.REMAINDER, default=[], help="all that follows it")
    args = parser.parse_args()
    if (args.peer is None) != (args.peer_model is None):
        parser.error("--peer and --peer-model belong together")
    if args.smoke:
        args.rounds, args.context, args.tokens = 2, 16, 3
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder, tempfile.TemporaryDirectory() as scratch:
        print_head(f"sequences that decode together, {folder.name}")
        model = load(folder, args)
        names = [f"lora-{number}" for number in range(args.adapters)]
        for seed, name in enumerate(names):
            model.load_adapter(write_adapter(Path(scratch) / name, model.config, ADAPTER_RANK, seed), name)
        report(measured(model, names, args), args)


def load(folder: Path, args: argparse.Namespace) -> Model:
    """The model, with pages for the largest number of sequences."""
    max_seq_len = args.context + args.tokens
    options = {"backend": args.backend} if args.backend != "cpu" else {"threads": args.threads, "isa": args.isa}
    return ropewalk.load_model(folder, max_seq_len=max_seq_len, compute=args.compute, **options)


def measured(model: Model, adapters: list[str], args: argparse.Namespace) -> dict[str, Rates]:
    """Rates of each program, after a warm-up round."""
    works = {OWN: lambda: own_rates(model, [None], args)}
    if adapters:
        works[f"{len(adapters)} adapters"] = lambda: own_rates(model, adapters, args)
    if args.peer is not None:
        works[PEER] = lambda: peer_rates(args)
    found: dict[str, Rates] = {name: {count: [] for count in args.sequences} for name in works}
    for number in range(args.rounds + 1):
        for name, work in works.items():
            for count, rate in work().items():
                if number:
                    found[name][count].append(rate)
    return found


def own_rates(model: Model, adapters: list[str | None], args: argparse.Namespace) -> dict[int, float]:
    """Tokens/s of each number of sequences; the n-th sequence uses the n-th adapter, in turn."""
    with torch.inference_mode():
        in_turn = [adapters[number % len(adapters)] for number in range(max(args.sequences))]
        return {count: own_rate(model, in_turn[:count], args) for count in args.sequences}


def own_rate(model: Model, adapters: list[str | None], args: argparse.Namespace) -> float:
    """One measurement. Each sequence has tokens of its own, so that nothing is shared."""
    caches = [model.new_cache() for _ in adapters]
    vocab_size = model.config.vocab_size
    sequences = list(zip(caches, adapters, strict=True))
    prompts = [random_ids(args.context, seed, vocab_size) for seed in range(len(adapters))]
    model.step([ropewalk.Span(ids, cache, "none", name) for ids, (cache, name) in zip(prompts, sequences, strict=True)])
    seconds = 0.0
    for number in range(args.tokens):
        spans = [ropewalk.Span([300 + number], cache, "last", name) for cache, name in sequences]
        started = time.perf_counter()
        model.step(spans)
        seconds += time.perf_counter() - started
    return len(adapters) * args.tokens / seconds


def peer_rates(args: argparse.Namespace) -> dict[int, float]:
    """The same by llama.cpp, one process for all numbers of sequences."""
    most = max(args.sequences) * (args.context + args.tokens + POSITIONS_PER_SEQUENCE)
    options = {
        "-m": args.peer_model, "-c": most, "-t": args.threads, "-tb": args.threads, "-npp": args.context,
        "-ntg": args.tokens, "-npl": ",".join(map(str, args.sequences)), "--output-format": "jsonl",
    }  # fmt: skip
    command = [str(args.peer), *(str(part) for pair in options.items() for part in pair), *args.peer_options]
    run = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    rates = {row["pl"]: row["speed_tg"] for row in rows}
    if run.returncode or set(rates) != set(args.sequences):
        raise SystemExit(f"{args.peer} measured {sorted(rates)} and ended with {run.returncode}:\n{run.stderr[-2000:]}")
    return rates


def report(found: dict[str, Rates], args: argparse.Namespace) -> None:
    """A table per program: rates, beside one sequence, and beside another program."""
    print(f"{args.compute}, {args.threads} threads, context {args.context}, {args.tokens} tokens, {args.rounds} rounds")
    if args.peer is not None:
        size = args.peer_model.stat().st_size / 1e6
        print(f"peer: llama.cpp {args.peer_version or peer_version(args.peer)}; {args.peer_model.name}, {size:.0f} MB")
    for name, rates in found.items():
        other = {OWN: PEER, PEER: None}.get(name, OWN)
        beside = found.get(other)
        one = found[PEER if name == PEER else OWN][args.sequences[0]]  # without adapters
        titles = ["tokens/s together", f"beside {args.sequences[0]}", f"beside {other}" if beside else ""]
        print(f"\n{name:24}" + "".join(f"{title:34}" for title in titles).rstrip())
        for count, values in rates.items():
            columns = [values, ratios(values, one), *([ratios(values, beside[count])] if beside else [])]
            print(f"{count:>9} sequences     " + " ".join(f"{spread(column):33}" for column in columns).rstrip())


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [value / other for value, other in zip(values, others, strict=True)]


def peer_version(peer: Path) -> str:
    """What the peer says of itself."""
    run = subprocess.run([str(peer), "--version"], capture_output=True, text=True)
    lines = [line for line in (run.stdout + run.stderr).splitlines() if "version" in line]
    return lines[0].partition(":")[2].strip() if lines else "of an unknown version"


if __name__ == "__main__":
    main()
