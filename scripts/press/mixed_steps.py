"""Random steps of several sequences on every checkpoint at hand: does a row ever depend on what else is in its step?

    python scripts/press/mixed_steps.py --rounds 3 --seed 1

For each fixture, instruction set, compute mode and cache type, sequences of random lengths go through the model in
steps that mix them at random; on the way they are cut back, share their prefixes, and begin again from what is shared.
All logits must have the bits of `forward` on each sequence alone. The embedded model does the same with its adapters,
under RoPE scalings that depend on the length, with layers repeated, and in a pool that is too small for all.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

import ropewalk
from fixture_bits import EMBEDDED, FIXTURES, SCALINGS, ids_of
from ropewalk.errors import CacheFullError

NUM_SEQUENCES = 4


class Sequence:
    """One sequence, the logits that it must give, and how far it has come."""

    def __init__(self, model: Any, token_ids: list[int], adapters: str | None) -> None:
        self.token_ids, self.adapters = token_ids, adapters
        alone = model.new_cache()
        self.expected = model.forward(token_ids, alone, logits="all", adapters=adapters)  # [T, V]
        self.cache = model.new_cache()

    def span(self, count: int) -> ropewalk.Span:
        """The next `count` tokens."""
        first = self.cache.length
        ids = self.token_ids[first : first + count]
        return ropewalk.Span(ids, self.cache, "all", self.adapters, len(self.token_ids))

    @property
    def is_over(self) -> bool:
        """True when all tokens have been computed."""
        return self.cache.length == len(self.token_ids)


def main() -> int:
    """Press every model; 1 if a row differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of each model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose, differing, steps = random.Random(args.seed), 0, 0
    for name, model, token_ids in models():
        for _ in range(args.rounds):
            found, wrong = press(model, token_ids, choose)
            steps, differing = steps + found, differing + wrong
            print(f"{name}: {found} steps, {wrong} differ", flush=True)
    print(f"{steps} steps, {differing} with other bits than alone")
    return int(bool(differing))


def models() -> Iterator[tuple[str, Any, list[int]]]:
    """(name, model, prompt) of everything that is pressed."""
    folders = [path.parent for root in FIXTURES for path in sorted(root.glob("gptq/*/config.json"))]
    for folder in folders:
        for isa in ropewalk.native.available_isas():
            for compute, cache_type in (("exact", "fp16"), ("int8", "fp16"), ("int8", "fp32")):
                options = {"isa": isa, "compute": compute, "cache_type": cache_type, "max_input_len": 37}
                yield f"{folder.name} {options}", ropewalk.load_model(folder, **options), ids_of(folder)
    prompt = (ids_of(EMBEDDED) * 8)[:700]
    for options in ({}, {"layer_order": "0-2,1-3"}, *({"rope_scaling": scaling} for scaling in SCALINGS)):
        tight = ropewalk.load_model(EMBEDDED, max_seq_len=704, **options)
        memory = 3 * tight.cache_bytes(704)  # of NUM_SEQUENCES contexts
        model = ropewalk.load_model(EMBEDDED, max_seq_len=704, cache_memory=memory, **options)
        for path in sorted((EMBEDDED / "adapters").iterdir()):
            model.load_adapter(path, path.name)
        yield f"embedded {options}", model, prompt


def press(model: Any, prompt: list[int], choose: random.Random) -> tuple[int, int]:
    """(steps, steps in which a row differed) until all sequences are over."""
    sequences = [_sequence(model, prompt, choose) for _ in range(NUM_SEQUENCES)]
    steps = differing = 0
    while sequences:
        chosen = choose.sample(sequences, choose.randint(1, len(sequences)))
        spans = [sequence.span(choose.choice((1, 1, 2, 7, 64, 300))) for sequence in chosen]
        before = [sequence.cache.length for sequence in chosen]
        try:
            results = model.step(spans)
        except CacheFullError:
            _drop(choose.choice(sequences), choose)
            continue
        steps += 1
        places = zip(chosen, before, results, strict=True)
        differing += any(not torch.equal(got, s.expected[at : at + len(got)]) for s, at, got in places)
        _disturb(model, choose.choice(sequences), choose)
        sequences = [sequence for sequence in sequences if not sequence.is_over]
    return steps, differing


def _sequence(model: Any, prompt: list[int], choose: random.Random) -> Sequence:
    common = choose.randint(0, len(prompt) - 1)  # with the others
    tail = [choose.randrange(model.config.vocab_size) for _ in range(choose.randint(1, len(prompt) - common))]
    adapters = choose.choice((None, *model.adapters, "+".join(model.adapters) or None))
    return Sequence(model, prompt[:common] + tail, adapters)


def _disturb(model: Any, sequence: Sequence, choose: random.Random) -> None:
    """Sometimes share what a sequence has, cut it back, or begin it again from what is shared."""
    if choose.random() < 0.6:
        return
    model.share(sequence.cache)
    if choose.random() < 0.5:
        _drop(sequence, choose)
        model.attach(sequence.cache, sequence.token_ids, sequence.adapters, len(sequence.token_ids))


def _drop(sequence: Sequence, choose: random.Random) -> None:
    sequence.cache.truncate(choose.randint(0, sequence.cache.length))


if __name__ == "__main__":
    sys.exit(main())
