"""Reading prompts and decoding after them, beside llama.cpp and ik_llama.cpp in the same run.

    pip install gguf cmake ninja
    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b
    python scripts/bench/peers.py FOLDER --work DIR                       # gets and builds llama.cpp there
    python scripts/bench/peers.py FOLDER --work DIR --ik-source SOURCES   # and ik_llama.cpp, from a checkout of it
    python scripts/bench/peers.py FOLDER --llama PATH/llama-batched-bench --gguf FILE

llama.cpp is that of the newest source distribution of `llama-cpp-python`, built for this machine; the GGUF file, of the
folder's shape, is made by random_gguf.py. What is given is used as it is, and what --work holds is not made again.

A measurement reads a prompt of N tokens and decodes --tokens after it. The programs take turns within a round, each
peer in a process of its own, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import ropewalk
from benchmarking import add_engine_arguments, model_folder, print_head, random_ids, spread
from ropewalk.model.model import Model

OWN = "ropewalk"
TARGET = "llama-batched-bench"
BUILD_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF")
IK_OPTIONS = ("-rtr", "-fa", "on")  # weights interleaved when they are loaded, and its attention in tiles
ROOM = 512  # positions to spare in a peer's cache
SHAPES = {22: "1.1b", 32: "7b"}  # by the number of layers


class Rates(NamedTuple):
    """Tokens/s of reading a prompt, and of decoding after it."""

    reading: float
    decoding: float


class Peer(NamedTuple):
    """A program to run beside ours."""

    name: str
    program: Path
    options: tuple[str, ...]


Measured = dict[str, dict[int, list[Rates]]]  # by program and length, for each round


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--isa")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=16, help="decoded after each prompt")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where peers are built and the GGUF file is kept")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="of the same shape (default: made in --work)")
    parser.add_argument("--llama", type=Path, metavar="PATH", help=f"llama.cpp's {TARGET} (default: built in --work)")
    parser.add_argument("--ik-source", type=Path, metavar="DIR", help="a checkout of ik_llama.cpp")
    parser.add_argument("--ik", type=Path, metavar="PATH", help=f"its {TARGET} (default: built from --ik-source)")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.lengths, args.tokens = 2, [16, 32], 3
    torch.set_num_threads(args.threads)
    with model_folder(args) as folder:
        peers = [] if args.smoke and args.llama is None else prepared(folder, args)
        print_head(f"reading and decoding beside peers, {folder.name}")
        longest = max(args.lengths) + args.tokens
        model = ropewalk.load_model(
            folder, max_seq_len=longest, compute=args.compute, threads=args.threads, isa=args.isa
        )
        report(measured(model, peers, args), peers, args)


def prepared(folder: Path, args: argparse.Namespace) -> list[Peer]:
    """The peers, and the GGUF file, made where they are not given."""
    if args.work is None and (args.llama is None or args.gguf is None):
        raise SystemExit("--work DIR is needed to build llama.cpp and make a GGUF file, or --llama and --gguf")
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    llama = args.llama or built(llama_source(args.work))
    args.gguf = args.gguf or gguf_like(folder, args.work)
    peers = [Peer("llama.cpp", llama, ("-fa", "on"))]
    if args.ik is not None or args.ik_source is not None:
        peers.append(Peer("ik_llama.cpp", args.ik or built(args.ik_source), IK_OPTIONS))
    return peers


def llama_source(work: Path) -> Path:
    """The sources of llama.cpp in the newest source distribution of llama-cpp-python."""
    found = sorted(work.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if found:
        return found[-1]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(work)]
    run([*pip, "llama-cpp-python"])
    (archive,) = work.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return next(work.glob("llama_cpp_python-*/vendor/llama.cpp"))


def built(source: Path) -> Path:
    """The program, compiled for this machine unless it is there."""
    program = source / "build" / "bin" / TARGET
    if not program.exists():
        run(["cmake", "-S", str(source), "-B", str(source / "build"), *BUILD_OPTIONS])
        run(["cmake", "--build", str(source / "build"), "--target", TARGET, "-j", "2"])
    return program


def gguf_like(folder: Path, work: Path) -> Path:
    """A GGUF file of random weights of the folder's shape."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    if layers not in SHAPES:
        raise SystemExit(
            f"{folder} has {layers} layers, which is none of the shapes of random_gguf.py: give --gguf FILE"
        )
    file = work / f"{SHAPES[layers]}.gguf"
    if not file.exists():
        run([sys.executable, str(Path(__file__).with_name("random_gguf.py")), str(file), "--shape", SHAPES[layers]])
    return file


