"""Notebook, documents, layers and the context lab, on the embedded model, without Gradio."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo_session import GREEDY, VISITOR, asked, embedded_session
from ropewalk.base.errors import RequestError
from ropewalk.gradio_demo.documents.behaviour import Document, sources_of
from ropewalk.gradio_demo.session import Session


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
    long = [Document("long", "word " * 5000)]
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


@pytest.mark.parametrize("task", ["several", "pairs"])
def test_the_lab_hides_other_things(shared: Session, task: str) -> None:
    pytest.importorskip("matplotlib")
    last = list(shared.lab.retrieval(VISITOR, "word " * 50, "512", "yarn", "4", 1, task))[-1]
    assert last.measured.error is None and len(last.rows) == 5


def test_the_lab_recommends_a_scaling_with_the_reason_and_what_to_type(shared: Session) -> None:
    pytest.importorskip("matplotlib")
    last = list(shared.lab.recommend(VISITOR, shared.lab.text(None, ""), 1024, 1024))[-1]
    assert last.measured.error is None and last.measured.done == last.measured.total == 10 * 1024
    reason, options, rule = last.advice
    assert "has a perplexity of" in reason and "--max-seq-len 1024" in options and "The rule" in rule
    assert last.svg.startswith("<svg") and len(last.rows) == 10
    assert [line.split(",")[-1] for line in last.csv.read_text().splitlines()].count("yes") == 1


def test_a_cancelled_recommendation_shows_what_was_measured_and_recommends_nothing(shared: Session) -> None:
    pytest.importorskip("matplotlib")
    views = shared.lab.recommend(VISITOR, shared.lab.text(None, ""), 2048, 65536)
    seen = [next(views)]
    shared.running.stop(VISITOR.tab)
    view = [*seen, *views][-1]
    assert view.measured.cancelled and view.measured.result.chosen is None
    assert view.advice == ("Cancelled before every scaling was measured",)


@pytest.mark.parametrize("length", [None, 1, 2.5, float("nan"), float("inf"), 10**9])
def test_a_context_that_cannot_be_wanted_is_explained(shared: Session, length: float | None) -> None:
    last = list(shared.lab.recommend(VISITOR, "def f(): pass\n" * 30, length, 4096))[-1]
    assert "the context wanted is a whole number of tokens" in last.measured.error


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
        ("64", ["yarn"], "0", "factor must be a number from 0.01"),
        ("64", ["adapter storm"], "", "no adapter 'storm'"),
        ("999999", ["none"], "", "one window of the longest length"),
    ],
)
def test_what_cannot_be_measured_is_explained(
    shared: Session, lengths: str, scalings: list[str], factor: str, said: str
) -> None:
    last = list(shared.lab.perplexity(VISITOR, "def f(): pass\n" * 30, lengths, scalings, factor, 4096))[-1]
    assert said in last.measured.error
