"""The chat: conversation on the left, conversations and settings of a reply on the right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ropewalk.base.errors import RopewalkError
from ropewalk.gradio_demo.chat.behaviour import messages_of
from ropewalk.gradio_demo.chat.controls import (
    ConversationControls,
    ReplyControls,
    read_controls,
    template_choices,
)
from ropewalk.gradio_demo.chat.conversations import Conversation
from ropewalk.gradio_demo.chat.next_reply import ChatView
from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.replies.pictures import context_meter
from ropewalk.gradio_demo.replies.status import Meter
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN, visitor
from ropewalk.gradio_demo.shared.pictures import live_line

PLACEHOLDER = """### Ask something
The embedded model continues Python: try `def read_lines(path):`

A GPTQ chat model of yours answers questions."""


def build_chat(session: Session, bar: ModelBar, page: gr.Blocks) -> None:
    """Lay it out and connect it."""
    state = gr.State(Conversation())
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=320):
            chatbot = gr.Chatbot(
                height="42vh",
                min_height=260,
                elem_classes=["rw-plain"],
                label="Conversation",
                show_label=False,
                buttons=["copy", "copy_all"],
                editable="all",
                placeholder=PLACEHOLDER,
                render_markdown=False,
                elem_id="chatbot",
            )
            line = gr.HTML(live_line("", False, False), elem_id="chat-line", elem_classes=["rw-tight"])
            meter = gr.HTML(elem_id="chat-meter", elem_classes=["rw-tight"])
            question = gr.Textbox(
                show_label=False,
                placeholder="Write here. Enter sends, Shift+Enter starts a line.",
                lines=2,
                max_lines=12,
                elem_id="question",
                container=False,
            )
            with gr.Row(elem_id="chat-buttons"):
                send = gr.Button("Send", variant="primary", min_width=80, size="md", elem_id="send")
                stop = gr.Button("Stop", variant="stop", min_width=80, size="md", elem_id="stop")
                again = gr.Button("Regenerate", min_width=80, size="md", elem_id="again")
                undo = gr.Button("Undo", min_width=80, size="md", elem_id="undo")
        with gr.Column(scale=4, min_width=280):
            conversations = ConversationControls()
            settings = ReplyControls(session)
    views = [state, chatbot, line, meter, question, conversations.chosen]
    _connect_replies(session, bar, state, chatbot, question, settings, views, (send, stop, again, undo))
    opened = [*views, settings.system, settings.template]
    _connect_conversations(session, state, chatbot, conversations, opened, page)
    settings.connect(session, bar, chatbot)


def _connect_replies(
    session: Session,
    bar: ModelBar,
    state: gr.State,
    chatbot: gr.Chatbot,
    question: gr.Textbox,
    settings: ReplyControls,
    views: list[gr.components.Component],
    buttons: tuple[gr.Button, gr.Button, gr.Button, gr.Button],
) -> None:
    chats = session.chats
    send, stop, again, undo = buttons

    def show(
        work: Any, conversation: Conversation, kept: str, request: gr.Request, *values: Any
    ) -> Iterator[list[Any]]:
        """Views of `work(conversation, chat request)` as values of `views`; `kept` stays in the input field."""
        try:
            system, template, chat_request = read_controls(session, values)
        except RopewalkError as error:
            yield _shown(ChatView(conversation, str(error), Meter(), error=str(error)), kept)
            return
        for view in work(replace(conversation, system=system, template=template), chat_request):
            shown = _shown(view, kept if view.error else "")
            # The list is read again once the reply is saved, which is when its last view comes.
            yield shown if view.running else [*shown[:-1], _list(session, request, view.conversation)]

    def run_ask(conversation: Conversation, text: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        who = visitor(request)
        yield from show(lambda c, r: chats.ask(who, c, text, r), conversation, text, request, *values)

    def run_again(conversation: Conversation, text: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        who = visitor(request)
        yield from show(lambda c, r: chats.again(who, c, r), conversation, text, request, *values)

    def run_edit(
        conversation: Conversation, text: str, data: gr.EditData, request: gr.Request, *values: Any
    ) -> Iterator[list[Any]]:
        who, edited = visitor(request), _edited_text(data.value)
        yield from show(lambda c, r: chats.edit(who, c, data.index, edited, r), conversation, text, request, *values)

    def run_undo(conversation: Conversation, request: gr.Request) -> list[Any]:
        before, text = chats.undo(visitor(request), conversation)
        return [before, messages_of(before), live_line("", False, False), "", text, _list(session, request, before)]

    def run_stop(request: gr.Request) -> None:
        session.running.stop(visitor(request).tab)

    inputs = [state, question, *settings.inputs(bar)]
    gr.on(
        [send.click, question.submit],
        run_ask,
        inputs,
        views,
        api_name="chat",
        show_progress="hidden",
        concurrency_limit=None,
    )
    again.click(run_again, inputs, views, api_name="regenerate", show_progress="hidden", concurrency_limit=None)
    chatbot.edit(run_edit, inputs, views, concurrency_limit=None, **HIDDEN)
    undo.click(run_undo, [state], views, **HIDDEN)
    stop.click(run_stop, None, None, api_name="stop", show_progress="hidden")


def _connect_conversations(
    session: Session,
    state: gr.State,
    chatbot: gr.Chatbot,
    conversations: ConversationControls,
    views: list[gr.components.Component],
    page: gr.Blocks,
) -> None:
    chats = session.chats

    def opened(conversation: Conversation, request: gr.Request) -> list[Any]:
        last = next((turn.note for turn in reversed(conversation.turns)), "")
        line = live_line(last, False, False)
        shown = [conversation, messages_of(conversation), line, "", "", _list(session, request, conversation)]
        return [*shown, conversation.system, template_choices(session, conversation.template)]

    def failed(error: RopewalkError) -> list[Any]:
        return [gr.skip(), gr.skip(), live_line(str(error), False, True), *[gr.skip()] * (len(views) - 3)]

    def run_open(conversation_id: str, request: gr.Request) -> list[Any]:
        try:
            return opened(chats.open(visitor(request), conversation_id), request)
        except RopewalkError as error:
            return failed(error)

    def run_import(path: str, request: gr.Request) -> list[Any]:
        try:
            file = session.workbench.access.check_upload(Path(path))
            return opened(chats.import_file(visitor(request), file), request)
        except RopewalkError as error:
            return failed(error)

    def run_export(conversation: Conversation) -> str:
        try:
            return str(chats.export(conversation, session.exports))
        except RopewalkError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def run_new(request: gr.Request) -> list[Any]:
        return opened(chats.new(visitor(request)), request)

    def run_delete(conversation: Conversation, request: gr.Request) -> list[Any]:
        return opened(chats.delete(visitor(request), conversation), request)

    def run_reload(request: gr.Request) -> list[Any]:
        return opened(chats.current(visitor(request)), request)

    conversations.chosen.input(run_open, conversations.chosen, views, **HIDDEN)
    gr.on([conversations.new.click, chatbot.clear], run_new, None, views, **HIDDEN)
    conversations.delete.click(run_delete, state, views, **HIDDEN)
    conversations.import_.upload(run_import, conversations.import_, views, **HIDDEN)
    conversations.export.click(run_export, state, conversations.export, **HIDDEN)
    page.load(run_reload, None, views, **HIDDEN)


def _shown(view: ChatView, question: str) -> list[Any]:
    line = live_line(view.line, view.running, view.error is not None)
    return [view.conversation, messages_of(view.conversation), line, context_meter(view.meter), question, gr.skip()]


def _list(session: Session, request: gr.Request, conversation: Conversation) -> Any:
    choices = session.chats.choices(visitor(request))
    saved = any(conversation.id == value for _, value in choices)
    return gr.update(choices=choices, value=conversation.id if saved else None)


def _edited_text(value: Any) -> str:
    """Chat components hand a message over as text, or as a list with one part."""
    if isinstance(value, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in value)
    return value if isinstance(value, str) else str(value.get("text", ""))
