"""Documents that were read once: kept in a folder of this machine, offered again to the person who kept them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256

from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.base.memory import format_bytes
from ropewalk.engine.kept import Kept
from ropewalk.engine.kept_folder import KeptFile, KeptFolder
from ropewalk.engine.work import Work
from ropewalk.gradio_demo.documents.behaviour import Document, Documents
from ropewalk.gradio_demo.model_bar.workbench import Loaded, Workbench
from ropewalk.gradio_demo.replies.reply import LOOK_S
from ropewalk.gradio_demo.replies.request import ReplyRequest
from ropewalk.gradio_demo.replies.running import Running
from ropewalk.gradio_demo.shared.visitors import Visitor

DOCUMENTS, PERSON, TEMPLATE, TITLE = "documents", "person", "template", "title"  # what is kept with the file


@dataclass(frozen=True, slots=True)
class KeptDocuments:
    """What one file of the folder holds. problem: why the loaded model cannot use it."""

    name: str
    title: str
    num_tokens: int
    num_bytes: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class KeepView:
    """How far the keeping is. name: that of the file, at the end."""

    line: str
    running: bool
    error: bool = False
    name: str | None = None


class DocumentShelf:
    """The kept documents of each person, in one folder."""

    def __init__(self, workbench: Workbench, documents: Documents, running: Running) -> None:
        self._workbench, self._documents, self._running = workbench, documents, running

    @property
    def folder(self) -> KeptFolder:
        """Where the files are."""
        return self._workbench.kept_folder

    def keep(
        self, visitor: Visitor, documents: Sequence[Document], template: str, request: ReplyRequest
    ) -> Iterator[KeepView]:
        """Read documents and keep them, view by view. Those that have just been asked about are not read again."""
        try:
            loaded = self._workbench.require()
            ids = self._documents.opening(documents, template)
            about = {
                TITLE: ", ".join(document.title for document in documents),
                TEMPLATE: template,
                PERSON: _person_key(visitor),
                DOCUMENTS: json.dumps([asdict(document) for document in documents]),
            }
            name = _file_name(loaded, about, request)

            def save(work: Work[Kept | None]) -> Kept | None:
                return loaded.engine.kept.save_as(
                    name,
                    ids,
                    about,
                    progress=work.progress,
                    cancelled=work.is_cancelled,
                    adapters=list(request.adapters) or None,
                    client=visitor.person,
                )

            work = Work(save, "keep")
            with self._running.hold(visitor.tab, work):
                yield from work.follow(lambda is_over: _view(work, name, is_over), LOOK_S)
        except RopewalkError as error:
            yield KeepView(str(error), False, True)

    def list(self, visitor: Visitor) -> list[KeptDocuments]:
        """What the visitor has kept; what the loaded model can use comes first.

        Raises:
            SavedCacheError: the folder cannot be read.
        """
        found = [self._entry(kept) for kept in self.folder.list() if _is_of(kept, visitor)]
        return sorted(found, key=lambda entry: entry.problem is not None)

    def open(self, visitor: Visitor, name: str) -> tuple[list[Document], str]:
        """The documents of a file, and the template that they were read for.

        Raises:
            RequestError: the visitor has kept nothing of that name.
        """
        about = self._find(visitor, name).saved.description.about
        try:
            documents = [Document(**entry) for entry in json.loads(about[DOCUMENTS])]
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{name} was not kept by this page: forget it, and keep the documents again") from error
        return documents, about.get(TEMPLATE, "")

    def forget(self, visitor: Visitor, name: str) -> None:
        """Delete a file.

        Raises:
            RequestError: the visitor has kept nothing of that name. SavedCacheError: it may not be deleted.
        """
        self.folder.remove(self._find(visitor, name).name)

    def _find(self, visitor: Visitor, name: str) -> KeptFile:
        kept = self.folder.find(name)
        if kept is None or not _is_of(kept, visitor):
            raise RequestError("these documents are not kept any more: read them again")
        return kept

    def _entry(self, kept: KeptFile) -> KeptDocuments:
        loaded = self._workbench.loaded
        problem = "no model is loaded" if loaded is None else loaded.engine.kept.problem_of(kept)
        description = kept.saved.description
        return KeptDocuments(
            kept.name, description.about.get(TITLE, ""), description.num_tokens, kept.num_bytes, problem
        )


def _view(work: Work[Kept | None], name: str, is_over: bool) -> KeepView:
    done, total = work.done_of
    if not is_over:
        return KeepView(f"reading: {done} of {total} tokens" if total else "waiting for the model", True)
    if work.error is not None:
        return KeepView(str(work.error), False, True)
    kept = work.result
    if kept is None:
        return KeepView("stopped: nothing is kept", False)
    line = f"kept: {kept.num_tokens:,} tokens in {format_bytes(kept.num_bytes)}, which are not read again"
    return KeepView(line, False, name=name)


def _person_key(visitor: Visitor) -> str:
    return sha256(visitor.person.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _is_of(kept: KeptFile, visitor: Visitor) -> bool:
    return kept.saved is not None and kept.saved.description.about.get(PERSON) == _person_key(visitor)


def _file_name(loaded: Loaded, about: dict[str, str], request: ReplyRequest) -> str:
    """The same for the same documents of the same person under the same model and settings."""
    model = loaded.model
    facts = [model.weights.fingerprint, str(model.layer_order), model.cache_type, model.backend.arithmetic]
    parts = [*facts, model.rope.describe(), repr(request.adapters), json.dumps(about)]
    return f"documents-{sha256(json.dumps(parts).encode()).hexdigest()[:24]}"
