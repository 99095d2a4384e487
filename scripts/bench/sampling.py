"""How long choosing a token takes, by settings and size of the vocabulary: beside the time that a model computes it.

    python scripts/bench/sampling.py
    python scripts/bench/sampling.py --vocabularies 151936 --rounds 200

Logits are normal with a few likely tokens, as a model's are. All settings take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarking import paired, print_head, spread
from ropewalk.generate.sampling import Sampler, SamplingParams

PLAIN = {"top_k": 0, "top_p": 1.0}
SETTINGS: dict[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "default (top_k 40, top_p 0.95)": {},
    "with repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "no filter": PLAIN,
    "min_p 0.05": PLAIN | {"min_p": 0.05},
    "top_p 0.95": PLAIN | {"top_p": 0.95},
    "typical 0.95": PLAIN | {"typical": 0.95},
    "DRY 0.8": PLAIN | {"dry_multiplier": 0.8},
}
PROMPT = list(range(500))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 151936], metavar="V")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    print_head("choosing a token")
    for vocab_size in args.vocabularies:
        print(f"\nms of a vocabulary of {vocab_size:,}")
        seconds = paired({name: chooser(vocab_size, given) for name, given in SETTINGS.items()}, args.rounds)
        for name, times in seconds.items():
            print(f"  {name:32} {spread([1e3 * s for s in times])}")


def chooser(vocab_size: int, given: Mapping[str, Any]) -> Callable[[], object]:
    """A function that chooses one token."""
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 2.5
    logits[:50] += 8.0
    sampler = Sampler(SamplingParams(seed=1, **given), PROMPT)
    return lambda: sampler.choose(logits)


if __name__ == "__main__":
    main()
