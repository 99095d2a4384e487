"""chat/behaviour.py: conversations and their replies, on the embedded model, without Gradio."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from demo_session import GREEDY, VISITOR, asked, embedded_length, embedded_session, empty_session
from fixtures import REPOSITORY
from ropewalk.base.errors import RequestError
from ropewalk.generate.sampling import SamplingParams
from ropewalk.gradio_demo.chat import next_reply
from ropewalk.gradio_demo.chat.answering import BusyError
from ropewalk.gradio_demo.chat.conversations import Conversation, Turn
from ropewalk.gradio_demo.chat.next_reply import fitting_prompt
from ropewalk.gradio_demo.replies.request import DROP, STOP, ReplyRequest
from ropewalk.gradio_demo.replies.templates import (
    FROM_CHECKPOINT,
    PLAIN,
    chat_template,
    prompt_ids,
    template_names,
)
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.visitors import Visitor

OTHER_TAB = Visitor(VISITOR.person, "another tab")
ASKING = """
import sys
from pathlib import Path
from demo_session import GREEDY, VISITOR, embedded_session
from ropewalk.gradio_demo.chat.conversations import Conversation
session, conversation = embedded_session(Path(sys.argv[1])), Conversation(template="plain text")
while True:
    *_, view = session.chats.ask(VISITOR, conversation, "def f():", GREEDY)
    conversation = view.conversation
    print(len(conversation.turns), flush=True)
