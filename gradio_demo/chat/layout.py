"""The chat: conversation on the left, conversations and settings of a reply on the right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ropewalk.base.errors import RopewalkError
from ropewalk.gradio_demo.chat.answering import BusyError
from ropewalk.gradio_demo.chat.behaviour import messages_of
from ropewalk.gradio_demo.chat.controls import (
    ConversationControls,
    ReplyControls,
    read_controls,
    template_choices,
)
from ropewalk.gradio_demo.chat.conversations import Conversation
from ropewalk.gradio_demo.chat.next_reply import ChatView
from ropewalk.gradio_demo.chat.pictures import deletion_question
from ropewalk.gradio_demo.model_bar.layout import ModelBar
from ropewalk.gradio_demo.replies.pictures import context_meter
from ropewalk.gradio_demo.replies.status import Meter
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.events import HIDDEN, Filling, answer_of, visitor
from ropewalk.gradio_demo.shared.pictures import is_problem, live_line

PLACEHOLDER = """### Ask something
The embedded model answers questions about a text: paste one, leave a line empty, and ask about it.

A GPTQ chat model of your own answers any."""


# Made in the browser: a download button of Gradio would give out the file of the previous click.
DOWNLOAD = """(file) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file.text], {type: "application/json"}));
    link.download = file.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""
