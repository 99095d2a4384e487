"""A mixture of experts beside the machine's limits and llama.cpp: prompts, decoding, memory, and experts from the disk.

    python scripts/bench/random_checkpoint.py FOLDER --shape 30b-a3b --layers 8
    python scripts/bench/experts.py FOLDER --threads 2 --parts 0.5 0.25 --cold
    python scripts/bench/random_gguf.py FILE --shape 30b-a3b --layers 8
    python scripts/bench/experts.py FOLDER --threads 2 --peer at_depth --peer-model FILE

A decoded token reads the weights of the experts that it has chosen and of everything that is no expert, once: its limit
is the memory bandwidth, measured in the same rounds. Prompts and decoding take turns with llama.cpp, through
llama_cpp/at_depth.cpp, which says how it is built; both get the same ids, all different, so that all experts of a layer
get rows. Random routers spread them evenly; a real model's are no worse to read.

--parts holds a part of the experts in memory, each part in a process of its own (cold_experts.py): its resident memory
beside the arithmetic, and decoding with the files in the page cache. --cold has the system forget the files before
every token as well, and compares what is read from the disk in that time with reads of such pieces alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import ropewalk
from benchmarking import add_engine_arguments, memory_reader, model_folder, paired, print_head, spread
from depth import Peer, worker
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.model.model import Model
from ropewalk.model.work import met_bytes

GIB = 1 << 30
ALL = 1 << 50  # as memory for experts: whatever they need
OURS, PEER = "ours", "llama.cpp"


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--rows", type=int, default=512, help="of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each round (default: %(default)s)")
    parser.add_argument("--head-bits", default="auto", help="see load_model (default: %(default)s)")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="the program of llama_cpp/at_depth.cpp")
    parser.add_argument("--peer-model", type=Path, metavar="GGUF")
    parser.add_argument("--peer-version", default="of unknown version")
    parser.add_argument("--parts", type=float, nargs="*", default=[], help="of the experts that are held, 0 to 1")
    parser.add_argument("--cold", action="store_true", help="with --parts: also without the page cache")
    args = parser.parse_args()
    if (args.peer is None) != (args.peer_model is None):
        parser.error("--peer and --peer-model belong together")
    if args.smoke:
        args.rounds, args.rows, args.tokens = 1, 16, 4
    torch.set_num_threads(args.threads)
    with model_folder(args, "tiny-moe") as folder, torch.inference_mode():
        print_head(f"a mixture of experts, {folder.name}")
        work = f"{args.rows} rows and {args.tokens} tokens"
        print(f"# {args.compute}, {args.threads} threads, {args.rounds} rounds of {work}")
        expert_bytes = report_speed(folder, args)
        for part in args.parts:
            report_part(folder, part, int(part * expert_bytes), args)


def report_speed(folder: Path, args: argparse.Namespace) -> int:
    """Prompts and decoding with all experts in memory. Returns the bytes of those."""
    before = resident_bytes()
    model = ropewalk.load_model(
        folder,
        max_seq_len=max(args.rows, args.tokens) + PAGE_TOKENS,
        backend="cpu",
        compute=args.compute,
        threads=args.threads,
        head_bits=args.head_bits,
        expert_memory=ALL,
    )
    if model.config.mixture is None:
        raise SystemExit(f"{folder} is no mixture of experts")
    grown = resident_bytes() - before
    print(f"\nweights {mb(model.weights.num_bytes)}; resident {mb(grown)} more than before they were loaded")
    peer = None if args.peer is None else Peer(("f16", "f16"), 0, args)
    times = paired(works(model, peer, args), args.rounds)
    if peer is not None:
        peer.close()
    report_decoding(model, times, args)
    report_prompt(times, args)
    return sum(experts.num_bytes for layer in model.weights.layers for experts in layer.experts.values())


def works(model: Model, peer: Peer | None, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What takes turns within a round."""
    cache = model.new_cache()
    found = {
        "memory": memory_reader(GIB),
        f"{OURS} decode": worker(model, cache, 0, args.tokens, 1),
        f"{OURS} layers": worker(model, cache, 0, args.tokens, 1, logits="none"),
        f"{OURS} prompt": worker(model, cache, 0, args.rows, args.rows),
    }
    if peer is not None:
        found |= {
            f"{PEER} decode": peer.worker(args.tokens, 1),
            f"{PEER} prompt": peer.worker(args.rows, args.rows),
        }
    return found


