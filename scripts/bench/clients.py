"""What the measurements of several clients of one engine share: a client is a thread that streams one reply."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import ropewalk
from ropewalk.engine.engine import Engine
from ropewalk.generate.generate import GenerationStats
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.tokenizer.load import load_tokenizer


def new_engine(folder: Path, args: argparse.Namespace, max_seq_len: int, max_running: int) -> Engine:
    """An engine without guesses, so that a token of a reply is a step."""
    model = ropewalk.load_model(folder, max_seq_len, compute=args.compute, threads=args.threads)
    return Engine(model, load_tokenizer(folder), max_running=max_running, speculation=None)


WORDS = 259  # the first id that is a word: those before may add no text of their own, and so no piece of the stream
NEVER = float("-inf")


class Client(threading.Thread):
    """Streams a greedy reply of `num_tokens` to a prompt, and remembers when each token came.

    asked_s: when it asked. token_s: when each token came. progress: of its prompt, from 0 to 1.
    """

    def __init__(self, engine: Engine, prompt_ids: Sequence[int], num_tokens: int) -> None:
        super().__init__(daemon=True)
        self._engine, self._prompt_ids = engine, prompt_ids
        self._params = SamplingParams(
            temperature=0, max_new_tokens=num_tokens, ignore_eos=True, logit_bias=dict.fromkeys(range(WORDS), NEVER)
        )
        self.asked_s = 0.0
        self.token_s: list[float] = []
        self.progress = 0.0
        self.stats: GenerationStats | None = None
        self.error: Exception | None = None
        self._leaves = threading.Event()

    def run(self) -> None:
        """The thread."""
        self.asked_s = time.perf_counter()
        try:
            stream = self._engine.stream(
                self._prompt_ids, self._params, cancelled=self._leaves.is_set, progress=self._read
            )
            for _ in stream:
                self.token_s.append(time.perf_counter())
            self.stats = stream.stats
        except Exception as error:  # for the thread that waits
            self.error = error

    def leave(self) -> None:
        """Want no more tokens."""
        self._leaves.set()

    def finished(self) -> Client:
        """This client, once it is done.

        Raises:
            RuntimeError: its request failed.
        """
        self.join()
        if self.error is not None:
            raise RuntimeError(f"a client failed: {self.error}") from self.error
        return self

    @property
    def first_token_s(self) -> float:
        """Seconds from asking to the first token."""
        return self.token_s[0] - self.asked_s

    @property
    def waits_s(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]

    def _read(self, done: int, total: int) -> None:
        self.progress = done / total
