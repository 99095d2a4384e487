"""Conversations in a browser: handing them out, deleting them, reading them while they grow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page

from demo_page import ask, field, longer_reply, opened, reply_settings, says

LOG = "document.querySelector('#chatbot .bubble-wrap')"
FROM_THE_END = f"{LOG}.scrollHeight - {LOG}.scrollTop - {LOG}.clientHeight"


def exported(page: Page) -> list[str]:
    """The messages of the file that one click on Export gives."""
    with page.expect_download() as waiting:
        page.click("#export")
    assert waiting.value.suggested_filename.startswith("conversation-")
    data = json.loads(Path(waiting.value.path()).read_text(encoding="utf-8"))
    return [turn["content"] for turn in data["turns"]]


def test_one_click_downloads_the_conversation_that_is_open(page: Page) -> None:
    reply_settings(page, 8, 1)
    ask(page, "def first():")
    assert exported(page)[0] == "def first():"
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('#chatbot .message').length === 0")
    ask(page, "def second():")
    assert exported(page)[0] == "def second():"
    field(page, "conversations").click()
    page.locator("#conversations [role=option], [role=option]", has_text="def first").first.click()
    page.locator("#chatbot .user.message", has_text="def first").wait_for()
    assert exported(page)[0] == "def first():"


def test_an_exported_file_is_imported_again(page: Page, tmp_path: Path) -> None:
    reply_settings(page, 8, 1)
    ask(page, "def handed_out():")
    with page.expect_download() as waiting:
        page.click("#export")
    waiting.value.save_as(tmp_path / "conversation.json")
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('#chatbot .message').length === 0")
    page.locator("input[type=file][accept*=json]").set_input_files(tmp_path / "conversation.json")
    page.locator("#chatbot .user.message", has_text="def handed_out").wait_for()


def test_an_empty_conversation_is_neither_exported_nor_deleted(page: Page) -> None:
    page.click("#export")
    page.get_by_text("there is nothing to export yet").first.wait_for()
    page.click("#delete")
    says(page, "chat-line", "nothing to delete yet")
    assert page.locator("#delete-question").count() == 0 or not page.locator("#delete-question").is_visible()


def test_deleting_asks_first_and_can_be_refused(page: Page) -> None:
    reply_settings(page, 8, 1)
    ask(page, "def doomed():")
    page.click("#delete")
    says(page, "delete-question", "Delete def doomed")
    page.click("#delete-keep")
    page.locator("#delete-question").wait_for(state="hidden")
    assert "def doomed" in page.inner_text("#chatbot")
    page.click("#delete")
    page.click("#delete-confirm")
    page.wait_for_function("document.querySelectorAll('#chatbot .message').length === 0")
    field(page, "conversations").click()
    assert page.get_by_role("option", name="def doomed").count() == 0


def test_what_is_deleted_is_what_was_asked_about(page: Page) -> None:
    reply_settings(page, 8, 1)
    ask(page, "def doomed():")
    page.click("#delete")
    says(page, "delete-question", "Delete def doomed")
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('#chatbot .message').length === 0")
    ask(page, "def kept():")
    page.click("#delete-confirm")
    page.locator("#delete-question").wait_for(state="hidden")
    assert "def kept" in page.inner_text("#chatbot")
    field(page, "conversations").click()
    page.get_by_role("option", name="def kept").first.wait_for()
    assert page.get_by_role("option", name="def doomed").count() == 0


def test_no_icon_of_the_conversation_is_a_trash_can(page: Page) -> None:
    reply_settings(page, 8, 1)
    ask(page, "def f():")
    icons = page.locator("#chatbot .icon-button-wrapper.top-panel button:visible")
    assert [icons.nth(i).get_attribute("title") for i in range(icons.count())] == ["Copy conversation"]


@pytest.mark.usefixtures("slow_model")
def test_a_growing_reply_is_followed_and_reading_up_is_left_in_peace(page: Page) -> None:
    reply_settings(page, 1500, 1)
    field(page, "question").fill("def read_lines(path):")
    page.click("#send")
    page.wait_for_function(f"{LOG}.scrollHeight > {LOG}.clientHeight + 300")
    assert page.evaluate(FROM_THE_END) <= 8  # followed
    page.locator("#chatbot .bubble-wrap").hover()
    page.mouse.wheel(0, -200)
    page.wait_for_function(f"{FROM_THE_END} > 100")
    place = page.evaluate(f"{LOG}.scrollTop")
    longer_reply(page, longer_reply(page, longer_reply(page, 0)))  # three more pieces
    height = page.evaluate(f"{LOG}.scrollHeight")
    page.wait_for_function(f"height => {LOG}.scrollHeight > height + 40", arg=height)
    assert abs(page.evaluate(f"{LOG}.scrollTop") - place) <= 60  # the rest of a smooth wheel, not the end
    for _ in range(50):  # the end runs away meanwhile
        page.mouse.wheel(0, 100_000)
        if page.evaluate(FROM_THE_END) <= 8:
            break
    page.wait_for_function(f"{FROM_THE_END} <= 8")
    height = page.evaluate(f"{LOG}.scrollHeight")
    page.wait_for_function(f"height => {LOG}.scrollHeight > height + 40", arg=height)
    page.wait_for_function(f"{FROM_THE_END} <= 8")  # followed again
    page.click("#stop")
    says(page, "chat-line", "stopped")


@pytest.mark.usefixtures("slow_model")
def test_a_growing_reply_is_not_left_by_accident(page: Page) -> None:
    reply_settings(page, 8, 1)
    ask(page, "def first():")
    reply_settings(page, 1500, 1)
    field(page, "question").fill("def second():")
    page.click("#send")
    longer_reply(page, 0)
    for button in ("#new", "#undo"):
        page.click(button)
        page.locator(".toast-body", has_text="a reply is being written").wait_for()
        page.locator(".toast-body .toast-close").click()
        page.locator(".toast-body").wait_for(state="hidden")
    page.click("#stop")
    says(page, "chat-line", "stopped")
    assert "def first" in page.inner_text("#chatbot") and "def second" in page.inner_text("#chatbot")
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('#chatbot .message').length === 0")


def test_two_tabs_lose_nothing_that_was_said_in_the_other(page: Page, url: str) -> None:
    reply_settings(page, 8, 1)
    ask(page, "def first():")
    other = page.context.new_page()
    opened(other, url)
    other.locator("#chatbot .user.message", has_text="def first").wait_for()
    reply_settings(other, 8, 1)
    ask(other, "def second():")
    field(page, "question").fill("def third():")
    page.click("#send")
    says(page, "chat-line", "changed in another tab")
    page.locator("#chatbot .user.message", has_text="def second").wait_for()
    page.wait_for_function("document.querySelector('#question textarea').value === 'def third():'")
    page.click("#send")
    page.locator("#chatbot .user.message", has_text="def third").wait_for()
    assert "def second" in page.inner_text("#chatbot")
    other.close()


def test_a_page_that_is_loaded_anew_while_a_reply_is_written_goes_on(page: Page, url: str, slow_model: None) -> None:
    reply_settings(page, 1500, 1)
    field(page, "question").fill("def begun():")
    page.click("#send")
    longer_reply(page, 0)
    opened(page, url)
    page.locator("#chatbot .user.message", has_text="def begun").wait_for()
    reply_settings(page, 8, 1)
    for _ in range(20):  # until the reply of the page before has ended, and its end is seen
        field(page, "question").fill("def next():")
        page.click("#send")
        if "in another tab" not in says(page, "chat-line", "written|another tab"):
            break
        page.wait_for_function("document.querySelector('#question textarea').value === 'def next():'")
    page.locator("#chatbot .user.message", has_text="def next").wait_for()