def report_decoding(model: Model, times: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Tokens a second beside what the bytes that a token touches allow, and beside the peer."""
    chosen, plain = met_bytes(model.config, model.weights.layers)
    head = model.weights.head.num_bytes
    mixture = model.config.mixture
    print(
        f"a token reads {mb(plain + chosen + head)}: {mb(chosen)} of {mixture.top_k} of {mixture.num_experts} experts "
        f"in {model.config.num_layers} layers, {mb(plain)} of their other weights, {mb(head)} of the head"
    )
    print(f"memory, GB/s                            {spread([GIB / s / 1e9 for s in times['memory']])}")
    for title, name, num_bytes in (
        ("decode", "decode", plain + chosen + head),
        ("layers alone", "layers", plain + chosen),
    ):
        seconds = [s / args.tokens for s in times[f"{OURS} {name}"]]
        shares = [num_bytes / s / (GIB / read) for s, read in zip(seconds, times["memory"], strict=True)]
        print(f"{title}, tokens/s".ljust(40) + spread([1 / s for s in seconds]))
        print(f"{title}, share of the bandwidth".ljust(40) + spread(shares) + "   (target: 0.85)")
    if f"{PEER} decode" in times:
        print(f"{PEER} decode, tokens/s".ljust(40) + spread([args.tokens / s for s in times[f"{PEER} decode"]]))
        print(f"decode beside {PEER}".ljust(40) + beside(times, "decode"))


def report_prompt(times: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Rows a second, beside the peer."""
    print(f"prompt of {args.rows}, tokens/s".ljust(40) + spread([args.rows / s for s in times[f"{OURS} prompt"]]))
    if f"{PEER} prompt" in times:
        print(f"{PEER} prompt, tokens/s".ljust(40) + spread([args.rows / s for s in times[f"{PEER} prompt"]]))
        print(f"prompt beside {PEER}".ljust(40) + beside(times, "prompt") + "   (target: 1.5)")
        print(f"{PEER}: {args.peer_version}, {args.peer_model.name}, flash attention, keys and values in f16")


def beside(times: dict[str, list[float]], work: str) -> str:
    """The peer's times over ours, within rounds."""
    pairs = zip(times[f"{OURS} {work}"], times[f"{PEER} {work}"], strict=True)
    return spread([other / ours for ours, other in pairs])


def report_part(folder: Path, part: float, expert_memory: int, args: argparse.Namespace) -> None:
    """Some of the experts in memory, in another process."""
    command = [sys.executable, str(Path(__file__).with_name("cold_experts.py")), str(folder), str(expert_memory)]
    command += ["--threads", str(args.threads), "--compute", args.compute, "--head-bits", args.head_bits]
    command += ["--tokens", str(args.tokens), "--rounds", str(args.rounds), *(["--cold"] if args.cold else [])]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    print(f"\n{part:.0%} of the experts, {mb(expert_memory)}")
    held, loaded, end = (mb(found[name]) for name in ("held", "loaded", "resident"))
    print(f"weights that are held {held}; resident {loaded} more when they are loaded, {end} at the end")
    warm = found["warm"]
    print("from the page cache, tokens/s".ljust(40) + spread([1 / s for s in warm["seconds"]]))
    print("  read for a token, MB".ljust(40) + spread([n / 1e6 for n in warm["read"]]))
    if args.cold:
        cold = found["cold"]
        print("from the disk, tokens/s".ljust(40) + spread([1 / s for s in cold["seconds"]]))
        print("  read from the disk for a token, MB".ljust(40) + spread([n / 1e6 for n in cold["disk"]]))
        speeds = [n / s / 1e6 for n, s in zip(cold["disk"], cold["seconds"], strict=True)]
        print("  in the time of the token, MB/s".ljust(40) + spread(speeds))
        print("  such reads alone, MB/s".ljust(40) + spread([speed / 1e6 for speed in found["alone"]]))


def resident_bytes() -> int:
    """Bytes of this process that lie in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def mb(num_bytes: float) -> str:
    """In units of a million bytes, as bandwidths are given."""
    return f"{num_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    main()