def run(command: list[str]) -> None:
    """Show what it says, and end with it where it fails."""
    print("#", " ".join(command), file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def measured(model: Model, peers: list[Peer], args: argparse.Namespace) -> Measured:
    """Rates of each program, after a warm-up round."""
    works: dict[str, Callable[[], dict[int, Rates]]] = {OWN: lambda: own_rates(model, args)}
    for peer in peers:
        works[peer.name] = lambda peer=peer: peer_rates(peer, args)
    found: Measured = {name: {length: [] for length in args.lengths} for name in works}
    for number in range(args.rounds + 1):
        for name, work in works.items():
            for length, rates in work().items():
                if number:
                    found[name][length].append(rates)
    return found


def own_rates(model: Model, args: argparse.Namespace) -> dict[int, Rates]:
    """One measurement of ours."""
    found = {}
    with torch.inference_mode():
        for length in args.lengths:
            ids, cache = random_ids(length, length, model.config.vocab_size), model.new_cache()
            start = time.perf_counter()
            model.forward(ids, cache)
            read = time.perf_counter()
            for number in range(args.tokens):
                model.forward([300 + number], cache)
            found[length] = Rates(length / (read - start), args.tokens / (time.perf_counter() - read))
    return found


def peer_rates(peer: Peer, args: argparse.Namespace) -> dict[int, Rates]:
    """One measurement of a peer: one process for all lengths."""
    options = {
        "-m": args.gguf.resolve(), "-c": max(args.lengths) + args.tokens + ROOM, "-t": args.threads, "-npl": 1,
        "-npp": ",".join(map(str, args.lengths)), "-ntg": args.tokens,
    }  # fmt: skip
    command = [str(peer.program.resolve()), *(str(part) for pair in options.items() for part in pair), *peer.options]
    with tempfile.TemporaryDirectory() as scratch:  # for the log that ik_llama.cpp leaves where it runs
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    found = read_table(done.stdout + done.stderr)  # ik_llama.cpp logs its table
    if done.returncode or set(found) != set(args.lengths):
        raise SystemExit(
            f"{peer.name} measured {sorted(found)} and ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return found


def read_table(text: str) -> dict[int, Rates]:
    """Rates by length, from the table that llama-batched-bench prints: its columns PP, S_PP and S_TG."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    names = next((row for row in rows if "PP" in row), [])
    numbers = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names) and row[0].isdigit()]
    return {int(row["PP"]): Rates(float(row["S_PP t/s"]), float(row["S_TG t/s"])) for row in numbers}


def report(found: Measured, peers: list[Peer], args: argparse.Namespace) -> None:
    """Rates of each program, and how many times those of each peer ours are."""
    print(f"{args.compute}, {args.threads} threads, {args.tokens} tokens after each prompt, {args.rounds} rounds")
    for peer in peers:
        print(f"{peer.name}: {args.gguf.name}, {args.gguf.stat().st_size / 1e6:.0f} MB, {' '.join(peer.options)}")
    for place, title in enumerate(("reading a prompt, tokens/s", "decoding after it, tokens/s")):
        print(f"\n{title:30}" + "".join(f"{length:>9} tokens{'':18}" for length in args.lengths).rstrip())
        rates = {name: [[row[place] for row in by[length]] for length in args.lengths] for name, by in found.items()}
        for name, columns in rates.items():
            print(f"{name:30}" + " ".join(f"{spread(column):33}" for column in columns).rstrip())
        for peer in peers:
            ratios = [
                [ours / theirs for ours, theirs in zip(*pair, strict=True)]
                for pair in zip(rates[OWN], rates[peer.name], strict=True)
            ]
            print(f"{'times ' + peer.name:30}" + " ".join(f"{spread(column):33}" for column in ratios).rstrip())


if __name__ == "__main__":
    main()
