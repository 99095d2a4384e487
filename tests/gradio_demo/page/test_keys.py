"""Keys in a browser: Enter sends, Shift+Enter starts a new line, Ctrl+Enter continues a text, Tab is seen to move."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page

from demo_page import choose, field, finished, reply_settings, says


def test_enter_sends_the_question_of_the_chat(page: Page) -> None:
    reply_settings(page, 8, 1)
    field(page, "question").click()
    page.keyboard.type("def f():")
    page.keyboard.press("Enter")
    finished(page, "chat-line")
    assert page.locator("#chatbot .user.message").first.inner_text().strip() == "def f():"
    assert field(page, "question").input_value() == ""


def test_shift_and_enter_start_a_line_in_the_question(page: Page) -> None:
    reply_settings(page, 8, 1)
    field(page, "question").click()
    page.keyboard.type("def f():")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("    return 1")
    assert field(page, "question").input_value() == "def f():\n    return 1"
    page.keyboard.press("Enter")
    finished(page, "chat-line")
    asked = page.locator("#chatbot .user.message")
    assert asked.count() == 1  # Shift+Enter has sent nothing
    assert asked.first.inner_text().strip() == "def f():\n    return 1"


def test_the_keys_are_those_that_the_field_promises(page: Page) -> None:
    assert "Enter sends, Shift+Enter starts a new line" in field(page, "question").get_attribute("placeholder")


@pytest.mark.usefixtures("slow_model")
def test_the_next_question_can_be_typed_while_a_reply_is_written(page: Page) -> None:
    reply_settings(page, 200, 1)
    field(page, "question").click()
    page.keyboard.type("def f():")
    page.keyboard.press("Enter")
    page.locator("#chat-line .rw-running", has_text="written").wait_for()
    page.keyboard.type("def g():")
    page.click("#stop")
    says(page, "chat-line", "stopped")
    assert field(page, "question").input_value() == "def g():"


def test_a_refused_question_comes_back_into_its_field(page: Page) -> None:
    page.get_by_text("Sampling", exact=True).first.click()
    field(page, "seed").fill("many")
    field(page, "question").fill("def f():")
    field(page, "question").press("Enter")
    says(page, "chat-line", "a seed is a whole number")
    page.wait_for_function("document.querySelector('#question textarea').value === 'def f():'")


def test_enter_makes_lines_in_the_notebook_and_ctrl_enter_continues_it(page: Page) -> None:
    choose(page, "Notebook")
    field(page, "notebook-text").fill("def f():")
    for key in ("Enter", "Shift+Enter"):
        field(page, "notebook-text").press("End")
        field(page, "notebook-text").press(key)
    assert field(page, "notebook-text").input_value() == "def f():\n\n"
    assert "written" not in page.inner_text("#notebook-line")
    field(page, "notebook-text").press("Control+Enter")
    finished(page, "notebook-line")


def test_enter_asks_the_documents_and_shift_enter_starts_a_line(page: Page, tmp_path: Path) -> None:
    (tmp_path / "hemp.txt").write_text("Rope is made of hemp.")
    choose(page, "Ask documents")
    page.set_input_files("#documents-files input[type=file]", tmp_path / "hemp.txt")
    says(page, "documents-list", "hemp.txt")
    field(page, "documents-question").click()
    page.keyboard.type("What is rope")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("made of?")
    assert field(page, "documents-question").input_value() == "What is rope\nmade of?"
    assert not page.inner_text("#documents-sources").strip()
    page.keyboard.press("Enter")
    says(page, "documents-sources", "hemp.txt")
    assert field(page, "documents-question").input_value() == "What is rope\nmade of?"


FOCUSED = """() => {
    const style = getComputedStyle(document.activeElement);
    return [document.activeElement.outerHTML.slice(0, 200), style.outlineStyle, parseFloat(style.outlineWidth)];
}"""


@pytest.mark.parametrize("tab", ["Tour", "Chat", "Context lab"])
def test_tab_goes_through_everything_and_shows_where_it_is(page: Page, tab: str) -> None:
    choose(page, tab)
    page.get_by_role("tab", name=tab, exact=True).first.focus()
    kinds = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        element, outline, width = page.evaluate(FOCUSED)
        if element.startswith("<body"):  # the last one was left
            break
        assert outline != "none", element
        assert width >= 1, element
        kinds.add(element.split()[0])
    else:
        pytest.fail(f"there is no way out of {element}")
    assert {"<button", "<input", "<textarea"} <= kinds
