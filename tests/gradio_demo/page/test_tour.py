"""The tour in a browser: it is what a visitor sees first, a click shows the passage, the switch asks again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import gradio as gr
import pytest
from playwright.sync_api import Browser, Page

from demo_page import PATIENCE_MS, choose, field, says
from demo_session import empty_session, values
from ropewalk.gradio_demo.app import build_page
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.replies.reply import Reply, start_reply
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.tour import behaviour
from tours import HOUSES, SENTENCES, model_with_a_tour


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    root = tmp_path_factory.mktemp("touring")
    session = empty_session(root, Owner(anyone=True))
    model_with_a_tour(root / "models" / "touring")
    session.workbench.load("touring", values(session, "touring", threads="1"))
    return session


@pytest.fixture
def page(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """As a new visitor opens it."""
    width = getattr(request, "param", 1280)
    context = browser.new_context(viewport={"width": width, "height": 844})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(url)
    page.locator("#tour-question-1").wait_for()
    yield page
    context.close()


def verdict(page: Page) -> str:
    page.locator("#tour-answer .rw-verdict").wait_for()
    return page.inner_text("#tour-answer")


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_a_click_shows_the_answer_and_brings_its_passage_into_view(page: Page) -> None:
    assert page.get_by_role("tab", name="Tour").first.get_attribute("aria-selected") == "true"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#tour-question-3")
    assert f"{HOUSES[2] + 100} fathoms" in verdict(page)
    mark = page.locator("#tour-document mark")
    mark.wait_for()
    assert mark.inner_text() == SENTENCES[HOUSES[2]]
    page.wait_for_function(
        """() => {
          const [mark, box] = ["mark", ".rw-document"].map((s) => document.querySelector(`#tour-document ${s}`));
          const [inner, outer] = [mark.getBoundingClientRect(), box.getBoundingClientRect()];
          return box.scrollTop > 0 && inner.top >= outer.top && inner.bottom <= outer.bottom;
        }"""
    )
    assert "linear scaling by 4" in says(page, "tour-why", "Trained on 512 tokens")


def test_the_switch_asks_the_same_question_again(page: Page) -> None:
    page.click("#tour-question-1")
    with_scaling = verdict(page)
    page.locator("#tour-switch input").uncheck()
    says(page, "tour-why", "Without scaling")
    assert verdict(page) != with_scaling and "How long is the walk of house 7?" in verdict(page)
    page.locator("#tour-switch input").check()
    says(page, "tour-why", "Trained on 512 tokens")
    assert verdict(page) == with_scaling


def test_the_switch_may_be_turned_while_an_answer_is_written(page: Page) -> None:
    page.click("#tour-question-1")
    page.locator("#tour-switch input").uncheck()
    says(page, "tour-why", "Without scaling")
    page.wait_for_function("!document.querySelector('#tour-switch input').checked")
    assert "house 7" in verdict(page) and "busy" not in page.inner_text("#tour-line")


def test_the_switch_may_be_turned_before_anything_of_an_answer_is_shown(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    clicked, turned = threading.Event(), threading.Event()

    def start_late(*args: object) -> Reply:
        if not clicked.is_set():
            clicked.set()
            turned.wait(PATIENCE_MS / 1000)
        return start_reply(*args)

    monkeypatch.setattr(behaviour, "start_reply", start_late)
    page.click("#tour-question-1")
    assert clicked.wait(PATIENCE_MS / 1000)
    page.locator("#tour-switch input").uncheck()
    page.wait_for_timeout(300)
    turned.set()
    assert "house 7" in verdict(page) and "busy" not in page.inner_text("#tour-line")
    says(page, "tour-why", "Without scaling")


def test_a_question_of_ones_own_is_asked_with_enter(page: Page) -> None:
    field(page, "tour-question").fill("What is made here?")
    field(page, "tour-question").press("Enter")
    assert "✓" not in says(page, "tour-answer", "What is made here")
    page.locator("#tour-line .rw-line:not(.rw-running)", has_text="written").wait_for()


def test_the_tab_goes_with_the_model_that_has_the_tour(page: Page, session: Session) -> None:
    session.workbench.load("", values(session, "", threads="1"))
    if session.tours.current() is None:  # as long as the embedded model brings none
        page.get_by_role("tab", name="Tour").first.wait_for(state="hidden")
        page.locator("#question textarea").wait_for()
    session.workbench.load("touring", values(session, "touring", threads="1"))
    page.locator("#tour-question-1", has_text="house 7").wait_for()
    choose(page, "Notebook")
    page.locator("#notebook-text").wait_for()


def test_a_page_that_shows_another_tour_adds_nothing_to_one_being_built(session: Session) -> None:
    """Gradio renders a layout block that is made anywhere in the process into whatever page is open for building."""
    (change,) = [event.fn for event in build_page(session).fns.values() if event.name == "run_changed"]
    with gr.Blocks() as other:
        change("another tour")
    assert not other.children
