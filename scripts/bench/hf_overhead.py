"""What transformers' `generate` adds to our own generation loop, per token.

    python scripts/bench/hf_overhead.py                     # the embedded model
    python scripts/bench/hf_overhead.py --prompt-tokens 4096 --max-seq-len 5000 --rounds 5

Three loops take turns writing greedy replies: our own (`generate.Generation`), transformers' `generate` on
`ropewalk.hf`, and transformers again with a tokens-only streamer. Each has a model of its own on the same files and
starts with an empty cache. The prompt is timed separately and left out. The texts of all three are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

import ropewalk
import ropewalk.hf
from benchmarking import print_head, spread
from ropewalk.files.embedded import demo_model_path
from ropewalk.generate.generate import Generation
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.model.model import Model


class Count(BaseStreamer):
    """A streamer that does as little as possible."""

    def __init__(self) -> None:
        self.tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.numel()

    def end(self) -> None:
        pass


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=demo_model_path())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-seq-len", type=int, help="default: what the model declares")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_head(f"transformers {transformers.__version__} over our own loop, {args.folder.name}")
    loaded = [ropewalk.load_model(args.folder, args.max_seq_len, threads=args.threads) for _ in range(3)]
    prompt = torch.randint(3, loaded[0].config.vocab_size, (1, args.prompt_tokens), generator=torch.manual_seed(0))
    wrapped = [ropewalk.hf.RopewalkForCausalLM(model) for model in loaded[1:]]
    works = {
        "our own loop": own_loop(loaded[0], prompt, args.new_tokens),
        "transformers": their_loop(wrapped[0], prompt, args.new_tokens, streamed=False),
        "transformers, streamed": their_loop(wrapped[1], prompt, args.new_tokens, streamed=True),
    }
    report(works, args)


def own_loop(model: Model, prompt: torch.Tensor, new_tokens: int) -> Callable[[], tuple[list[int], float]]:
    """Seconds per token after the prompt, and the tokens."""

    def work() -> tuple[list[int], float]:
        params = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
        scheduler = Scheduler(model)
        with torch.inference_mode(), scheduler.open(prompt[0].tolist(), keep=False) as sequence:
            steps = Generation(sequence, params)
            ids = [next(steps).token_id]
            started = time.perf_counter()
            ids += [step.token_id for step in steps]
        return ids, (time.perf_counter() - started) / (new_tokens - 1)

    return work


def their_loop(
    model: ropewalk.hf.RopewalkForCausalLM, prompt: torch.Tensor, new_tokens: int, streamed: bool
) -> Callable[[], tuple[list[int], float]]:
    """The same through transformers; its time runs from the end of the prompt to the return of `generate`."""

    def work() -> tuple[list[int], float]:
        model(torch.tensor([[0]]))  # drops what the last round cached
        options = {"streamer": Count()} if streamed else {}
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            **options,
        )
        return ids[0, prompt.shape[1] :].tolist(), model.last_stats.generation_s / (new_tokens - 1)

    return work


def report(works: dict[str, Callable[[], tuple[list[int], float]]], args: argparse.Namespace) -> None:
    """Medians of all loops, and of the differences within a round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    texts = {name: work()[0] for name, work in works.items()}  # the warm-up round
    for _ in range(args.rounds):
        for name, work in works.items():
            texts[name], seconds = work()
            times[name].append(1000 * seconds)
    own, *others = works
    same = all(texts[name] == texts[own] for name in others)
    print(f"\n{args.prompt_tokens} prompt tokens, {args.new_tokens} new, {args.threads} threads, {args.rounds} rounds")
    print("milliseconds per token: median (middle half)")
    for name, values in times.items():
        print(f"  {name:38}{spread(values)}")
    for name in others:
        added = [theirs - ours for theirs, ours in zip(times[name], times[own], strict=True)]
        print(f"  added by {name:29}{spread(added)}")
        print(f"  {'':9}share of our own loop        {statistics.median(added) / statistics.median(times[own]):9.1%}")
    print(f"  same text: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
