"""Dynamic NTK token by token beside whole: what keys of an older base cost, and what bringing them along costs.

    python scripts/bench/dynamic_steps.py [--factor 2]

Windows of a text are read token by token after a first part, as in generation, under {"rope_type": "dynamic"}: by
transformers with its own cache, which leaves keys rotated by the base of the length that they were computed for; by
ropewalk in the same way ("stale"); with keys that are turned when the sequence outgrows the length of their base
("rotate", the default), or computed anew ("recompute"). At every 32nd position the logits are compared with those of a
whole forward of exactly that length. All in float32, on the dequantised weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ropewalk
from agreement import Agreement
from benchmarking import print_head
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.model import Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo_model"))
from evaluate import quantised_model

EVERY = 32  # positions between comparisons
Rows = torch.Tensor  # [positions from the first part on, V]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--first", type=int, default=448, help="tokens that are read at once")
    parser.add_argument("--length", type=int, default=1280)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = demo_model_path()
    scaling = {"rope_type": "dynamic", "factor": args.factor}
    print_head("dynamic NTK step by step against whole, the embedded model")
    print(
        f"factor {args.factor:g}, {args.windows} windows of {args.length} tokens, the first {args.first} at once; "
        f"perplexity of the others; KL of the whole forward from the step, in nats, at every {EVERY}nd position"
    )
    whole_ids = ropewalk.load_tokenizer(folder).encode((folder / "held_out.txt").read_text())
    windows = [whole_ids[number * args.length :][: args.length] for number in range(args.windows)]
    options = {"compute": "exact", "cache_type": "fp32", "max_seq_len": args.length, "rope_scaling": scaling}
    options["threads"] = args.threads
    ours = {mode: ropewalk.load_model(folder, rope_growth=mode, **options) for mode in ("rotate", "recompute")}
    ways: dict[str, Callable[[list[int]], Rows]] = {
        "transformers": lambda ids: by_transformers(quantised_model(folder, their_rope(scaling)), ids, args.first),
        "stale": lambda ids: by_steps(left_stale(ropewalk.load_model(folder, **options)), ids, args.first),
        "rotate": lambda ids: by_steps(ours["rotate"], ids, args.first),
        "recompute": lambda ids: by_steps(ours["recompute"], ids, args.first),
    }
    with torch.inference_mode():
        references = [whole(ours["rotate"], ids, args.first) for ids in windows]
        for name, way in ways.items():
            report(name, way, windows, references, args.first)


def report(name: str, way: Callable[[list[int]], Rows], windows: list, references: list[Rows], first: int) -> None:
    """One line of the table."""
    agreement, nll, count, started = Agreement(), 0.0, 0, time.perf_counter()
    thirds: list[list[float]] = [[], [], []]
    for ids, expected in zip(windows, references, strict=True):
        rows = way(ids)
        before = len(agreement.kl)
        agreement.add(expected, rows[::EVERY])
        found = agreement.kl[before:]
        for place, value in enumerate(found):
            thirds[3 * place // len(found)].append(value)
        targets = torch.tensor(ids[first + 1 :])
        nll += float(torch.nn.functional.cross_entropy(rows[:-1].float(), targets, reduction="sum"))
        count += len(targets)
    seconds = (time.perf_counter() - started) / len(windows)
    parts = " ".join(f"{sum(part) / len(part):.4f}" for part in thirds)
    perplexity = float(torch.tensor(nll / count).exp())
    print(
        f"{name:13} perplexity {perplexity:7.3f}  KL {agreement.mean_kl:.4f} (by thirds of the way: {parts})  top-1 "
        f"{100 * agreement.top_part:5.1f} %  {seconds:6.2f} s a window",
        flush=True,
    )


def whole(model: Model, ids: list[int], first: int) -> Rows:
    """Logits after every `EVERY`th token from `first` on, each of a forward of exactly that length."""
    ends = range(first + 1, len(ids) + 1, EVERY)
    return torch.cat([model.forward(ids[:end], model.new_cache()) for end in ends])


def by_steps(model: Model, ids: list[int], first: int) -> Rows:
    """Logits after each token from `first` on."""
    cache = model.new_cache()
    model.forward(ids[:first], cache, "none")
    return torch.cat([model.forward([token_id], cache) for token_id in ids[first:]])


def left_stale(model: Model) -> Model:
    """As it would be if keys stayed as they were computed, each step with the base of its own length."""
    model.follow_length_ = lambda spans: None
    model.reach_of = lambda reach, length: length
    return model


def their_rope(scaling: dict) -> dict:
    """The scaling as transformers takes it for the embedded model."""
    return {**scaling, "rope_theta": 10000.0}


def by_transformers(model: torch.nn.Module, ids: list[int], first: int) -> Rows:
    """As `by_steps`, with transformers' own cache."""
    out = model(torch.tensor([ids[:first]]), use_cache=True)
    rows = []
    for token_id in ids[first:]:
        out = model(torch.tensor([[token_id]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1:])
    return torch.cat(rows)


if __name__ == "__main__":
    main()
