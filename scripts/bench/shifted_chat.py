"""A conversation over a full window: the oldest turns go, and the rest is shifted instead of read again.

    python scripts/bench/shifted_chat.py [FOLDER]

A client asks with its whole conversation, again and again. With context shift the engine drops the oldest turns, finds
the rest in its cache and moves it down. Without, the same shortened prompts are read again from the first token that
differs. The replies are those of the shifted conversation; at each of their tokens the distribution is compared with
that of a fresh reading of the same prompt and reply: the part of tokens with the same likeliest token, and the KL
divergence, in nats, over the 100 likeliest.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import ropewalk
from benchmarking import print_head
from ropewalk.engine.shorten import shortened
from ropewalk.files.embedded import demo_model_path
from ropewalk.generate.generate import Step

SYSTEM = "You complete Python code. You answer with code alone."
TOP = 100
LEAST = 1e-9  # probability of what is not listed


@dataclass
class Total:
    """Over all turns. read: prompt tokens that were computed; prompt_s: until the first token of all replies."""

    shifts: int = 0
    shifted: int = 0
    read: int = 0
    prompt_s: float = 0.0


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=demo_model_path())
    parser.add_argument("--text", type=Path, default=demo_model_path() / "held_out.txt", help="what is asked about")
    parser.add_argument("--window", type=int, default=512, help="max_seq_len")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--question", type=int, default=220, help="characters of a question")
    parser.add_argument("--reply", type=int, default=32, help="tokens of a reply")
    parser.add_argument("--cache-type", default="fp16")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print_head(f"a shifted conversation, {args.folder.name}")
    print(f"window {args.window}, {args.turns} turns, {args.cache_type} cache, {SYSTEM!r} kept at the start")
    shifting, plain = (engine(args, shift) for shift in (True, False))
    params = ropewalk.SamplingParams(temperature=0, max_new_tokens=args.reply, logprobs=TOP, ignore_eos=True)
    text = args.text.read_text()
    messages = [{"role": "system", "content": SYSTEM}]
    totals = {"shifted": Total(), "read again": Total()}
    same, kl = [], []
    for turn in range(args.turns):
        messages.append({"role": "user", "content": text[turn * args.question :][: args.question]})
        stream = timed(totals["shifted"], shifting.chat(messages, params))
        kept, dropped = shortened(plain, messages, args.reply)
        again = timed(totals["read again"], plain.chat(kept, params))
        ids = plain.chat_ids(kept)
        reply = [step.token_id for step in stream.steps]
        expected = plain.score(ids + reply, TOP)[len(ids) :]
        same += [ours.top[0][0] == theirs.top[0][0] for ours, theirs in zip(stream.steps, expected, strict=True)]
        divergences = [divergence(theirs, ours) for ours, theirs in zip(stream.steps, expected, strict=True)]
        kl += divergences
        stats, other = stream.stats, again.stats
        print(
            f"turn {turn + 1:2}: {dropped:2} messages dropped, prompt {stats.prompt_tokens:4}; shifted "
            f"{stats.shifted_tokens:4}, read {stats.prompt_tokens - stats.reused_tokens:4}; without, read "
            f"{other.prompt_tokens - other.reused_tokens:4}; KL {sum(divergences) / len(divergences):.5f}",
            flush=True,
        )
        messages.append({"role": "assistant", "content": plain.tokenizer.decode(reply)})
    for name, total in totals.items():
        print(
            f"{name:10}: {total.read:6} prompt tokens read, {total.shifted:6} shifted in {total.shifts} shifts, "
            f"{1000 * total.prompt_s / args.turns:7.1f} ms to the first token of a reply"
        )
    print(
        f"top-1 {100 * sum(same) / len(same):.1f} % of {len(same)} tokens; KL {sum(kl) / len(kl):.5f}, at most "
        f"{max(kl):.4f}"
    )


def engine(args: argparse.Namespace, context_shift: bool) -> ropewalk.Engine:
    """An engine whose window is as long as asked for."""
    model = ropewalk.load_model(args.folder, args.window, cache_type=args.cache_type, threads=2)
    return ropewalk.Engine(model, ropewalk.load_tokenizer(args.folder), context_shift=context_shift)


def timed(total: Total, stream: ropewalk.engine.text_stream.TextStream) -> ropewalk.engine.text_stream.TextStream:
    """Run a stream to its end, and count."""
    for _ in stream:
        pass
    stats = stream.stats
    total.read += stats.prompt_tokens - stats.reused_tokens
    total.shifted += stats.shifted_tokens
    total.prompt_s += stats.prompt_s
    total.shifts += stats.shifted_tokens > 0
    return stream


def divergence(expected: Step, got: Step) -> float:
    """KL of `got` from `expected` over the latter's likeliest tokens, the others counted as one; a token that `got`
    does not list gets a part of what it leaves."""
    ours = dict(got.top)
    share = max(1.0 - sum(math.exp(value) for value in ours.values()), LEAST) / TOP
    pairs = [(math.exp(value), math.exp(ours[token]) if token in ours else share) for token, value in expected.top]
    rest = [max(1.0 - sum(each), LEAST) for each in zip(*pairs, strict=True)]
    return sum(p * math.log(p / q) for p, q in [*pairs, tuple(rest)])


if __name__ == "__main__":
    main()
