"""What is typed stays, however late the server's answers to the loading of the page come."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page

from demo_page import PATIENCE_MS, ask, choose, field, opened, reply_settings, says
from demo_session import embedded_length
from ropewalk.config.layer_order import choose_layer_order
from ropewalk.gradio_demo.session import Session

PATIENCE_S = PATIENCE_MS / 1000


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str], threading.Event]:
    """Makes a method answer no sooner than the event that is returned."""

    def hold(owner: object, name: str) -> threading.Event:
        gate, method = threading.Event(), getattr(owner, name)

        def answer(*arguments):
            assert gate.wait(PATIENCE_S)
            return method(*arguments)

        monkeypatch.setattr(owner, name, answer)
        return gate

    return hold


def drawn(page: Page, url: str) -> None:
    """The page is there to type into; nothing has been answered yet."""
    page.goto(url)
    choose(page, "Chat")  # with a tour, the page opens on that
    field(page, "question").wait_for()


def test_a_question_and_a_system_prompt_typed_at_once_stay(page: Page, url: str, session: Session, late) -> None:
    reply_settings(page, 8, 1)
    field(page, "system").fill("saved")
    ask(page, "def saved():")
    gate = late(session.chats, "current")
    drawn(page, url)
    field(page, "question").fill("typed early")
    field(page, "system").fill("typed early, too")
    gate.set()
    page.locator("#chatbot .user.message", has_text="def saved").wait_for()
    assert field(page, "question").input_value() == "typed early"
    reply_settings(page, 8, 1)
    ask(page, "def later():")  # long after the answer
    assert field(page, "system").input_value() == "typed early, too"


def test_a_system_prompt_comes_back_where_nothing_was_typed(page: Page, url: str) -> None:
    reply_settings(page, 8, 1)
    field(page, "system").fill("saved")
    ask(page, "def saved():")
    opened(page, url)
    page.wait_for_function("document.querySelector('#system textarea').value === 'saved'")


def test_settings_typed_at_once_stay_and_the_others_are_filled_in(page: Page, url: str, session: Session, late) -> None:
    gate = late(session.loading, "note")
    drawn(page, url)
    page.get_by_text("Model and how it is loaded").click()
    field(page, "field-threads").fill("1")
    assert field(page, "field-rope_factor").input_value() == ""
    gate.set()
    page.wait_for_function("document.querySelector('#field-rope_factor input, #field-rope_factor textarea').value")
    assert field(page, "field-threads").input_value() == "1"
    assert field(page, "field-max_seq_len").input_value() == str(embedded_length())


def test_a_layer_order_typed_at_once_stays_and_others_see_the_new_one(
    page: Page, browser: Browser, url: str, session: Session, late
) -> None:
    other = browser.new_context().new_page()
    opened(other, url)
    choose(other, "Layers")
    gate = late(session.layers, "current")
    drawn(page, url)
    choose(page, "Layers")
    field(page, "order").fill("0-2")
    gate.set()
    page.wait_for_function("document.querySelectorAll('#order-picture .rw-layer').length === 3")
    config = session.workbench.require().model.config
    page.get_by_text("Model and how it is loaded").click()
    for order in ("0-4,3-4", "0-4,2-4", "0-4"):  # somebody else applies them
        session.workbench.set_layer_order(choose_layer_order(config, order))
        says(page, "card", f"{order} \\(")
        other.wait_for_function("order => document.querySelector('#order textarea').value === order", arg=order)
    assert field(page, "order").input_value() == "0-2"
    other.context.close()


@pytest.mark.parametrize("name", ["question", "system"])
def test_what_is_typed_survives_opening_another_conversation_or_goes_with_it(page: Page, name: str) -> None:
    """The question is the reader's; the system prompt belongs to the conversation."""
    reply_settings(page, 8, 1)
    ask(page, "def f():")
    field(page, name).fill("typed")
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('#chatbot .message').length === 0")
    page.wait_for_function("document.querySelector('#system textarea').value === ''")
    assert field(page, "question").input_value() == ("typed" if name == "question" else "")