# The question leaves the field in the browser, so that the next one can be typed while the reply is written.
TAKE = """(text) => [text, ""]"""


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
                autoscroll=False,  # page.js follows the end, and only while the reader is there
                elem_id="chatbot",
            )
            line = gr.HTML(live_line("", False, False), elem_id="chat-line", elem_classes=["rw-tight"])
            meter = gr.HTML(elem_id="chat-meter", elem_classes=["rw-tight"])
            question = gr.Textbox(
                show_label=False,
                placeholder="Write here. Enter sends, Shift+Enter starts a new line.",
                lines=2,
                max_lines=12,
                elem_id="question",
                container=False,
            )
            with gr.Row(elem_id="chat-buttons"):
                send = gr.Button("Send", variant="primary", min_width=120, size="md", elem_id="send")
                stop = gr.Button("Stop", variant="stop", min_width=120, size="md", elem_id="stop")
                again = gr.Button("Regenerate", min_width=120, size="md", elem_id="again")
                undo = gr.Button("Undo", min_width=120, size="md", elem_id="undo")
        with gr.Column(scale=4, min_width=280):
            conversations = ConversationControls()
            settings = ReplyControls(session)
    views = [state, chatbot, line, meter, conversations.chosen]
    _connect_replies(session, bar, state, chatbot, question, settings, views, (send, stop, again, undo))
    _connect_conversations(session, state, conversations, [*views, settings.system, settings.template])
    _connect_files(session, state, conversations, [*views, settings.system, settings.template])
    _connect_reload(session, views, settings, page)
    settings.connect(session, bar, chatbot)
    # Most problems are about the model that was loaded, or that none was.
    bar.changed.change(lambda shown: "" if is_problem(shown or "") else gr.skip(), line, line, **HIDDEN)


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
    asked, back = gr.Textbox(visible=False), Filling([question])

    def show(work: Any, conversation: Conversation, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Views of `work(conversation, chat request)` as values of `views`, and "" or why there is no reply."""
        try:
            system, template, chat_request = read_controls(session, values)
        except RopewalkError as error:
            yield [*_shown(ChatView(conversation, str(error), Meter(), error=str(error))), str(error)]
            return
        for view in work(replace(conversation, system=system, template=template), chat_request):
            shown = _shown(view)
            # The list is read again with the last view: by then the reply has been saved.
            shown = shown if view.running else [*shown[:-1], _list(session, request, view.conversation)]
            yield [*shown, view.error or ""]

    def run_ask(conversation: Conversation, text: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        who = visitor(request)
        for *shown, error in show(lambda c, r: chats.ask(who, c, text, r), conversation, request, *values):
            yield [*shown, answer_of([""], [text if error else ""])]  # a refused question comes back into its field

    def run_again(conversation: Conversation, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        who = visitor(request)
        for *shown, _ in show(lambda c, r: chats.again(who, c, r), conversation, request, *values):
            yield shown

    def run_edit(
        conversation: Conversation, data: gr.EditData, request: gr.Request, *values: Any
    ) -> Iterator[list[Any]]:
        who, edited = visitor(request), _edited_text(data.value)
        work = lambda c, r: chats.edit(who, c, data.index, edited, r)  # noqa: E731
        for *shown, _ in show(work, conversation, request, *values):
            yield shown

    def run_undo(conversation: Conversation, request: gr.Request) -> list[Any]:
        try:
            before, text = chats.undo(visitor(request), conversation)
        except RopewalkError as error:
            return [*_failed(session, request, error, conversation, views), gr.skip()]
        return [before, messages_of(before), live_line("", False, False), "", _list(session, request, before), text]

    def run_stop(request: gr.Request) -> None:
        session.running.stop(visitor(request).tab)

    inputs = settings.inputs(bar)
    long = {"show_progress": "hidden", "concurrency_limit": None}
    taken = send.click(None, question, [asked, question], js=TAKE, **HIDDEN)
    back.after(taken.then(run_ask, [state, asked, *inputs], [*views, back.answer], api_name="chat", **long))
    again.click(run_again, [state, *inputs], views, api_name="regenerate", **long)
    chatbot.edit(run_edit, [state, *inputs], views, concurrency_limit=None, **HIDDEN)
    undo.click(run_undo, [state], [*views, question], **HIDDEN)
    stop.click(run_stop, None, None, api_name="stop", show_progress="hidden")


def _connect_conversations(
    session: Session, state: gr.State, conversations: ConversationControls, views: list[gr.components.Component]
) -> None:
    """Pick, begin and delete."""
    chats = session.chats

    def run_open(conversation_id: str, conversation: Conversation, request: gr.Request) -> list[Any]:
        try:
            return _opened(session, request, chats.open(visitor(request), conversation_id))
        except RopewalkError as error:
            return _failed(session, request, error, conversation, views)

    def run_new(conversation: Conversation, request: gr.Request) -> list[Any]:
        try:
            return _opened(session, request, chats.new(visitor(request)))
        except RopewalkError as error:
            return _failed(session, request, error, conversation, views)

    def run_question(conversation: Conversation) -> list[Any]:
        if not conversation.turns:
            return [None, gr.update(visible=False), "", live_line("there is nothing to delete yet", False, True)]
        return [conversation, gr.update(visible=True), deletion_question(conversation.title), gr.skip()]

    def run_delete(doomed: Conversation | None, conversation: Conversation, request: gr.Request) -> list[Any]:
        closed = [None, gr.update(visible=False)]
        try:
            shown = conversation if doomed is None else chats.delete(visitor(request), doomed, conversation)
        except RopewalkError as error:
            return [*closed, *_failed(session, request, error, conversation, views)]
        return [*closed, *_opened(session, request, shown)]

    line, asked = views[2], [conversations.doomed, conversations.question]
    conversations.chosen.input(run_open, [conversations.chosen, state], views, **HIDDEN)
    conversations.new.click(run_new, state, views, **HIDDEN)
    conversations.delete.click(run_question, state, [*asked, conversations.asked, line], **HIDDEN)
    conversations.confirm.click(run_delete, [conversations.doomed, state], [*asked, *views], **HIDDEN)
    conversations.keep.click(lambda: [None, gr.update(visible=False)], None, asked, **HIDDEN)


def _connect_files(
    session: Session, state: gr.State, conversations: ConversationControls, views: list[gr.components.Component]
) -> None:
    """Export and import."""
    chats = session.chats
    exported = gr.JSON(visible=False)

    def run_export(conversation: Conversation) -> dict[str, str]:
        try:
            name, text = chats.export(conversation)
        except RopewalkError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return {"name": name, "text": text}

    def run_import(path: str, conversation: Conversation, request: gr.Request) -> list[Any]:
        try:
            file = session.workbench.access.check_upload(Path(path))
            return _opened(session, request, chats.import_file(visitor(request), file))
        except RopewalkError as error:
            return _failed(session, request, error, conversation, views)

    conversations.export.click(run_export, state, exported, **HIDDEN).success(
        None, exported, None, js=DOWNLOAD, **HIDDEN
    )
    conversations.import_.upload(run_import, [conversations.import_, state], views, **HIDDEN)


def _connect_reload(
    session: Session, views: list[gr.components.Component], settings: ReplyControls, page: gr.Blocks
) -> None:
    """The conversation that was open last comes back; what was typed before it arrives stays."""
    system = Filling([settings.system])

    def run_reload(request: gr.Request) -> list[Any]:
        conversation = session.chats.current(visitor(request))
        *shown, text, template = _opened(session, request, conversation)
        return [*shown, template, answer_of([""], [text])]

    system.after(page.load(run_reload, None, [*views, settings.template, system.answer], **HIDDEN))


def _opened(session: Session, request: gr.Request, conversation: Conversation) -> list[Any]:
    """A conversation as values of all views, system text and template."""
    last = next((turn.note for turn in reversed(conversation.turns)), "")
    line = live_line(last, False, False)
    shown = [conversation, messages_of(conversation), line, "", _list(session, request, conversation)]
    return [*shown, conversation.system, template_choices(session, conversation.template)]


def _failed(
    session: Session,
    request: gr.Request,
    error: RopewalkError,
    conversation: Conversation,
    views: list[gr.components.Component],
) -> list[Any]:
    """Everything as it was; why, under the conversation, or above the page while a reply has that line."""
    line = live_line(str(error), False, True)
    if isinstance(error, BusyError):
        gr.Warning(str(error), title="Not now")
        line = gr.skip()
    listed = _list(session, request, conversation)
    return [gr.skip(), gr.skip(), line, gr.skip(), listed, *[gr.skip()] * (len(views) - 5)]


def _shown(view: ChatView) -> list[Any]:
    line = live_line(view.line, view.running, view.error is not None)
    return [view.conversation, messages_of(view.conversation), line, context_meter(view.meter), gr.skip()]


def _list(session: Session, request: gr.Request, conversation: Conversation) -> Any:
    choices = session.chats.choices(visitor(request))
    saved = any(conversation.id == value for _, value in choices)
    return gr.update(choices=choices, value=conversation.id if saved else None)


def _edited_text(value: Any) -> str:
    """Chat components hand a message over as text, or as a list with one part."""
    if isinstance(value, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in value)
    return value if isinstance(value, str) else str(value.get("text", ""))
