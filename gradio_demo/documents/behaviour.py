"""Asking documents: texts with metadata, the closed-context prompt that they make, and where an answer came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.engine.kept import opening
from ropewalk.generate.sampling import SamplingParams
from ropewalk.gradio_demo.model_bar.workbench import Workbench
from ropewalk.gradio_demo.replies.reply import DONE, start_reply
from ropewalk.gradio_demo.replies.request import ReplyRequest, with_stop
from ropewalk.gradio_demo.replies.running import Running
from ropewalk.gradio_demo.replies.status import Meter, describe, meter
from ropewalk.gradio_demo.replies.templates import chat_template, prompt_ids
from ropewalk.gradio_demo.shared.texts import read_text_file
from ropewalk.gradio_demo.shared.visitors import Visitor
from ropewalk.text.chat_formats import closed_context_prompt

MAX_DOCUMENTS = 64
HONESTY = "Don't make up answers if you don't know."
WORD = re.compile(r"\w{4,}")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and what is known about it; empty metadata is left out of the prompt."""

    title: str
    text: str
    url: str = ""
    date: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """As the prompt writes it."""
        named = {"title": self.title, "url": self.url, "date": self.date}
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True, slots=True)
class Count:
    """Tokens of a prompt against the context; `room` is kept for the answer."""

    tokens: int
    room: int
    size: int

    @property
    def fits(self) -> bool:
        """True if it can be asked."""
        return self.tokens + self.room <= self.size


@dataclass(frozen=True, slots=True)
class Source:
    """A document behind an answer. cited: its title, url or date occurs in the answer; shared: the fraction of the
    answer's longer words that occur in its text."""

    document: Document
    cited: bool
    shared: float


@dataclass(frozen=True, slots=True)
class AnswerView:
    """What is shown at one moment; sources come at the end."""

    text: str
    line: str
    meter: Meter
    running: bool
    sources: tuple[Source, ...] = ()
    error: str | None = None


class Documents:
    """Questions about documents. Each stands alone: nothing is remembered from one to the next."""

    def __init__(self, workbench: Workbench, running: Running) -> None:
        self._workbench = workbench
        self._running = running

    def read(self, paths: Sequence[Path]) -> list[Document]:
        """Dropped files, titled by their names.

        Raises:
            RequestError: one of them is not text, or too large.
        """
        checked = [self._workbench.access.check_upload(path) for path in paths]
        return [Document(path.name, read_text_file(path)) for path in checked]

    def count(self, documents: Sequence[Document], question: str, template: str, params: SamplingParams) -> Count:
        """How much of the context a question would take.

        Raises:
            RequestError: no model, no documents or no question; or as `closed_context_prompt`.
        """
        loaded = self._workbench.require()
        ids = self._prompt(documents, question, template)
        return Count(len(ids), min(params.max_new_tokens or 1, loaded.model.max_seq_len // 4), loaded.model.max_seq_len)

    def ask(
        self, visitor: Visitor, documents: Sequence[Document], question: str, template: str, request: ReplyRequest
    ) -> Iterator[AnswerView]:
        """The answer, view by view."""
        try:
            loaded = self._workbench.require()
            count = self.count(documents, question, template, request.params)
            if not count.fits:
                raise RequestError(
                    f"the documents and the question take {count.tokens} tokens, the answer {count.room}, and the "
                    f"context has {count.size}: remove a document, or load the model with a longer context"
                )
            ids = self._prompt(documents, question, template)
            stop = chat_template(template, loaded.engine).stop
            params = with_stop(request.params, stop)
            reply = start_reply(loaded.engine, ids, params, request.adapters, visitor.person)
            with self._running.hold(visitor.tab, reply):
                for snapshot in reply.follow():
                    running, text = snapshot.phase != DONE, snapshot.text.strip()
                    sources = () if running else sources_of(documents, text)
                    level = meter(snapshot.stats, loaded.model.max_seq_len)
                    yield AnswerView(text, describe(snapshot), level, running, sources, snapshot.error)
        except RopewalkError as error:
            yield AnswerView("", str(error), Meter(), False, (), str(error))

    def opening(self, documents: Sequence[Document], template: str) -> list[int]:
        """The tokens of a prompt before the question, whatever that is.

        Raises:
            RequestError: no model, no documents, or more of them than fit the context.
        """
        ids = opening(*(self._prompt(documents, question, template) for question in ("A", "Z")))
        size = self._workbench.require().model.max_seq_len
        if len(ids) >= size:
            raise RequestError(
                f"the documents take {len(ids)} tokens, and the context has {size}: remove one, or load the model with "
                "a longer context"
            )
        return ids

    def _prompt(self, documents: Sequence[Document], question: str, template: str) -> list[int]:
        engine = self._workbench.require().engine
        blocks = [(document.metadata, document.text) for document in documents]
        text = closed_context_prompt(blocks, question)
        return prompt_ids(engine.tokenizer, chat_template(template, engine), [{"role": "user", "content": text}])


def chosen_documents(documents: Sequence[Document], titles: Sequence[str] | None) -> list[Document]:
    """Those with one of the titles, in the order of the list."""
    return [document for document in documents if document.title in (titles or ())]


def sources_of(documents: Sequence[Document], answer: str) -> tuple[Source, ...]:
    """Every document with what ties the answer to it, the closest first."""
    words = {word.lower() for word in WORD.findall(answer)}
    found = []
    for document in documents:
        own = {word.lower() for word in WORD.findall(document.text)}
        cited = any(value in answer for value in document.metadata.values() if len(value) > 3)
        found.append(Source(document, cited, len(words & own) / len(words) if words else 0.0))
    return tuple(sorted(found, key=lambda source: (source.cited, source.shared), reverse=True))


def with_documents(documents: Sequence[Document], new: Sequence[Document]) -> list[Document]:
    """The list with more of them at its end; what has a title that is taken gets another one.

    Raises:
        RequestError: there would be too many.
    """
    if len(documents) + len(new) > MAX_DOCUMENTS:
        raise RequestError(f"at most {MAX_DOCUMENTS} documents can be kept: remove some first")
    found = list(documents)
    for document in new:
        found.append(_renamed(document, {other.title for other in found}))
    return found


def _renamed(document: Document, taken: set[str]) -> Document:
    """Titles tell documents apart in the list."""
    number, title = 2, document.title
    while title in taken:
        title, number = f"{document.title} ({number})", number + 1
    return replace(document, title=title)
