"""Who may change the model that all share, with two browsers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page

from demo_page import PATIENCE_MS, ask, choose, field, gradio_access, opened, reply_settings, says
from demo_session import embedded_session
from ropewalk.gradio_demo.app import build_page
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.serving import Address, launch
from ropewalk.gradio_demo.session import Session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """As it starts without options."""
    return embedded_session(tmp_path_factory.mktemp("page"))


@contextmanager
def visitor(browser: Browser, url: str, login: tuple[str, str] | None = None) -> Iterator[Page]:
    """A browser of its own, with the model bar open."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    if login is not None:
        assert context.request.post(f"{url}login", form={"username": login[0], "password": login[1]}).ok
    opened(page, url)
    page.get_by_text("Model and how it is loaded").click()
    page.locator("#load").wait_for()
    yield page
    context.close()


def refused(page: Page, session: Session, said: str) -> None:
    """Neither load, nor unload, nor another order; and the model is the one there was."""
    loaded = session.workbench.loaded
    for button in ("load", "unload"):
        page.click(f"#{button}")
        says(page, "load-problem", said)
        field(page, "folder").press("Escape")
    choose(page, "Layers")
    field(page, "order").fill("0-4,3-4")
    page.click("#order-apply")
    says(page, "order-applied", f"Nothing was changed: .*{said}")
    assert session.workbench.loaded is loaded
    assert str(loaded.model.layer_order) == "0-4"


def test_the_second_browser_may_talk_but_not_load(browser: Browser, url: str, session: Session) -> None:
    with visitor(browser, url) as first, visitor(browser, url) as second:
        says(second, "owner-note", "You can look, but not load.*only the browser that opened the page first")
        assert "not load" not in first.inner_text("#owner-note")
        refused(second, session, "the browser that opened the page first")
        choose(second, "Chat")
        reply_settings(second, 8, 1)
        assert ask(second, "def f():")
        field(first, "field-max_seq_len").fill("1024")
        first.click("#load")
        says(first, "card", "1,024 tokens")
        says(second, "card", "1,024 tokens")  # everybody sees what the owner did


def test_one_visitor_alone_may_load_and_unload(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    session = embedded_session(tmp_path_factory.mktemp("alone"))
    with served(session, Address()) as url, visitor(browser, url) as page:
        page.click("#unload")
        says(page, "status", "No model is loaded")
        page.click("#load")
        says(page, "status", "embedded model")
        assert "not load" not in page.inner_text("#owner-note")


def test_with_logins_the_named_one_may_load(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    session = embedded_session(tmp_path_factory.mktemp("logins"), Owner(logins=["anna"]))
    users = (("anna", "secret"), ("ben", "hidden"))
    with (
        served(session, Address(auth=users)) as url,
        visitor(browser, url, users[1]) as ben,
        visitor(browser, url, users[0]) as anna,
    ):
        says(ben, "owner-note", "only anna may change it")
        refused(ben, session, "only anna may change it")
        anna.click("#unload")
        says(anna, "status", "No model is loaded")


@contextmanager
def served(session: Session, address: Address) -> Iterator[str]:
    """A page for one test."""
    session.workbench.access = gradio_access(session)
    page = build_page(session)
    yield launch(page, address)
    page.close()
