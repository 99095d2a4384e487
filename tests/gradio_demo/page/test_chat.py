"""The chat in a browser."""

from __future__ import annotations

import time

import pytest
from playwright.sync_api import Browser, Page

from demo_page import ask, field, finished, longer_reply, opened, reply_settings, says
from demo_session import embedded_length
from ropewalk.gradio_demo.session import Session


@pytest.mark.usefixtures("slow_model")
def test_a_reply_streams_and_can_be_stopped(page: Page) -> None:
    reply_settings(page, 1500, 1)
    field(page, "question").fill("def read_lines(path):")
    page.click("#send")
    longer_reply(page, longer_reply(page, 0))
    assert "written" in page.locator("#chat-line .rw-running").inner_text()
    page.click("#stop")
    says(page, "chat-line", "stopped")
    assert "from the cache" in says(page, "chat-meter", f"of {embedded_length():,} tokens")


@pytest.mark.usefixtures("slow_model")
def test_a_reply_ends_when_its_reader_closes_the_page(browser: Browser, url: str, session: Session) -> None:
    """Others wait for its place. 1,900 tokens of the slow model would take 19 seconds and more."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    opened(page, url)
    reply_settings(page, 1900, 1)
    field(page, "question").fill("def read_lines(path):")
    page.click("#send")
    longer_reply(page, 0)
    queue = session.workbench.require().engine.queue
    assert queue.num_running == 1
    context.close()
    deadline = time.monotonic() + 15
    while queue.num_running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert queue.num_running == 0


@pytest.mark.usefixtures("endless_replies")
def test_settings_change_the_result(page: Page) -> None:
    reply_settings(page, 16, 1)
    one = ask(page, "def read_lines(path):")
    assert "16 written" in page.inner_text("#chat-line")
    reply_settings(page, 16, 2)
    page.click("#again")
    page.wait_for_function("text => document.querySelector('#chatbot').innerText.indexOf(text) < 0", arg=one)
    finished(page, "chat-line")
    reply_settings(page, 16, 1)
    page.click("#again")
    page.wait_for_function("text => document.querySelector('#chatbot').innerText.indexOf(text) >= 0", arg=one)


def test_undo_gives_the_question_back(page: Page) -> None:
    reply_settings(page, 8, 1)
    ask(page, "class Queue:")
    page.click("#undo")
    page.wait_for_function("document.querySelector('#question textarea').value === 'class Queue:'")
    assert page.locator("#chatbot .bot.message").count() == 0


def test_a_reload_of_the_page_keeps_the_conversation_and_others_do_not_see_it(
    page: Page, browser: Browser, url: str
) -> None:
    reply_settings(page, 8, 1)
    reply = ask(page, "def only_mine(path):")
    opened(page, url)
    page.locator("#chatbot .bot.message").first.wait_for()
    assert page.locator("#chatbot .bot.message").last.inner_text() == reply
    assert "only_mine" in field(page, "conversations").input_value()
    other = browser.new_context()
    stranger = other.new_page()
    opened(stranger, url)
    stranger.wait_for_timeout(500)
    assert "only_mine" not in stranger.content()
    other.close()
