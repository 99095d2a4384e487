"""What guessing ahead gains: n-grams on texts that repeat themselves, and a draft model that is right as often as told.

    python scripts/bench/speculation.py                                   # n-grams, embedded model
    python scripts/bench/random_checkpoint.py 7B --shape 7b
    python scripts/bench/random_checkpoint.py 1.1B --shape 1.1b
    python scripts/bench/speculation.py --model 7B --draft 1.1B           # and a draft model, forced acceptance

Each reply is written without guesses and with them, in turn; both must be the same tokens. Times are those from the
first token on. n-grams: functions to be written again with another name, and questions whose answers stand in a
document. Draft model: it computes what it would always compute, and then its logits are replaced, so that each guess is
right with the given probability: the cost of a real draft model, at any acceptance.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import ropewalk
from benchmarking import print_head, random_ids, spread
from random_checkpoint import write_random_checkpoint
from ropewalk.files.embedded import demo_model_path
from ropewalk.generate.generate import Generation, GenerationStats
from ropewalk.generate.guesses import Guesses
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.speculation import DraftGuesser, DraftSequence, Guesser, NgramGuesser
from ropewalk.text.tokenizer.load import load_tokenizer

CHANCES = (0.0, 0.5, 1.0)
Clock = Callable[[], float]
TARGET = 0.97  # of plain, whatever is accepted
MAX_SEQ_LEN = 512  # of the embedded model, which was trained on no more

FUNCTION = """\
def {verb}_{noun}(self, {noun}, encoding=None):
    \"\"\"{Verb} the {noun} and return the number of lines.\"\"\"
    if {noun} is None:
        raise ValueError("{noun} must not be None")
    if self.closed:
        raise ValueError("I/O operation on closed file")
    count = 0
    for line in {noun}:
        self.write(line)
        count += 1
    return count
"""
DOCUMENT = """\
The {noun} module
=================

The {noun} module can {verb} a {noun}.  A {noun} is closed when it is not used.
The default encoding of a {noun} is utf-8.  The {verb} method returns the number of lines.
The {verb} method raises ValueError if the {noun} is closed.

Question: What is the default encoding of a {noun}?
Answer: The default encoding of a {noun} is utf-8.

Question: What does the {verb} method return?
Answer: The {verb} method returns the number of lines.

Question: What does the {verb} method raise?
Answer:"""
SUBJECTS = (("read", "stream"), ("write", "buffer"), ("parse", "document"), ("copy", "archive"))


@dataclass(frozen=True)
class Written:
    """A reply: its tokens, and seconds from the first token to the last."""

    token_ids: list[int]
    seconds: float
    stats: GenerationStats


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model that guesses are made for by --draft")
    parser.add_argument("--draft", type=Path, help="a smaller model with the same vocabulary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compute", default="int8")
    parser.add_argument("--tokens", type=int, default=128, help="of each reply")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the prompt for the draft model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="of one thread: for machines that are busy")
    parser.add_argument("--smoke", action="store_true", help="few tokens, tiny models: does the script run?")
    args = parser.parse_args()
    if (args.model is None) != (args.draft is None):
        parser.error("--model and --draft belong together")
    if args.smoke:
        args.rounds, args.tokens = 1, 24
    args.threads = 1 if args.processor_time else args.threads
    torch.set_num_threads(args.threads)
    print_head("guessing ahead")
    print(f"{args.compute}, {args.threads} threads, {args.tokens} tokens a reply, {args.rounds} rounds")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        measure_ngrams(args)
        if args.smoke:
            args.model = args.draft = Path(scratch) / "tiny"
            write_random_checkpoint(args.model, "tiny", group_size=64)
        if args.model is not None:
            measure_draft(args)


def clock_of(args: argparse.Namespace) -> Clock:
    """What the replies are timed with."""
    return time.thread_time if args.processor_time else time.perf_counter


def measure_ngrams(args: argparse.Namespace) -> None:
    """Prompt lookup with the embedded model."""
    folder = demo_model_path()
    model = ropewalk.load_model(folder, MAX_SEQ_LEN, compute=args.compute, threads=args.threads)
    tokenizer, scheduler = load_tokenizer(folder), Scheduler(model)
    print(f"\nn-grams, {folder.name}")
    for name, texts in (("code editing", code_editing()), ("document questions", document_questions())):
        prompts = [tokenizer.encode(text) for text in texts]
        report(
            name,
            [
                [
                    pair(scheduler, prompt, args.tokens, NgramGuesser, number, clock_of(args))
                    for number in range(args.rounds)
                ]
                for prompt in prompts
            ],
        )


def code_editing() -> list[str]:
    """A function, and the beginning of the same function with another name."""
    texts = []
    for (verb, noun), (_, other) in zip(SUBJECTS, SUBJECTS[1:] + SUBJECTS[:1], strict=True):
        before, after = (FUNCTION.format(verb=verb, Verb=verb.title(), noun=name) for name in (noun, other))
        texts.append(f"{before}\n# The same, {noun} renamed to {other}:\n\n{after.splitlines()[0]}\n")
    return texts


def document_questions() -> list[str]:
    """A document, questions with answers that stand in it, and a last question."""
    return [DOCUMENT.format(verb=verb, noun=noun) for verb, noun in SUBJECTS]


def pair(
    scheduler: Scheduler, prompt: list[int], num_tokens: int, guesser: Callable[[], Guesser], number: int, clock: Clock
) -> tuple[Written, Written]:
    """The same reply without guesses and with them, which of them first changes from round to round.

    Raises:
        SystemExit: the two are not the same tokens.
    """
    makers = [lambda: None, lambda: Guesses(guesser())]
    written = [None, None]
    for which in (0, 1) if number % 2 == 0 else (1, 0):
        written[which] = write(scheduler, prompt, num_tokens, makers[which](), clock)
    plain, guessed = written
    if plain.token_ids != guessed.token_ids:
        raise SystemExit(f"WRONG: without guesses {plain.token_ids}, with guesses {guessed.token_ids}")
    return plain, guessed


def write(scheduler: Scheduler, prompt: list[int], num_tokens: int, guesses: Guesses | None, clock: Clock) -> Written:
    """A greedy reply of so many tokens."""
    params = SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True)
    with scheduler.open(prompt) as sequence:
        generation = Generation(sequence, params, guesses=guesses)
        token_ids = [next(generation).token_id]
        started = clock()
        token_ids += [step.token_id for step in generation]
        return Written(token_ids, clock() - started, generation.stats)


class ForcedDraft:
    """A draft sequence whose next token is the right one as often as told. right_ids: prompt and reply."""

    def __init__(self, draft: DraftSequence, right_ids: Sequence[int], chance: float, seed: object) -> None:
        self._draft, self._right_ids, self._chance = draft, right_ids, chance
        self._random = random.Random(str(seed))

    @property
    def length(self) -> int:
        """As the draft model's."""
        return self._draft.length

    @property
    def capacity(self) -> int:
        """As the draft model's."""
        return self._draft.capacity

    @property
    def vocab_size(self) -> int:
        """As the draft model's."""
        return self._draft.vocab_size

    def truncate(self, length: int) -> None:
        """As the draft model's."""
        self._draft.truncate(length)

    def forward(self, token_ids: Sequence[int], logits: str = "last") -> torch.Tensor | None:
        """Computed like any draft; then one token of the logits [1, V] is made certain."""
        out = self._draft.forward(token_ids, logits=logits)
        if out is None:
            return None
        right = self._right_ids[self.length] if self.length < len(self._right_ids) else 0
        forced = torch.zeros_like(out)
        forced[0, right if self._random.random() < self._chance else (right + 1) % out.shape[1]] = 1.0
        return forced


