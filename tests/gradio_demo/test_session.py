"""gradio_demo/session.py and what it is made of, on the embedded model, without Gradio."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from demo_session import GREEDY, VISITOR, copy_of_the_embedded_model, embedded_session, empty_session, values
from fixtures import REPOSITORY
from ropewalk.base.errors import RequestError
from ropewalk.generate.sampling import SamplingParams
from ropewalk.gradio_demo.chat.conversations import Conversation
from ropewalk.gradio_demo.documents.behaviour import Document, sources_of
from ropewalk.gradio_demo.model_bar.settings import AS_CHECKPOINT, FieldError
from ropewalk.gradio_demo.model_bar.workbench import FOLDER
from ropewalk.gradio_demo.replies.request import DROP, STOP, ReplyRequest
from ropewalk.gradio_demo.replies.templates import PLAIN, template_names
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.access import EMBEDDED
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


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """For tests that leave the model as it is."""
    return embedded_session(tmp_path_factory.mktemp("session"))


def asked(session: Session, *questions: str, request: ReplyRequest = GREEDY) -> Conversation:
    conversation = Conversation(template=PLAIN)
    for question in questions:
        conversation = list(session.chats.ask(VISITOR, conversation, question, request))[-1].conversation
    return conversation


# Loading


def test_the_embedded_model_starts_with_a_context_worth_talking_in(shared: Session) -> None:
    loaded = shared.workbench.require()
    assert (loaded.model.max_seq_len, loaded.model.rope.method.name) == (2048, "yarn")


def test_values_as_the_checkpoint_has_them_are_left_to_it(tmp_path: Path) -> None:
    session = embedded_session(tmp_path, rope_method=AS_CHECKPOINT, rope_factor="", max_seq_len="512")
    loaded = session.workbench.require()
    assert (loaded.model.max_seq_len, loaded.model.rope.method.name) == (512, "none")
    assert loaded.info.rope_decided_by.startswith("rope_parameters")


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"max_seq_len": "many"}, "max_seq_len", "a number is needed, got 'many'"),
        ({"max_seq_len": "1.5"}, "max_seq_len", "a whole number from 1 to"),
        ({"threads": "0"}, "threads", "a whole number from 1 to 1024"),
        ({"alpha_value": "2"}, "alpha_value", "the RoPE method yarn replaces it"),
        ({"alpha_value": "nan"}, "alpha_value", "a finite number"),
        ({"rope_factor": ""}, "rope_factor", "needs a factor"),
        ({"rope_factor": "-1"}, "rope_method", "factor"),
        ({"rope_method": AS_CHECKPOINT}, "rope_factor", "choose a RoPE method"),
        ({"rope_method": AS_CHECKPOINT, "rope_factor": "", "alpha_value": "1e9"}, "alpha_value", "alpha_value"),
        ({"rope_method": "spiral"}, "rope_method", "must be one of"),
        ({"layer_order": "0-9"}, "layer_order", "layer"),
        ({"compute": "magic"}, "compute", "must be one of"),
        ({"second_folder": "/etc"}, "second_folder", "may not be read"),
    ],
)
def test_a_wrong_setting_is_explained_at_its_field_and_the_model_stays(
    shared: Session, changes: dict[str, str], field: str, said: str
) -> None:
    before = shared.workbench.loaded
    with pytest.raises(FieldError, match=said) as caught:
        shared.workbench.load(EMBEDDED, values(shared, **changes))
    assert caught.value.field == field
    assert shared.workbench.loaded is before


def test_a_broken_folder_is_explained_and_the_old_model_still_answers(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    broken = copy_of_the_embedded_model(tmp_path / "models" / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(FieldError, match="model.safetensors") as caught:
        session.workbench.load("broken", values(session, "broken"))
    assert caught.value.field == FOLDER
    assert asked(session, "def f():").turns[-1].content


def test_another_folder_takes_the_place_of_the_model_with_progress(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    copy_of_the_embedded_model(tmp_path / "models" / "again", max_position_embeddings=300)
    steps: list[tuple[int, int]] = []
    loaded = session.workbench.load("again", values(session, "again"), lambda *step: steps.append(step))
    assert loaded.model.max_seq_len == 300
    assert steps[-1] == (6, 6)
    assert session.workbench.loaded is loaded


def test_without_a_model_every_tab_says_so(tmp_path: Path) -> None:
    session = empty_session(tmp_path)
    views = [
        *session.chats.ask(VISITOR, Conversation(), "Hello", GREEDY),
        *session.notebook.complete(VISITOR, "Hello", GREEDY),
        *session.documents.ask(VISITOR, [Document("a", "b")], "c?", "vicuna", GREEDY),
        *session.layers.compare(VISITOR, "0", "Hello", GREEDY.params),
        session.layers.view("0-4"),
    ]
    assert all("no model is loaded" in view.error for view in views if not getattr(view, "running", False))


def test_adapters_are_loaded_when_they_are_first_wanted_and_change_the_reply(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    loaded = session.workbench.require()
    assert "linear-4" in session.workbench.adapters(loaded) and loaded.model.adapters == ()
    wanted = session.workbench.use_adapters(loaded, ["linear-4", "extrapolation:0.5"])
    assert wanted == [("linear-4", 1.0), ("extrapolation", 0.5)]
    assert loaded.model.adapters == ("linear-4", "extrapolation")
    changed = asked(session, "def read(path):", request=replace(GREEDY, adapters=wanted))
    assert changed.turns[-1].content != asked(session, "def read(path):").turns[-1].content
    for wrong, said in (("nobody", "no adapter 'nobody'"), ("linear-4:much", "must be a number")):
        with pytest.raises(RequestError, match=said):
            session.workbench.use_adapters(loaded, [wrong])


# Chat


def test_a_reply_streams_and_is_saved_with_its_line(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    views = list(session.chats.ask(VISITOR, Conversation(template=PLAIN), "def read(path):", GREEDY))
    assert [view.running for view in views][-1] is False and any(view.running for view in views)
    last = views[-1].conversation
    assert [turn.role for turn in last.turns] == ["user", "assistant"]
    assert "12 written" in last.turns[-1].note
    assert views[-1].meter.written == 11 and views[-1].meter.size == 2048  # the last token is not forwarded
    assert session.chats.current(VISITOR) == last


def test_the_second_turn_reuses_the_first_from_the_cache(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    first = asked(session, "def read(path):")
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
    exported = session.chats.export(conversation, session.exports)
    imported = session.chats.import_file(VISITOR, exported)
    assert imported.turns == conversation.turns and imported.id != conversation.id
    assert len(session.chats.choices(VISITOR)) == 2
    assert session.chats.delete(VISITOR, imported).turns == ()
    assert [identity for _, identity in session.chats.choices(VISITOR)] == [conversation.id]


def test_templates_are_those_that_the_model_can_use(shared: Session) -> None:
    names = template_names(shared.workbench.require().tokenizer)
    assert names[0] == PLAIN and "vicuna" in names  # the embedded model brings none


# Notebook, documents, layers


def test_the_notebook_shows_each_token_with_its_alternatives(shared: Session) -> None:
    view = list(shared.notebook.complete(VISITOR, "def read(path):\n", GREEDY))[-1]
    assert "".join(token.text for token in view.tokens) == view.text.removeprefix("def read(path):\n")
    for token in view.tokens:
        assert len(token.alternatives) == 5
        assert token.alternatives[0][1] == pytest.approx(token.probability)  # greedy takes the most likely


def test_an_empty_notebook_is_continued_from_the_start(shared: Session) -> None:
    assert list(shared.notebook.complete(VISITOR, "", GREEDY))[-1].error is None


def test_documents_are_counted_and_asked_with_sources(shared: Session) -> None:
    documents = [Document("hemp.txt", "Rope is made of hemp."), Document("walk", "A long lane.", "http://walk", "1618")]
    count = shared.documents.count(documents, "What is it made of?", "airoboros", GREEDY.params)
    assert 50 < count.tokens < 300 and count.fits
    view = list(shared.documents.ask(VISITOR, documents, "What is it made of?", "airoboros", GREEDY))[-1]
    assert view.error is None and view.meter.read + view.meter.cached == count.tokens
    assert {source.document.title for source in view.sources} == {"hemp.txt", "walk"}


def test_sources_are_in_the_order_of_what_ties_the_answer_to_them() -> None:
    documents = [Document("a", "nothing of it"), Document("b", "strands of twisted hemp"), Document("long title", "no")]
    sources = sources_of(documents, "Twisted strands, says long title.")
    assert [source.document.title for source in sources] == ["long title", "b", "a"]
    assert sources[1].shared == pytest.approx(2 / 5)


def test_documents_too_long_for_the_context_are_refused_before_asking(shared: Session) -> None:
    long = [Document("long", "word " * 3000)]
    assert not shared.documents.count(long, "Why?", "airoboros", GREEDY.params).fits
    assert "remove a document" in list(shared.documents.ask(VISITOR, long, "Why?", "airoboros", GREEDY))[-1].error


def test_dropped_files_that_are_no_text_are_refused(shared: Session) -> None:
    uploads = shared.workbench.access.uploads
    for name, data, said in (("a.bin", b"\xff\xfe\xfa", "not UTF-8"), ("b.txt", b"a\0b", "holds NUL")):
        (uploads / name).write_bytes(data)
        with pytest.raises(RequestError, match=said):
            shared.documents.read([uploads / name])


def test_a_layer_order_is_shown_with_what_it_takes(shared: Session) -> None:
    view = shared.layers.view("0-3,2*2@0.5,4")
    assert [(bar.layer, bar.repeated) for bar in view.bars[3:6]] == [(3, False), (2, True), (2, True)]
    assert view.bars[4].weight == 0.5
    assert "7 layer instances" in view.cost and "1.40 times" in view.cost
    assert "layer" in shared.layers.view("0-9").error


def test_an_order_is_applied_without_a_reload_and_taken_back(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    plain, loaded = asked(session, "def read(path):").turns[-1].content, session.workbench.loaded
    assert session.layers.apply(VISITOR, "0-4,3-4").error is None
    assert session.layers.current() == "0-4,3-4" and session.workbench.loaded is loaded
    assert asked(session, "def read(path):").turns[-1].content != plain
    assert session.layers.apply(VISITOR, "0-9").error is not None and session.layers.current() == "0-4,3-4"
    session.layers.apply(VISITOR, "")
    assert asked(session, "def read(path):").turns[-1].content == plain


def test_two_orders_are_compared_without_changing_the_model(shared: Session) -> None:
    pair = list(shared.layers.compare(VISITOR, "0-4,3-4", "def read(path):\n", GREEDY.params))[-1]
    assert pair.before and pair.after and pair.before != pair.after
    assert shared.layers.current() == "0-4"
    same = list(shared.layers.compare(VISITOR, "0-4", "def read(path):\n", GREEDY.params))[-1]
    assert same.before == same.after == pair.before


def test_the_order_of_recomputing_and_rewinding_is_written_out(shared: Session) -> None:
    assert shared.layers.rewind(4, 2) == "0-3,2-4"


# The context lab


def test_the_lab_measures_perplexity_with_progress_plot_and_table(shared: Session) -> None:
    pytest.importorskip("matplotlib")
    text = shared.lab.text(None, "")
    views = list(shared.lab.perplexity(VISITOR, text, "64, 128", ["none", "yarn"], "4", 256))
    last = views[-1]
    assert last.measured.error is None and last.measured.done == last.measured.total == 2 * 2 * 256
    assert [row[:2] for row in last.rows] == [("none", 64), ("none", 128), ("yarn", 64), ("yarn", 128)]
    assert last.svg.startswith("<svg") and last.csv.read_text().count("\n") == 5


def test_the_lab_maps_retrieval(shared: Session) -> None:
    pytest.importorskip("matplotlib")
    last = list(shared.lab.retrieval(VISITOR, "word " * 50, "128", "as loaded", "", 1))[-1]
    assert [row[:2] for row in last.rows] == [(128, f"{depth}%") for depth in (0, 25, 50, 75, 100)]
    assert last.svg.startswith("<svg")


def test_a_cancelled_measurement_shows_what_it_has(shared: Session) -> None:
    pytest.importorskip("matplotlib")
    views = shared.lab.perplexity(VISITOR, shared.lab.text(None, ""), "64 128", ["none"] * 50, "", 8192)
    seen = [next(views), next(views)]
    shared.running.stop(VISITOR.tab)
    view = [*seen, *views][-1]
    assert view.measured.cancelled and len(view.measured.result) < 50 and view.csv is not None


@pytest.mark.parametrize(
    ("lengths", "scalings", "factor", "said"),
    [
        ("many", ["none"], "", "lengths are whole numbers"),
        ("", ["none"], "", "give from 1 to 12 lengths"),
        ("64", [], "", "choose at least one scaling"),
        ("64", ["spiral"], "", "scaling 'spiral' is not known"),
        ("64", ["yarn"], "x", "the scaling factor is a number"),
        ("64", ["adapter storm"], "", "no adapter 'storm'"),
        ("999999", ["none"], "", "one window of the longest length"),
    ],
)
def test_what_cannot_be_measured_is_explained(
    shared: Session, lengths: str, scalings: list[str], factor: str, said: str
) -> None:
    last = list(shared.lab.perplexity(VISITOR, "def f(): pass\n" * 30, lengths, scalings, factor, 4096))[-1]
    assert said in last.measured.error


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
