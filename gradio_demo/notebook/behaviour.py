"""The notebook: raw continuation of a text, and how sure the model was of each token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ropewalk.base.errors import RopewalkError
from ropewalk.gradio_demo.model_bar.workbench import Workbench
from ropewalk.gradio_demo.replies.reply import DONE, start_reply
from ropewalk.gradio_demo.replies.request import ReplyRequest
from ropewalk.gradio_demo.replies.running import Running
from ropewalk.gradio_demo.replies.status import Meter, describe, meter
from ropewalk.gradio_demo.shared.visitors import Visitor

NUM_ALTERNATIVES = 5


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token of the continuation. probability: by the model itself, before the sampler's settings; alternatives: the
    most likely tokens in its place, (text, probability) each, the likeliest first."""

    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class NotebookView:
    """What is shown at one moment. text: prompt and continuation."""

    text: str
    tokens: tuple[ShownToken, ...]
    line: str
    meter: Meter
    running: bool
    error: str | None = None


class Notebook:
    """Continuations; nothing of them is kept."""

    def __init__(self, workbench: Workbench, running: Running) -> None:
        self._workbench = workbench
        self._running = running

    def complete(self, visitor: Visitor, text: str, request: ReplyRequest) -> Iterator[NotebookView]:
        """The text as it grows. An empty text is continued from the model's start token."""
        try:
            loaded = self._workbench.require()
            ids = loaded.tokenizer.encode(text) or list(loaded.engine.end_token_ids[:1])
            params = replace(request.params, logprobs=NUM_ALTERNATIVES)
            reply = start_reply(loaded.engine, ids, params, request.adapters, visitor.person)
            shown = _TokenTexts(loaded.tokenizer.token_bytes)
            with self._running.hold(visitor.tab, reply):
                for snapshot in reply.follow():
                    yield NotebookView(
                        text + snapshot.text,
                        shown.update(snapshot.tokens),
                        describe(snapshot),
                        meter(snapshot.stats, loaded.model.max_seq_len),
                        snapshot.phase != DONE,
                        snapshot.error,
                    )
        except RopewalkError as error:
            yield NotebookView(text, (), str(error), Meter(), False, str(error))


class _TokenTexts:
    """Tokens as they are shown; each is converted once."""

    def __init__(self, token_bytes) -> None:
        self._token_bytes = token_bytes
        self._shown: list[ShownToken] = []

    def update(self, tokens: Sequence) -> tuple[ShownToken, ...]:
        for step, text in tokens[len(self._shown) :]:
            alternatives = tuple((self._text(token_id), math.exp(logprob)) for token_id, logprob in step.top)
            self._shown.append(ShownToken(text, math.exp(step.logprob), alternatives))
        return tuple(self._shown)

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")