def measure_draft(args: argparse.Namespace) -> None:
    """A draft model at forced acceptance."""
    max_seq_len = args.prompt_tokens + args.tokens + 32
    options = {"compute": args.compute, "threads": args.threads}
    model, draft = (ropewalk.load_model(folder, max_seq_len, **options) for folder in (args.model, args.draft))
    scheduler, draft_scheduler = Scheduler(model), Scheduler(draft)
    print(f"\ndraft model {args.draft.name} for {args.model.name}, forced acceptance")
    prompts = [random_ids(args.prompt_tokens, number, model.config.vocab_size) for number in range(args.rounds)]
    answers = [write(scheduler, prompt, args.tokens, None, clock_of(args)).token_ids for prompt in prompts]
    for chance in CHANCES:
        replies = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            with draft_scheduler.open(prompt) as sequence:
                guesser = partial(DraftGuesser, ForcedDraft(sequence, prompt + answer, chance, number))
                replies.append(pair(scheduler, prompt, args.tokens, guesser, number, clock_of(args)))
        report(f"acceptance {chance:g}", [replies])


def report(name: str, by_text: list[list[tuple[Written, Written]]]) -> None:
    """Speed beside plain, of all replies and of the text that gains least (a single reply of some 50 ms says nothing),
    and how many guesses were right. by_text: (plain, with guesses) of each round, for each text."""
    replies = [pair for rounds in by_text for pair in rounds]
    lowest = min(statistics.median(plain.seconds / guessed.seconds for plain, guessed in rounds) for rounds in by_text)
    ratios = [plain.seconds / guessed.seconds for plain, guessed in replies]
    guesses = sum(guessed.stats.guessed_tokens for _, guessed in replies)
    right = sum(guessed.stats.accepted_tokens for _, guessed in replies)
    tokens = sum(len(guessed.token_ids) for _, guessed in replies)
    plain_ms = [1000 * plain.seconds / (len(plain.token_ids) - 1) for plain, _ in replies]
    print(f"  {name:20} plain, ms a token      {spread(plain_ms)}")
    print(f"  {'':20} speed beside plain     {spread(ratios)}   lowest text {lowest:.3f} (target: {TARGET:g})")
    print(f"  {'':20} {tokens} tokens, the same text; {guesses} guesses, {right} right")


if __name__ == "__main__":
    main()
