"""Conversations on disk: one JSON file each, in a folder per person, replaced as a whole after every finished turn.

    DATA/conversations/<person>/<id>.json     DATA/conversations/<person>/current

A file is written next to its final place, flushed to the disk and then moved there, so that a process killed at any
moment leaves either the old or the new conversation, never part of one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ropewalk.base.errors import RequestError

FORMAT = 1
ROLES = ("user", "assistant")
MAX_TITLE = 48
MAX_FILE_BYTES = 16 * 2**20
UNTITLED = "New conversation"
_ID = re.compile(r"[0-9a-f]{32}")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. note: the line about tokens and speed under a reply."""

    role: str
    content: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is saved. template: its name in the page; system: the system text, or ""; times: seconds since 1970."""

    turns: tuple[Turn, ...] = ()
    system: str = ""
    template: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)

    @property
    def title(self) -> str:
        """The beginning of the first question."""
        first = next((turn.content for turn in self.turns if turn.role == "user"), "")
        words = " ".join(first.split())
        return (words[: MAX_TITLE - 1] + "…" if len(words) > MAX_TITLE else words) or UNTITLED

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates take them, the system text first."""
        opening = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return opening + [{"role": turn.role, "content": turn.content} for turn in self.turns]

    def with_turn(self, turn: Turn) -> Conversation:
        """The conversation with one more message."""
        return replace(self, turns=(*self.turns, turn), updated=time.time())

    def before_last_question(self) -> tuple[Conversation, str]:
        """(the conversation up to the last question, that question); the question is "" if there is none."""
        return self.before(max((i for i, turn in enumerate(self.turns) if turn.role == "user"), default=0))

    def before(self, index: int) -> tuple[Conversation, str]:
        """(the conversation before the message of that index, its text)."""
        text = self.turns[index].content if index < len(self.turns) else ""
        return replace(self, turns=self.turns[:index], updated=time.time()), text

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"


def read_conversation(text: str, source: str) -> Conversation:
    """A conversation from the text of a file of ours, or from a list of {"role", "content"} messages.

    Raises:
        RequestError: not JSON, or of another form; names `source`, what was found and what is accepted.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{source} is not JSON: {error}") from error
    if isinstance(data, list):
        data = {"turns": data}
    if not isinstance(data, Mapping):
        raise RequestError(f"{source} must hold an exported conversation or a list of messages, found {_shown(data)}")
    if data.get("format", FORMAT) != FORMAT:
        raise RequestError(f"{source}: format {_shown(data['format'])} is not known, {FORMAT} is")
    turns = data.get("turns", data.get("messages"))
    if not isinstance(turns, list):
        raise RequestError(f"{source}: turns must be a list of messages, found {_shown(turns)}")
    system, turns = _split_system(data.get("system", ""), turns)
    read = tuple(_turn(turn, number, source) for number, turn in enumerate(turns, 1))
    for name, value in (("system", system), ("template", data.get("template", ""))):
        _require_text(value, f"{source}: {name}")
    times = {n: float(data[n]) for n in ("created", "updated") if _is_time(data.get(n))}
    known = {"id": data["id"]} if _is_id(data.get("id")) else {}
    return Conversation(turns=read, system=system, template=data.get("template", ""), **known, **times)


class ConversationStore:
    """The conversations of all people under one folder. People are told apart by a secret of their browser, or by the
    name that they logged in with; only its hash is written."""

    def __init__(self, root: Path) -> None:
        self._root = root / "conversations"

    def save(self, person: str, conversation: Conversation) -> None:
        """Write a conversation, and remember it as the one that is open. One without turns has no file.

        Raises:
            RequestError: it cannot be written.
        """
        path = self._path(person, conversation.id)
        with _told("saved"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if conversation.turns:
                _replace_file(path, conversation.to_json())
            else:
                path.unlink(missing_ok=True)
        self.set_current(person, conversation.id)

    def find(self, person: str, conversation_id: str) -> Conversation | None:
        """Read one back; None if there is none of that id.

        Raises:
            RequestError: no id, or the file is damaged.
        """
        path = self._path(person, conversation_id)
        with _told("read"):
            try:
                return read_conversation(path.read_text(encoding="utf-8"), path.name)
            except FileNotFoundError:
                return None
            except UnicodeDecodeError as error:
                raise RequestError(f"{path.name} is damaged: {error}") from error

    def load(self, person: str, conversation_id: str) -> Conversation:
        """As `find`.

        Raises:
            RequestError: as there, and where there is none.
        """
        found = self.find(person, conversation_id)
        if found is None:
            raise RequestError("this conversation is not there any more: it was deleted in another tab")
        return found

    def delete(self, person: str, conversation_id: str) -> None:
        """Delete one; nothing happens if there is none.

        Raises:
            RequestError: it cannot be deleted.
        """
        with _told("deleted"):
            self._path(person, conversation_id).unlink(missing_ok=True)

    def list(self, person: str) -> list[Conversation]:
        """All that can be read and are not empty, the most recently used first. Damaged files are left alone."""
        found = []
        for path in self._folder(person).glob("*.json"):
            try:
                found.append(self.load(person, path.stem))
            except RequestError:
                continue
        kept = [conversation for conversation in found if conversation.turns]
        return sorted(kept, key=lambda conversation: conversation.updated, reverse=True)

    def current(self, person: str) -> Conversation:
        """The conversation that was open last, or a new one."""
        try:
            return self.load(person, (self._folder(person) / "current").read_text(encoding="ascii"))
        except (OSError, ValueError, RequestError):
            return Conversation()

    def set_current(self, person: str, conversation_id: str) -> None:
        """Remember which conversation is open; "" or an unsaved one means a new one.

        Raises:
            RequestError: it cannot be written.
        """
        folder = self._folder(person)
        with _told("saved"):
            if folder.is_dir():
                _replace_file(folder / "current", conversation_id)

    def _folder(self, person: str) -> Path:
        return self._root / sha256(person.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _path(self, person: str, conversation_id: str) -> Path:
        if not _is_id(conversation_id):
            raise RequestError(f"{_shown(conversation_id)} is not the id of a conversation")
        return self._folder(person) / f"{conversation_id}.json"


@contextmanager
def _told(done: str) -> Iterator[None]:
    """Says what the disk refuses; where that lies is for the log, not for everybody who opens the page."""
    try:
        yield
    except OSError as error:
        logger.warning("a conversation cannot be %s: %s", done, error)
        raise RequestError(f"the conversation cannot be {done}: {error.strerror}") from error


def _replace_file(path: Path, text: str) -> None:
    """Replace the whole file or nothing, even if the machine stops."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _split_system(system: Any, turns: list[Any]) -> tuple[Any, list[Any]]:
    """A first message of the role "system" is the system text."""
    first = turns[0] if turns else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        return system or first.get("content", ""), turns[1:]
    return system, turns


def _turn(value: Any, number: int, source: str) -> Turn:
    if not isinstance(value, Mapping) or value.get("role") not in ROLES:
        raise RequestError(f"{source}: message {number} must have a role, user or assistant, found {_shown(value)}")
    _require_text(value.get("content"), f"{source}: content of message {number}")
    note = value.get("note", "")
    if isinstance(note, str):
        _require_text(note, f"{source}: note of message {number}")
    return Turn(value["role"], value["content"], note if isinstance(note, str) else "")


def _require_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{what} must be text, found {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can say half of a pair; the page cannot be sent it
        raise RequestError(f"{what} has an unpaired surrogate at character {error.start}") from error


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
