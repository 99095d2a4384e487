"""What the chat tab does: ask, ask again, edit, take back; open, save and export conversations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.gradio_demo.chat.answering import Answering
from ropewalk.gradio_demo.chat.conversations import (
    MAX_FILE_BYTES,
    Conversation,
    ConversationStore,
    Turn,
    read_conversation,
)
from ropewalk.gradio_demo.chat.next_reply import ChatView, follow_chat, make_reply
from ropewalk.gradio_demo.model_bar.workbench import Workbench
from ropewalk.gradio_demo.replies.request import ReplyRequest
from ropewalk.gradio_demo.replies.running import Running
from ropewalk.gradio_demo.replies.status import Meter
from ropewalk.gradio_demo.shared.visitors import Visitor

CHANGED = "this conversation was changed in another tab: here it is as it stands now"
DELETED = "this conversation was deleted in another tab: New begins another one"


class OutdatedError(RequestError):
    """The page shows a conversation that went on elsewhere. now: how it stands; None if it was deleted."""

    def __init__(self, now: Conversation | None) -> None:
        super().__init__(DELETED if now is None else CHANGED)
        self.now = now


class Chats:
    """Conversations and the replies to them. Every finished turn is on disk before the next one begins.

    A person may have a conversation open in several tabs. Whatever changes one compares it with what is saved first,
    and holds it until the change is saved, so that no tab overwrites what was said in another.
    """

    def __init__(self, workbench: Workbench, store: ConversationStore, running: Running) -> None:
        self._workbench = workbench
        self._store = store
        self._running = running
        self._answering = Answering()

    def current(self, visitor: Visitor) -> Conversation:
        """The conversation that this person had open last."""
        return self._store.current(visitor.person)

    def new(self, visitor: Visitor) -> Conversation:
        """An empty conversation; it is saved with its first turn.

        Raises:
            BusyError: a reply is being written in this tab.
        """
        self._answering.require_idle(visitor)
        conversation = Conversation()
        self._store.set_current(visitor.person, conversation.id)
        return conversation

    def open(self, visitor: Visitor, conversation_id: str) -> Conversation:
        """Open one of `choices`.

        Raises:
            RequestError: no conversation has that id. BusyError: a reply is being written in this tab.
        """
        self._answering.require_idle(visitor)
        conversation = self._store.load(visitor.person, conversation_id)
        self._store.set_current(visitor.person, conversation_id)
        return conversation

    def choices(self, visitor: Visitor) -> list[tuple[str, str]]:
        """(what to show, id) of this person's conversations, the newest first."""
        return [(_label(conversation), conversation.id) for conversation in self._store.list(visitor.person)]

    def delete(self, visitor: Visitor, doomed: Conversation, open_now: Conversation) -> Conversation:
        """Delete `doomed` for good. Returns what to show: the open conversation, or a new one if that was deleted.

        Raises:
            BusyError: a reply to it is being written. RequestError: its file cannot be deleted.
        """
        with self._answering.hold(visitor, doomed.id):
            self._store.delete(visitor.person, doomed.id)
        return self.new(visitor) if open_now.id == doomed.id else open_now

    def export(self, conversation: Conversation) -> tuple[str, str]:
        """(name, text) of a JSON file to download.

        Raises:
            RequestError: the conversation is empty.
        """
        if not conversation.turns:
            raise RequestError("there is nothing to export yet: the conversation is empty")
        return f"conversation-{conversation.id[:8]}.json", conversation.to_json()

    def import_file(self, visitor: Visitor, path: Path) -> Conversation:
        """A conversation from a JSON file, saved as a new one.

        Raises:
            RequestError: too large, not UTF-8, empty, or as `read_conversation`. BusyError: a reply is being written in
                this tab.
        """
        self._answering.require_idle(visitor)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RequestError(f"{path.name} is larger than the {MAX_FILE_BYTES} bytes that a conversation may have")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RequestError(f"{path.name} is not UTF-8 text, so it is not an exported conversation") from error
        read = read_conversation(text, path.name)
        if not read.turns:
            raise RequestError(f"{path.name} holds no messages")
        conversation = Conversation(turns=read.turns, system=read.system, template=read.template)
        self._store.save(visitor.person, conversation)
        return conversation

    def ask(
        self, visitor: Visitor, conversation: Conversation, question: str, request: ReplyRequest
    ) -> Iterator[ChatView]:
        """The reply to a new question, view by view."""
        if not isinstance(question, str) or not question.strip():
            yield self._refused(conversation, "write something first: the question is empty")
            return
        yield from self._answer(visitor, conversation, conversation.with_turn(Turn("user", question)), request)

    def again(self, visitor: Visitor, conversation: Conversation, request: ReplyRequest) -> Iterator[ChatView]:
        """Another reply to the last question."""
        before, question = conversation.before_last_question()
        if not question:
            yield self._refused(conversation, "there is no question yet that could be answered again")
            return
        yield from self._answer(visitor, conversation, before.with_turn(Turn("user", question)), request)

    def edit(
        self, visitor: Visitor, conversation: Conversation, index: int, text: str, request: ReplyRequest
    ) -> Iterator[ChatView]:
        """Replace the text of a message. A question is asked again from there; a reply is kept as it was edited."""
        if not 0 <= index < len(conversation.turns):
            yield self._refused(conversation, "that message is not there any more")
            return
        if conversation.turns[index].role == "user":
            before, _ = conversation.before(index)
            yield from self._answer(visitor, conversation, before.with_turn(Turn("user", text)), request)
            return
        try:
            with self._changing(visitor, conversation):
                turns = list(conversation.turns)
                turns[index] = replace(turns[index], content=text, note="edited")
                edited = replace(conversation, turns=tuple(turns), updated=time.time())
                self._store.save(visitor.person, edited)
        except RopewalkError as error:
            yield self._refused(conversation, error)
            return
        yield ChatView(edited, "reply edited", Meter(size=self._size()))

    def undo(self, visitor: Visitor, conversation: Conversation) -> tuple[Conversation, str]:
        """(the conversation without its last question and reply, that question for the input field).

        Raises:
            BusyError: a reply to it is being written. OutdatedError: it went on in another tab. RequestError: it cannot
                be saved.
        """
        before, question = conversation.before_last_question()
        with self._changing(visitor, conversation):
            self._store.save(visitor.person, before)
        return before, question

    def _answer(
        self, visitor: Visitor, before: Conversation, asked: Conversation, request: ReplyRequest
    ) -> Iterator[ChatView]:
        """Views of the reply to `asked`; if there is none for a reason that can be told, of `before`."""
        try:
            with self._changing(visitor, before):
                yield from self._written(visitor, before, asked, request)
        except RopewalkError as error:
            yield self._refused(before, error)

    def _written(
        self, visitor: Visitor, before: Conversation, asked: Conversation, request: ReplyRequest
    ) -> Iterator[ChatView]:
        """As `_answer`, of a conversation that nobody else changes. The question is saved when the reply begins and the
        reply when it ends, even if nobody is looking any more. Both are saved before the last view."""
        loaded = self._workbench.require()
        reply, dropped = make_reply(loaded, asked, request, visitor.person)
        with self._running.hold(visitor.tab, reply):
            self._store.save(visitor.person, asked)
            latest, view = asked, None
            try:
                for view in follow_chat(reply, dropped, asked, loaded.model.max_seq_len):
                    if view.conversation.turns[-1].content:  # nothing is written while the prompt is read
                        latest = view.conversation
                    if view.running:
                        yield view
            finally:
                has_failed = view is not None and view.error is not None
                if latest is asked and (has_failed or len(before.turns) >= len(asked.turns)):
                    latest = before  # turns would be lost for nothing
                unsaved = self._unsaved(visitor, latest)
        error = view.error or unsaved
        yield replace(view, conversation=latest, line=error or view.line, error=error)

    @contextmanager
    def _changing(self, visitor: Visitor, conversation: Conversation) -> Iterator[None]:
        """Nobody else changes the conversation within this context.

        Raises:
            BusyError: somebody does already. OutdatedError: what is saved is not what the page shows.
        """
        with self._answering.hold(visitor, conversation.id):
            saved = self._store.find(visitor.person, conversation.id)
            if (() if saved is None else saved.turns) != conversation.turns:
                raise OutdatedError(saved)
            yield

    def _unsaved(self, visitor: Visitor, conversation: Conversation) -> str | None:
        """Save it; returns why that failed."""
        try:
            self._store.save(visitor.person, conversation)
        except RequestError as error:
            return str(error)
        return None

    def _refused(self, conversation: Conversation, reason: RopewalkError | str) -> ChatView:
        if isinstance(reason, OutdatedError) and reason.now is not None:
            conversation = reason.now
        return ChatView(conversation, str(reason), Meter(size=self._size()), error=str(reason))

    def _size(self) -> int:
        loaded = self._workbench.loaded
        return 0 if loaded is None else loaded.model.max_seq_len


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """The turns as a chat component takes them. Bare strings lose indentation: Gradio treats them as docstrings."""
    return [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in conversation.turns]


def _label(conversation: Conversation) -> str:
    return f"{conversation.title} · {time.strftime('%d %b %H:%M', time.localtime(conversation.updated))}"
