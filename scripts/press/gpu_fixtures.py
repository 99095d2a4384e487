"""Every checkpoint fixture through the GPU backend, with the whole prompt and its greedy tokens, as a table.

    python scripts/press/gpu_fixtures.py                      in Triton's interpreter, where torch sees no card
    python scripts/press/gpu_fixtures.py --device cuda        on a card
    python scripts/press/gpu_fixtures.py --rows 24 g4-64      prompts of 24 tokens; fixtures with this in their name
    python scripts/press/gpu_fixtures.py --cache-type q4      keys and values in codes
    python scripts/press/gpu_fixtures.py --of families        other families; containers: AWQ and compressed-tensors

A row is one fixture with one arithmetic: the largest difference from the logits of transformers, what is allowed, how
many greedy tokens agree, and whether the prompt in chunks, and beside another sequence, has the same bits. Ends with 1
if anything is wrong. The interpreter takes half an hour for all.

With codes, whose error is their own, the logits are compared with those of the reference backend over the same format,
and may differ from them by a share of what the format itself makes there, besides what is allowed without it: a number
that float16 products move by d gets the code beside with a probability of d / step, and is then off by a whole step.
Beside the error of the codes themselves, step / sqrt(12), that makes sqrt(12 d / step) in the mean square. Of numbers
of size 1, whose largest of 32 are near 2.1, d is about 3e-4: sums of products with factors rounded to 11 bits. So it
makes 0.47 with steps of 2.1 / 127.5, 0.23 with 2.1 / 31.5 and 0.11 with 2.1 / 7.5. The largest difference of a prompt
can be further out, since few numbers are off by much: 0.39, 0.44 and 0.25 were seen. So half is allowed with 8 and 6
bits and a third with 4, by the wider of keys and values. Greedy tokens are not compared then.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's own switch, which it reads when it is imported

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

import ropewalk  # noqa: E402
from fixtures import (  # noqa: E402
    allowed_error,
    container_fixture_folders,
    family_fixture_folders,
    gptq_fixture_folders,
)
from ropewalk.config.cache_format import CODE_BITS, CacheFormat  # noqa: E402

FP16_ERROR = 2e-2  # of the fixtures' README, for float16 where transformers computes in float32
CODES_SHARE = {8: 1 / 2, 6: 1 / 2, 4: 1 / 3}  # of the error of codes, that other codes may make: see above
FLOAT32_ERROR = 2e-3  # of the README of families and containers, where everything is float32
CHUNK = 20
FOLDERS = {"gptq": gptq_fixture_folders, "families": family_fixture_folders, "containers": container_fixture_folders}


@dataclass(frozen=True)
class Row:
    """What one fixture gave."""

    name: str
    compute: str
    num_rows: int
    error: float
    allowed: float
    greedy: str
    same_bits: bool
    seconds: float

    @property
    def is_right(self) -> bool:
        """Everything as it must be."""
        agreed, decided = map(int, self.greedy.split("/"))
        return self.error <= self.allowed and agreed == decided and self.same_bits

    def __str__(self) -> str:
        bits = "same bits" if self.same_bits else "OTHER BITS"
        return (
            f"{self.name:30} {self.compute:6} {self.num_rows:5} {self.error:10.2e} {self.allowed:10.2e} "
            f"{self.greedy:>8} {bits:>11} {self.seconds:8.1f}{'' if self.is_right else '   WRONG'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="only fixtures with this in their name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="tokens of each prompt (default: all)")
    parser.add_argument("--greedy", type=int, default=4, help="tokens to continue with (default: %(default)s)")
    parser.add_argument("--compute", nargs="+", default=["fp16", "exact"])
    parser.add_argument("--cache-type", default="fp16", help="format of keys and values, such as q8 or q4+256")
    parser.add_argument("--of", choices=FOLDERS, default="gptq", help="which fixtures (default: %(default)s)")
    args = parser.parse_args()
    print(
        f"{'fixture':30} {'':6} {'rows':>5} {'error':>10} {'allowed':>10} {'greedy':>8} {'chunked':>11} {'seconds':>8}"
    )
    wrong = 0
    for folder in FOLDERS[args.of]():
        for compute in args.compute if args.name in folder.name else ():
            row = measured(folder, compute, args)
            wrong += not row.is_right
            print(row, flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


def measured(folder: Path, compute: str, args: argparse.Namespace) -> Row:
    """Load the fixture and compare."""
    started = time.perf_counter()
    with np.load(folder / "expected.npz") as arrays:
        want = dict(arrays)
    ids = want["input_ids"].tolist()[: args.rows]
    model = ropewalk.load_model(folder, backend="gpu", device=args.device, compute=compute, cache_type=args.cache_type)
    cache, seq_len = model.new_cache(), len(want["input_ids"])  # frequencies may depend on it
    (logits,) = model.step([ropewalk.Span(ids, cache, logits="all", seq_len=seq_len)])
    kept = want["logits_positions"] < len(ids)
    positions = torch.from_numpy(want["logits_positions"][kept])
    got = logits[positions.to(logits.device)].cpu().numpy()
    allowed = allowed_of(folder, compute, args.cache_type)
    expected, is_coded = want["logits"][kept], model.cache_format.is_coded
    if is_coded:
        expected, plain = (
            of_reference(folder, ids, seq_len, kind)[positions].numpy() for kind in (args.cache_type, "fp16")
        )
        allowed += codes_share(model.cache_format) * float(np.abs(expected - plain).max())
    error = float(np.abs(got - expected).max())
    compares_greedy = args.rows is None and not is_coded
    greedy = continued(model, cache, logits, want, allowed, args) if compares_greedy else "0/0"
    same = torch.equal(logits, chunked(model, ids, seq_len))
    return Row(folder.name, compute, len(ids), error, allowed, greedy, same, time.perf_counter() - started)


def allowed_of(folder: Path, compute: str, cache_type: str) -> float:
    """The largest difference from transformers' logits; of other families and containers, what their README says."""
    if compute == "fp16":
        return FP16_ERROR
    if folder in gptq_fixture_folders():
        return allowed_error(folder, "fp16").most
    return FLOAT32_ERROR if cache_type == "fp32" else FP16_ERROR


