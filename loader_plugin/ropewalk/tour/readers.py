"""How a tour is taken: one set of weights that reads in two ways, asked the same questions about the same document.

    scaled   the RoPE scaling of the tour and its LoRA
    plain    the RoPE that the model was trained with, at positions that it never saw: what happens without

Both are variants of a loaded model, with engines of their own, so nothing is loaded twice and nobody who uses the model
notices. A document stands before its question, so that the engine reads it once and has its rows for the next question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropewalk.base.choices import MAX_RUNNING
from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.engine.engine import Engine
from ropewalk.engine.text_stream import Completion
from ropewalk.generate.generate import Progress
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.model import Model
from ropewalk.model.variants import AdapterUse, Chosen, Variant, open_variant, scaling_variant
from ropewalk.rope.rope import Rope, resolve_rope
from ropewalk.text.tokenizer.load import Tokenizer
from ropewalk.tour.tour import Question, Tour, adapter_folder, tour_file

PLAIN = "none"
ROOM = 512  # positions beside the document: for a question, its answer and the template
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=96)  # the longest answer quotes its passage


@dataclass(frozen=True, slots=True)
class Reader:
    """One way to read. adapters: of its requests, as the engine takes them."""

    engine: Engine
    adapters: Chosen | None

    @property
    def rope(self) -> Rope:
        """How it turns positions."""
        return self.engine.model.rope

    def prompt_ids(self, document: str, question: str) -> list[int]:
        """The token ids of a question about a document, in the chat template of the model.

        Raises:
            ContextLengthError: they do not fit the context.
        """
        return self.engine.chat_ids([{"role": "user", "content": f"{document.strip()}\n\n{question.strip()}"}])

    def ask(self, document: str, question: str, progress: Progress | None = None) -> Completion:
        """The answer, whole. Errors as for `Engine.chat`."""
        ids = self.prompt_ids(document, question)
        return self.engine.generate(ids, self.params, progress=progress, adapters=self.adapters)

    @property
    def params(self) -> SamplingParams:
        """Greedy, so that an answer is right or wrong and not lucky."""
        return replace(GREEDY, stop=self.engine.chat_template.stop)


@dataclass(frozen=True, slots=True)
class Readers:
    """A model in the two ways of a tour."""

    scaled: Reader
    plain: Reader

    def reader(self, is_scaled: bool) -> Reader:
        """One of them."""
        return self.scaled if is_scaled else self.plain


def open_readers(
    tour: Tour, folder: Path, model: Model, tokenizer: Tokenizer, max_running: int = MAX_RUNNING
) -> Readers:
    """The two ways to read of a model that was loaded from `folder`; errors as for `readers_for`. max_running: as for
    `Engine`."""
    num_tokens = tour.measured.tokens
    try:
        return readers_for(tour.scaling, tour.adapter, num_tokens, folder, model, tokenizer, max_running)
    except (ConfigError, UnsupportedError) as error:
        raise type(error)(f"{tour_file(folder)}: {error}") from error


def readers_for(
    scaling: Mapping[str, Any],
    adapter: str | None,
    num_tokens: int,
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    max_running: int = MAX_RUNNING,
) -> Readers:
    """The same for a scaling and an adapter that are no tour yet, and documents of so many tokens.

    Raises:
        ConfigError, UnsupportedError: a scaling that there is not. Others as for `Model.load_adapter`.
    """
    rope = resolve_rope(model.config.raw, rope_scaling=scaling, source=model.config.source)
    uses = () if adapter is None else (AdapterUse(adapter, adapter_folder(folder, adapter)),)
    length = max(rope.covers or 0, num_tokens + ROOM)

    def opened(variant: Variant) -> Reader:
        made, adapters = open_variant(model, variant, length)
        return Reader(Engine(made, tokenizer, max_running=max_running), adapters)

    return Readers(opened(Variant("scaled", rope, uses)), opened(scaling_variant(model, PLAIN, 1.0)))


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is the stored one: to the letter, but for white space around it."""
    return answer.strip() == question.answer.strip()
