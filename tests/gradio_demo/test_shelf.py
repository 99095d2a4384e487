"""Documents that are read once: kept, offered again to who kept them, and forgotten; without Gradio."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo_session import GREEDY, VISITOR, embedded_session, empty_session
from ropewalk.base.errors import RequestError
from ropewalk.gradio_demo.documents.behaviour import MAX_DOCUMENTS, Document, with_documents
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.visitors import Visitor

HEMP = Document("hemp.txt", "Hemp is a plant whose fibres make rope. " * 10)
WALK = Document("walk", "A ropewalk is a long straight lane. " * 10, "http://walk", "1618")
TEMPLATE = "airoboros"


def kept_name(session: Session, documents: list[Document], visitor: Visitor = VISITOR) -> str:
    view = list(session.shelf.keep(visitor, documents, TEMPLATE, GREEDY))[-1]
    assert not view.error and view.line.startswith("kept: "), view.line
    return view.name


def test_kept_documents_are_offered_after_a_restart_and_not_read_again(tmp_path: Path) -> None:
    first = embedded_session(tmp_path)
    name = kept_name(first, [HEMP, WALK])
    second = embedded_session(tmp_path)
    entry = second.shelf.list(VISITOR)[0]
    assert (entry.name, entry.title, entry.problem) == (name, "hemp.txt, walk", None)
    documents, template = second.shelf.open(VISITOR, name)
    assert (documents, template) == ([HEMP, WALK], TEMPLATE)
    answers = [
        list(session.documents.ask(VISITOR, documents, "What is it?", template, GREEDY))[-1]
        for session in (second, first)
    ]
    assert answers[0].text == answers[1].text
    assert entry.num_tokens - 1 <= answers[0].meter.cached <= entry.num_tokens
    assert second.workbench.require().engine.kept.num_recalled == 1


def test_documents_that_were_asked_about_are_kept_without_reading_them(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    list(session.documents.ask(VISITOR, [HEMP], "What is it?", TEMPLATE, GREEDY))
    rows = session.workbench.require().engine.scheduler.num_rows
    kept_name(session, [HEMP])
    assert session.workbench.require().engine.scheduler.num_rows - rows <= 2


def test_the_same_documents_are_kept_once_and_others_beside_them(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    assert kept_name(session, [HEMP]) == kept_name(session, [HEMP])
    assert kept_name(session, [HEMP, WALK]) != kept_name(session, [HEMP])
    assert len(session.shelf.list(VISITOR)) == 2


def test_each_person_sees_their_own(tmp_path: Path) -> None:
    session, other = embedded_session(tmp_path), Visitor("another", "tab 2")
    name = kept_name(session, [HEMP])
    assert session.shelf.list(other) == []
    for call in (session.shelf.open, session.shelf.forget):
        with pytest.raises(RequestError, match="not kept any more"):
            call(other, name)
    assert kept_name(session, [HEMP], other) != name


def test_forgotten_documents_are_gone(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    name = kept_name(session, [HEMP])
    session.shelf.forget(VISITOR, name)
    assert session.shelf.list(VISITOR) == [] and list(session.shelf.folder.folder.iterdir()) == []
    with pytest.raises(RequestError, match="not kept any more"):
        session.shelf.open(VISITOR, name)


def test_documents_of_another_setting_say_so(tmp_path: Path) -> None:
    kept_name(embedded_session(tmp_path), [HEMP])
    other = embedded_session(tmp_path, cache_type="fp32")
    assert "cache type: 'fp16' in the file, 'fp32' here" in other.shelf.list(VISITOR)[0].problem
    assert empty_session(tmp_path).shelf.list(VISITOR)[0].problem == "no model is loaded"


@pytest.mark.parametrize(
    "documents, message",
    [([], "at least one"), ([Document("long", "word " * 5000)], "remove one, or load the model with a longer context")],
)
def test_what_cannot_be_kept_is_explained(documents: list[Document], message: str, shared: Session) -> None:
    view = list(shared.shelf.keep(VISITOR, documents, TEMPLATE, GREEDY))[-1]
    assert view.error and message in view.line


def test_keeping_without_a_model_is_explained(tmp_path: Path) -> None:
    view = list(empty_session(tmp_path).shelf.keep(VISITOR, [HEMP], TEMPLATE, GREEDY))[-1]
    assert view.error and "no model is loaded" in view.line


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch) -> None:
    def full(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ropewalk.model.saved.write.write_file", full)
    session = embedded_session(tmp_path)
    view = list(session.shelf.keep(VISITOR, [HEMP], TEMPLATE, GREEDY))[-1]
    assert view.error and "No space left on device" in view.line


def test_files_of_others_in_the_folder_are_not_offered(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    session.workbench.require().engine.kept.save_as("mine", "some text that the server kept " * 10)
    (session.shelf.folder.folder / "broken.safetensors").write_bytes(b"x")
    assert session.shelf.list(VISITOR) == []


def test_documents_of_one_title_stay_apart_and_a_full_list_refuses_more() -> None:
    kept, first, second = Document("text 1", "a"), Document("text 1", "b"), Document("text 1 (2)", "c")
    found = with_documents([kept], [first, second])
    assert [document.text for document in found] == ["a", "b", "c"]
    assert len({document.title for document in found}) == 3
    with pytest.raises(RequestError, match=f"at most {MAX_DOCUMENTS} documents"):
        with_documents([kept] * MAX_DOCUMENTS, [first])