"""


def test_a_reply_streams_and_is_saved_with_its_line(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    views = list(session.chats.ask(VISITOR, Conversation(template=PLAIN), "def read(path):", GREEDY))
    assert [view.running for view in views][-1] is False and any(view.running for view in views)
    last = views[-1].conversation
    assert [turn.role for turn in last.turns] == ["user", "assistant"]
    assert "12 written" in last.turns[-1].note
    # The last token is not forwarded.
    assert (
        views[-1].meter.written == 11 and views[-1].meter.size == embedded_length()
    )  # the last token is not forwarded
    assert session.chats.current(VISITOR) == last


def test_the_second_turn_reuses_the_first_from_the_cache(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    first = asked(session, "def read(path, mode, encoding, errors):")
    view = list(session.chats.ask(VISITOR, first, "def write(path):", GREEDY))[-1]
    assert view.meter.cached > 10
    assert f"{view.meter.cached} from the cache" in view.line


def test_regenerate_answers_the_last_question_anew(shared: Session) -> None:
    conversation = asked(shared, "def read(path):")
    warm = ReplyRequest(SamplingParams(temperature=1.5, seed=3, max_new_tokens=12))
    again = list(shared.chats.again(VISITOR, conversation, warm))[-1].conversation
    assert [turn.role for turn in again.turns] == ["user", "assistant"]
    assert again.turns[-1].content != conversation.turns[-1].content
    assert again.id == conversation.id


def test_an_edited_question_is_asked_again_from_there(shared: Session) -> None:
    conversation = asked(shared, "def read(path):", "def write(path):")
    edited = list(shared.chats.edit(VISITOR, conversation, 0, "class Queue:", GREEDY))[-1].conversation
    assert [turn.content for turn in edited.turns][0] == "class Queue:"
    assert len(edited.turns) == 2


def test_an_edited_reply_is_kept_as_it_is(shared: Session) -> None:
    conversation = asked(shared, "def read(path):")
    edited = list(shared.chats.edit(VISITOR, conversation, 1, "    return 1", GREEDY))[-1].conversation
    assert edited.turns[1].content == "    return 1"
    assert shared.chats.current(VISITOR) == edited


def test_undo_takes_back_the_last_question_for_the_input_field(shared: Session) -> None:
    conversation = asked(shared, "def read(path):", "def write(path):")
    before, question = shared.chats.undo(VISITOR, conversation)
    assert question == "def write(path):"
    assert before.turns == conversation.turns[:2]
    assert shared.chats.current(VISITOR).turns == before.turns


def test_stop_ends_a_reply_and_keeps_what_there_is(shared: Session) -> None:
    views = shared.chats.ask(VISITOR, Conversation(template=PLAIN), "def f():", long_request())
    for view in views:
        if view.conversation.turns[-1].content and view.running:
            assert shared.running.stop(VISITOR.tab)
    assert "stopped" in view.line
    assert shared.chats.current(VISITOR).turns[-1].content == view.conversation.turns[-1].content


def test_a_reply_that_nobody_looks_at_any_more_ends_and_is_saved(shared: Session) -> None:
    views = shared.chats.ask(VISITOR, Conversation(template=PLAIN), "def g():", long_request())
    text = ""
    while not text:
        text = next(views).conversation.turns[-1].content
    views.close()
    assert shared.chats.current(VISITOR).turns[-1].content.startswith(text)
    assert len(shared.running) == 0
    assert not shared.running.stop(VISITOR.tab)


def test_a_page_that_is_left_while_the_prompt_is_read_leaves_no_empty_reply(shared: Session) -> None:
    views = shared.chats.ask(VISITOR, Conversation(template=PLAIN), "def h():", long_request())
    with shared.workbench.require().engine.exclusive():
        assert not next(views).conversation.turns[-1].content
    views.close()
    assert [turn.role for turn in shared.chats.current(VISITOR).turns] == ["user"]


def test_a_reply_stays_when_another_one_is_left_before_a_word_of_it(shared: Session) -> None:
    conversation = asked(shared, "def read(path):")
    views = shared.chats.again(VISITOR, conversation, long_request())
    with shared.workbench.require().engine.exclusive():
        assert not next(views).conversation.turns[-1].content
    views.close()
    assert shared.chats.current(VISITOR).turns == conversation.turns


def test_one_page_has_one_reply_at_a_time(shared: Session) -> None:
    first = shared.chats.ask(VISITOR, Conversation(template=PLAIN), "def f():", long_request())
    next(first)
    second = list(shared.chats.ask(VISITOR, Conversation(template=PLAIN), "def g():", GREEDY))
    assert "still busy" in second[-1].error
    first.close()


def test_a_conversation_that_went_on_in_another_tab_is_shown_before_it_is_changed(shared: Session) -> None:
    seen = asked(shared, "def read(path):")
    *_, elsewhere = shared.chats.ask(OTHER_TAB, seen, "def write(path):", GREEDY)
    for views in (
        shared.chats.ask(VISITOR, seen, "def lost(path):", GREEDY),
        shared.chats.again(VISITOR, seen, GREEDY),
        shared.chats.edit(VISITOR, seen, 0, "def lost(path):", GREEDY),
        shared.chats.edit(VISITOR, seen, 1, "lost", GREEDY),
    ):
        (view,) = views
        assert "changed in another tab" in view.error and view.conversation == elsewhere.conversation
    with pytest.raises(RequestError, match="changed in another tab"):
        shared.chats.undo(VISITOR, seen)
    assert shared.chats.current(VISITOR) == elsewhere.conversation


def test_a_conversation_is_answered_in_one_tab_at_a_time(shared: Session) -> None:
    conversation = asked(shared, "def read(path):")
    first = shared.chats.ask(VISITOR, conversation, "def f():", long_request())
    growing = next(first).conversation
    (view,) = shared.chats.ask(OTHER_TAB, conversation, "def g():", GREEDY)
    assert "being written in another tab" in view.error
    with pytest.raises(BusyError, match="being written in another tab"):
        shared.chats.delete(OTHER_TAB, conversation, conversation)
    for act in (
        lambda: shared.chats.new(VISITOR),
        lambda: shared.chats.open(VISITOR, conversation.id),
        lambda: shared.chats.undo(VISITOR, growing),
        lambda: shared.chats.delete(VISITOR, growing, growing),
        lambda: shared.chats.import_file(VISITOR, Path("never read")),
    ):
        with pytest.raises(BusyError, match="a reply is being written: stop it first"):
            act()
    assert shared.chats.new(OTHER_TAB).turns == ()
    first.close()
    assert [turn.content for turn in shared.chats.open(VISITOR, conversation.id).turns][2] == "def f():"


def test_a_conversation_that_was_deleted_in_another_tab_does_not_come_back(shared: Session) -> None:
    conversation = asked(shared, "def read(path):")
    shared.chats.delete(OTHER_TAB, conversation, conversation)
    (view,) = shared.chats.ask(VISITOR, conversation, "def write(path):", GREEDY)
    assert "deleted in another tab" in view.error and view.conversation.turns == conversation.turns
    assert conversation.id not in {identity for _, identity in shared.chats.choices(VISITOR)}


def test_a_reply_stays_on_the_page_when_it_cannot_be_saved(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    views = session.chats.ask(VISITOR, Conversation(template=PLAIN), "def f():", GREEDY)
    next(views)
    (folder,) = tmp_path.rglob("conversations")
    shutil.rmtree(folder)
    folder.write_text("as if the disk were full")
    *_, view = views
    assert "cannot be saved: Not a directory" in view.error and "12 written" in view.conversation.turns[-1].note
    (view,) = session.chats.ask(VISITOR, Conversation(template=PLAIN), "def g():", GREEDY)
    assert "cannot be" in view.error


def test_a_conversation_that_was_taken_back_is_listed_no_more(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    before, _ = session.chats.undo(VISITOR, asked(session, "def read(path):"))
    assert before.turns == () and session.chats.choices(VISITOR) == []
    *_, view = session.chats.ask(VISITOR, before, "def write(path):", GREEDY)
    assert view.error is None and session.chats.choices(VISITOR)[0][1] == before.id


def test_a_file_without_messages_is_not_imported(shared: Session, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(RequestError, match=r"empty\.json holds no messages"):
        shared.chats.import_file(VISITOR, tmp_path / "empty.json")


def test_thousands_of_turns_are_left_out_in_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = embedded_session(tmp_path).workbench.require()
    turns = tuple(turn for number in range(2000) for turn in (Turn("user", f"f{number}"), Turn("assistant", "x")))
    rendered = []
    monkeypatch.setattr(next_reply, "prompt_ids", lambda *prompt: rendered.append(prompt) or prompt_ids(*prompt))
    conversation = Conversation((*turns, Turn("user", "the last")))
    template = chat_template(PLAIN, loaded.engine)
    ids, dropped = fitting_prompt(loaded.tokenizer, template, conversation, 300, DROP)
    assert len(rendered) < 20 and 3900 < dropped < 4000 and conversation.turns[dropped].role == "user"
    shorter = replace(conversation, turns=conversation.turns[dropped - 2 :])
    assert len(ids) <= 300 < len(prompt_ids(loaded.tokenizer, template, shorter.messages))


def test_replies_of_several_people_stay_apart(shared: Session) -> None:
    questions = [f"def function_{number}(path):" for number in range(6)]
    alone = [asked(shared, question).turns[-1].content for question in questions]
    together: dict[int, str] = {}

    def ask(number: int) -> None:
        visitor = Visitor(f"person {number}", f"tab {number}")
        views = list(shared.chats.ask(visitor, Conversation(template=PLAIN), questions[number], GREEDY))
        together[number] = views[-1].conversation.turns[-1].content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[number] for number in range(6)] == alone


def test_a_waiting_reply_shows_its_place_in_the_queue(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    with session.workbench.require().engine.exclusive():
        views = session.chats.ask(VISITOR, Conversation(template=PLAIN), "def f():", GREEDY)
        lines = [next(views).line for _ in range(4)]
    assert lines[-1] == "waiting for the model: number 1 in the queue"
    assert "12 written" in list(views)[-1].line


@pytest.mark.parametrize("policy", [DROP, STOP])
def test_a_conversation_that_outgrows_the_context_is_cut_or_stopped_as_chosen(tmp_path: Path, policy: str) -> None:
    session = embedded_session(tmp_path, max_seq_len="128")
    request = replace(GREEDY, overflow=policy)
    conversation = Conversation(template=PLAIN)
    for number in range(12):
        view = list(session.chats.ask(VISITOR, conversation, f"def function_{number}(path, mode):", request))[-1]
        conversation = view.conversation
    if policy == DROP:
        assert view.error is None and "oldest messages left out" in view.line
        assert len(conversation.turns) == 24  # they are left out of the prompt, not of the conversation
    else:
        assert "start a new conversation, or choose to drop the oldest turns" in view.error


def test_a_question_that_never_fits_is_refused_with_what_to_do(tmp_path: Path) -> None:
    session = embedded_session(tmp_path, max_seq_len="64")
    view = list(session.chats.ask(VISITOR, Conversation(template=PLAIN), "word " * 200, GREEDY))[-1]
    assert view.conversation.turns == ()  # the question stays in the input field, and can be sent again
    assert "shorten the question, or load the model with a longer context" in view.error


def test_an_empty_question_is_refused(shared: Session) -> None:
    assert "the question is empty" in list(shared.chats.ask(VISITOR, Conversation(), "  ", GREEDY))[-1].error


def test_conversations_are_listed_opened_exported_imported_and_deleted(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    conversation = asked(session, "def read(path):")
    ((label, identity),) = session.chats.choices(VISITOR)
    assert label.startswith("def read(path): · ") and session.chats.open(VISITOR, identity) == conversation
    name, text = session.chats.export(conversation)
    (tmp_path / name).write_text(text, encoding="utf-8")
    imported = session.chats.import_file(VISITOR, tmp_path / name)
    assert imported.turns == conversation.turns and imported.id != conversation.id
    assert len(session.chats.choices(VISITOR)) == 2
    assert session.chats.delete(VISITOR, conversation, imported) is imported  # the open one stays open
    session.chats.import_file(VISITOR, tmp_path / name)
    assert session.chats.delete(VISITOR, imported, imported).turns == ()
    assert imported.id not in {identity for _, identity in session.chats.choices(VISITOR)}


def test_templates_are_those_that_the_model_can_use(shared: Session) -> None:
    names = template_names(shared.workbench.require().tokenizer)
    assert names[0] == FROM_CHECKPOINT and {PLAIN, "vicuna"} < set(names)  # the embedded model brings its own


def test_a_killed_process_loses_no_finished_turn(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ASKING, str(tmp_path)],
        cwd=REPOSITORY / "tests" / "support",
        stdout=subprocess.PIPE,
        text=True,
    )
    while (finished := int(process.stdout.readline())) < 4:
        pass
    process.kill()
    process.wait()
    found = empty_session(tmp_path).chats.current(VISITOR).turns
    assert len(found) >= finished
    assert [turn.role for turn in found[:4]] == ["user", "assistant"] * 2
    assert all("12 written" in turn.note for turn in found[1:4:2])


def long_request() -> ReplyRequest:
    return ReplyRequest(SamplingParams(temperature=0.0, max_new_tokens=1500, ignore_eos=True))
