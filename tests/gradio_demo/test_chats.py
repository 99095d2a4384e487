"""chat/behaviour.py: conversations and their replies, on the embedded model, without Gradio."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from demo_session import GREEDY, VISITOR, asked, embedded_length, embedded_session, empty_session
from fixtures import REPOSITORY
from ropewalk.generate.sampling import SamplingParams
from ropewalk.gradio_demo.chat.conversations import Conversation
from ropewalk.gradio_demo.replies.request import DROP, STOP, ReplyRequest
from ropewalk.gradio_demo.replies.templates import FROM_CHECKPOINT, PLAIN, template_names
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.visitors import Visitor

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
    assert not next(views).conversation.turns[-1].content
    views.close()
    assert [turn.role for turn in shared.chats.current(VISITOR).turns] == ["user"]


def test_a_reply_stays_when_another_one_is_left_before_a_word_of_it(shared: Session) -> None:
    conversation = asked(shared, "def read(path):")
    views = shared.chats.again(VISITOR, conversation, long_request())
    assert not next(views).conversation.turns[-1].content
    views.close()
    assert shared.chats.current(VISITOR).turns == conversation.turns


def test_one_page_has_one_reply_at_a_time(shared: Session) -> None:
    first = shared.chats.ask(VISITOR, Conversation(template=PLAIN), "def f():", long_request())
    next(first)
    second = list(shared.chats.ask(VISITOR, Conversation(template=PLAIN), "def g():", GREEDY))
    assert "still busy" in second[-1].error
    first.close()


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