def codes_share(cache_format: CacheFormat) -> float:
    """Of the error that codes make, by the one whose steps are the smaller."""
    return max(CODES_SHARE[CODE_BITS[kind]] for kind in (cache_format.keys, cache_format.values) if kind in CODE_BITS)


def of_reference(folder: Path, ids: list[int], seq_len: int, cache_type: str) -> torch.Tensor:
    """The logits of the prompt on the reference backend, [T, V]."""
    model = ropewalk.load_model(folder, backend="reference", compute="exact", cache_type=cache_type)
    return model.step([ropewalk.Span(ids, model.new_cache(), logits="all", seq_len=seq_len)])[0]


def continued(model, cache, logits, want: dict[str, np.ndarray], allowed: float, args: argparse.Namespace) -> str:
    """How many tokens of the greedy continuation agree, of those that the margin decides."""
    agreed = decided = 0
    wanted = zip(want["greedy_ids"].tolist(), want["greedy_margin"].tolist(), strict=True)
    for _, (token_id, margin) in zip(range(args.greedy), wanted, strict=False):
        if margin < 2 * allowed:
            break
        decided += 1
        agreed += int(logits[-1].argmax()) == token_id
        if model.reusable_prefix(cache, want["input_ids"].tolist()) < len(want["input_ids"]):
            break  # frequencies depend on the length
        logits = model.forward([token_id], cache)
    return f"{agreed}/{decided}"


def chunked(model, ids: list[int], seq_len: int) -> torch.Tensor:
    """The logits of the prompt in chunks of different sizes, each in a step beside another sequence."""
    cache, other, parts = model.new_cache(), model.new_cache(), []
    first = 0
    while first < len(ids):
        end = min(len(ids), first + (1 if first == 3 else CHUNK if first else 3))
        spans = [
            ropewalk.Span(ids[first : first + 5], other, logits="none"),
            ropewalk.Span(ids[first:end], cache, logits="all", seq_len=seq_len),
        ]
        parts.append(model.step(spans)[1])
        first = end
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(main())
