"""One process of experts.py: decoding while only some of the experts are held, as JSON.

Tokens of a run are all different, so that each asks for experts of its own. What a token reads is counted by the
system: all that was read from files, and what of it came from the disk. The yardstick reads the tensors of as many
random experts as a layer misses for a token, at once, layer after layer, and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import ropewalk
from experts import resident_bytes
from filled_caches import varied_ids
from memory import forget_files
from ropewalk.files.folder import Checkpoint
from ropewalk.model.model import Model

READERS = (1, 4, 16)  # threads of the yardstick, of which the fastest number counts
Piece = tuple[Path, int, int]  # file, first byte, bytes


def main() -> None:
    """Measure, print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("expert_memory", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compute", default="int8")
    parser.add_argument("--head-bits", default="auto")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = resident_bytes()
    model = ropewalk.load_model(
        args.folder,
        max_seq_len=4096,
        backend="cpu",
        compute=args.compute,
        threads=args.threads,
        head_bits=args.head_bits,
        expert_memory=args.expert_memory,
    )
    loaded = resident_bytes() - before
    with torch.inference_mode():
        found = measured(model, args)
    found |= {"loaded": loaded, "resident": resident_bytes() - before, "held": model.weights.num_bytes}
    print(json.dumps(found))


def measured(model: Model, args: argparse.Namespace) -> dict:
    """Tokens with the files in the page cache and, if asked for, without."""
    tokens = Tokens(model)
    for file in args.folder.glob("*.safetensors"):
        file.read_bytes()
    tokens.decode(args.tokens)  # what is held is by now what tokens ask for
    found = {"warm": tokens.decode(args.tokens * args.rounds)}
    if args.cold:
        found["cold"] = tokens.decode(args.tokens * args.rounds, lambda: forget_files(args.folder))
        with Checkpoint(args.folder) as checkpoint:
            experts = pieces_of(checkpoint)
        size = sum(num_bytes for _, _, num_bytes in experts[0])
        missing = max(1, round(statistics.mean(found["cold"]["read"]) / size / model.config.num_layers))
        speeds = {readers: alone(experts, missing, readers, args) for readers in READERS}
        found["alone"] = max(speeds.values(), key=statistics.median)
    return found


class Tokens:
    """One token after the other."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._cache = model.new_cache()
        self._done = 0

    def decode(self, count: int, before: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
        """Seconds of each token, bytes that were read for it, and bytes that came from the disk.

        before: is called ahead of each token, and not timed.
        """
        found: dict[str, list[float]] = {"seconds": [], "read": [], "disk": []}
        for _ in range(count):
            before()
            read, disk = read_bytes()
            started = time.perf_counter()
            self._cache.truncate(min(self._cache.length, 128))
            self._model.forward(varied_ids(self._done, 1, self._model.config.vocab_size), self._cache, "last")
            found["seconds"].append(time.perf_counter() - started)
            after = read_bytes()
            found["read"].append(after[0] - read)
            found["disk"].append(after[1] - disk)
            self._done += 1
        return found


def read_bytes() -> tuple[int, int]:
    """What this process has read from files, and what it had read from disks."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["read_bytes"])


def pieces_of(checkpoint: Checkpoint) -> list[list[Piece]]:
    """Where the tensors of each expert lie in the files."""
    pieces: dict[str, list[Piece]] = {}
    for name in checkpoint.names():
        found = re.match(r".*\.experts\.\d+\.", name)
        if found:
            info = checkpoint.info(name)
            pieces.setdefault(found[0], []).append((info.file, info.offset, info.num_bytes))
    return list(pieces.values())


def alone(experts: list[list[Piece]], missing: int, readers: int, args: argparse.Namespace) -> list[float]:
    """Bytes a second from the disk, of reading so many random experts at once, in each round."""
    rng, speeds = random.Random(readers), []
    opened = {path: os.open(path, os.O_RDONLY) for path in {file for pieces in experts for file, _, _ in pieces}}
    with ThreadPoolExecutor(readers) as pool:
        for _ in range(args.rounds * 4):
            forget_files(args.folder)
            pieces = [piece for expert in rng.sample(experts, min(missing, len(experts))) for piece in expert]
            before, started = read_bytes()[1], time.perf_counter()
            list(pool.map(lambda piece: os.pread(opened[piece[0]], piece[2], piece[1]), pieces))
            speeds.append((read_bytes()[1] - before) / (time.perf_counter() - started))
    for number in opened.values():
        os.close(number)
    return speeds


if __name__ == "__main__":
    main()
