"""The tour on the page, without Gradio: what is asked, what is said about it, and what is drawn."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

import ropewalk
from demo_session import VISITOR, empty_session, values
from ropewalk.gradio_demo.replies.reply import Reply, start_reply
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.tour import behaviour
from ropewalk.gradio_demo.tour.behaviour import AnswerView
from ropewalk.gradio_demo.tour.pictures import answer_picture, document_picture, plots_picture
from ropewalk.measure.stored import store_curves, store_maps
from ropewalk.measure.tasks import make_task
from ropewalk.model.variants import scaling_variant
from ropewalk.text.tokenizer.load import load_tokenizer
from ropewalk.tour.readers import open_readers
from ropewalk.tour.tour import FOLDER, read_tour, tour_file, write_tour
from tours import model_with_a_tour


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A model whose first question is answered right, as the stored answer is what it says; and one without a tour."""
    root = tmp_path_factory.mktemp("tours")
    session = empty_session(root)
    folder = model_with_a_tour(root / "models" / "touring")
    model, tokenizer = ropewalk.load_model(folder, threads=1), load_tokenizer(folder)
    tour = read_tour(folder)
    said = open_readers(tour, folder, model, tokenizer).scaled.ask(tour.document, tour.questions[0].text).text
    write_tour(replace(tour, questions=(replace(tour.questions[0], answer=said), *tour.questions[1:])), folder)
    ids = tokenizer.encode("Hemp is laid into strands, strands into rope. " * 40, add_bos=False)
    variants = [scaling_variant(model, "none", 1.0)]
    store_curves(folder / FOLDER, model, ids, [64, 128], variants, 256)
    store_maps(folder / FOLDER, model, ids, make_task("keys", tokenizer, ids, 1), [96], [0.0, 1.0], variants)
    session.workbench.load("touring", values(session, "touring", threads="1"))
    return session


def asked(session: Session, question: str, is_scaled: bool) -> AnswerView:
    return list(session.tours.ask(VISITOR, question, is_scaled))[-1]


def test_an_answer_is_compared_with_the_stored_one_and_its_passage_is_marked(session: Session) -> None:
    opened = session.tours.current()
    first, second, _ = opened.tour.questions
    right = asked(session, first.text, True)
    assert (right.right, right.passage) == (True, first.passage)
    assert f"<mark>{first.passage}</mark>" in document_picture(opened, True, right.passage)
    wrong = asked(session, second.text, True)
    assert wrong.right is False and wrong.expected == second.answer
    assert second.answer in answer_picture(second.text, wrong) and "wrong" in answer_picture(second.text, wrong)


def test_the_switch_changes_the_answer_and_the_reason_and_nobody_elses_model(session: Session) -> None:
    loaded, question = session.workbench.require(), session.tours.current().tour.questions[0].text
    scaled, plain = asked(session, question, True), asked(session, question, False)
    assert scaled.text != plain.text and plain.right is False
    assert "linear scaling by 4" in scaled.why and "Without scaling" in plain.why
    assert session.workbench.require() is loaded and loaded.model.rope.method.name == "none"


def test_an_answer_that_is_ended_leaves_the_page_free_for_another(session: Session) -> None:
    question = session.tours.current().tour.questions[0].text
    views = session.tours.ask(VISITOR, question, True)
    next(views)
    follower = threading.Thread(target=lambda: list(views))
    follower.start()
    session.tours.end(VISITOR)
    assert asked(session, question, False).right is False
    follower.join()


def test_an_answer_that_has_not_begun_is_ended_as_well(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    question = session.tours.current().tour.questions[0].text
    reached, go_on = threading.Event(), threading.Event()

    def start_late(*args: object) -> Reply:
        reached.set()
        go_on.wait()
        return start_reply(*args)

    monkeypatch.setattr(behaviour, "start_reply", start_late)
    views: list[AnswerView] = []
    follower = threading.Thread(target=lambda: views.extend(session.tours.ask(VISITOR, question, True)))
    follower.start()
    reached.wait()
    threading.Timer(0.2, go_on.set).start()
    assert session.tours.end(VISITOR) == question
    follower.join()
    assert not views and session.tours.end(VISITOR) == ""
    assert asked(session, question, False).right is False


def test_a_second_question_is_refused_while_the_first_is_answered(session: Session) -> None:
    question = session.tours.current().tour.questions[0].text
    views = session.tours.ask(VISITOR, question, True)
    first = next(views)
    second = asked(session, question, True)
    assert second.error and "busy" in second.line
    assert [first, *views][-1].right


def test_a_question_of_ones_own_is_neither_right_nor_wrong(session: Session) -> None:
    view = asked(session, "What is made here?", True)
    assert view.text and view.right is None and not view.passage and view.why


def test_no_question_is_an_error(session: Session) -> None:
    view = asked(session, " ", True)
    assert view.error and "write a question first" in view.line


def test_the_passage_is_marked_across_the_end_of_the_trained_length(session: Session) -> None:
    opened = session.tours.current()
    across = opened.tour.document[opened.trained - 9 : opened.trained + 9]
    marked = document_picture(opened, False, across)
    assert marked.count("<mark>") == 2 and f"<mark>{across[:9]}</mark>" in marked and "rw-unseen" in marked
    assert f"<mark>{across[9:]}</mark>" in marked


def test_what_is_stored_is_drawn_at_once_here_and_in_the_lab(session: Session) -> None:
    assert plots_picture(session.tours.current()).count("<svg") == 2
    curves, maps = session.lab.stored()
    assert [row[:2] for row in curves.rows] == [("none", 64), ("none", 128)] and "<svg" in curves.svg
    assert [row[:3] for row in maps.rows] == [("none", 96, "0%"), ("none", 96, "100%")] and "<svg" in maps.svg
    assert maps.csv.read_text().startswith("scaling,length,depth")


def test_a_model_without_a_tour_and_a_damaged_tour_show_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = empty_session(tmp_path)
    assert session.tours.current() is None
    folder = model_with_a_tour(tmp_path / "models" / "damaged")
    tour_file(folder).write_text("{}")
    session.workbench.load("damaged", values(session, "damaged", threads="1"))
    assert session.tours.current() is None and "tour.json" in caplog.text
    assert session.lab.stored() == (None, None)
    assert "brings no tour" in asked(session, "What?", True).line
