"""The model bar in a browser."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page

from demo_page import PATIENCE_MS, ask, choose, field, opened, reply_settings, says
from demo_session import copy_of_the_embedded_model
from ropewalk.gradio_demo import serving
from ropewalk.gradio_demo.app import build_page
from ropewalk.gradio_demo.session import Session


def test_a_broken_folder_is_explained_and_the_old_model_still_answers(page: Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    field(page, "folder").fill("broken")
    field(page, "folder").press("Enter")
    page.click("#load")
    says(page, "load-problem", "model.safetensors")
    assert "embedded model" in page.inner_text("#status")
    reply_settings(page, 8, 1)
    assert ask(page, "def f():")


def test_a_folder_outside_is_refused_with_what_can_be_opened(page: Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    field(page, "folder").fill("/etc")
    field(page, "folder").press("Enter")
    says(page, "load-problem", "others may not be read")


def test_a_wrong_value_is_explained_at_its_field(page: Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    field(page, "field-max_seq_len").fill("many")
    field(page, "field-max_seq_len").press("Tab")
    says(page, "field-max_seq_len", "a number is needed, got 'many'")
    field(page, "field-max_seq_len").fill("2048")
    field(page, "field-max_seq_len").press("Tab")
    says(page, "field-max_seq_len", "Longest text in tokens")


def test_loading_with_another_context_changes_the_card(page: Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    field(page, "field-max_seq_len").fill("1024")
    page.click("#load")
    says(page, "card", "1,024 tokens")
    field(page, "field-max_seq_len").fill("2048")
    page.click("#load")
    says(page, "card", "2,048 tokens")


def test_a_dropped_folder_with_equal_names_is_explained(page: Page, tmp_path: Path) -> None:
    for name, text in (("", "{}"), ("inner", '{"other": 1}')):
        (tmp_path / "dropped" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "dropped" / name / "config.json").write_text(text)
    page.get_by_text("Model and how it is loaded").click()
    page.get_by_text("Or drop a model folder").click()
    page.locator("input[type=file][webkitdirectory]").first.set_input_files(tmp_path / "dropped")
    says(page, "load-problem", "two different files named config.json were dropped")


def test_a_file_above_the_limit_is_not_uploaded_and_the_page_says_so(
    browser: Browser, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MAX_UPLOAD_BYTES", 1000)
    (tmp_path / "long.txt").write_text("word " * 1000)
    small = build_page(session)
    url = serving.launch(small, serving.Address())
    page = browser.new_context().new_page()
    page.set_default_timeout(PATIENCE_MS)
    opened(page, url)
    choose(page, "Ask documents")
    page.set_input_files("#documents-files input[type=file]", tmp_path / "long.txt")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    assert not page.inner_text("#documents-list").count("long.txt")
    page.context.close()
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("long.txt", b"x" * 5000)})
    assert answer.status_code == 413  # also for those who ask without the page
    small.close()


def test_unloading_is_quiet_and_what_was_said_about_it_goes_with_the_next_model(page: Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    page.wait_for_function("document.querySelector('#template input').value === 'of the checkpoint'")
    page.click("#unload")
    says(page, "status", "No model|no model")
    field(page, "question").fill("def f():")
    page.click("#send")
    says(page, "chat-line", "no model is loaded")
    page.click("#load")
    says(page, "status", "tokens of context")
    page.wait_for_function("!document.querySelector('#chat-line').innerText.includes('no model is loaded')")
    assert page.locator(".toast-body").count() == 0
    choose(page, "Chat")  # a model with a tour opens that
    reply_settings(page, 8, 1)
    assert ask(page, "def f():")


def test_a_dropped_folder_is_loaded(page: Page, tmp_path: Path) -> None:
    """The last one here: the page has another model from now on."""
    folder = copy_of_the_embedded_model(tmp_path / "dropped", max_position_embeddings=768)
    page.get_by_text("Model and how it is loaded").click()
    page.get_by_text("Or drop a model folder").click()
    page.locator("input[type=file][webkitdirectory]").first.set_input_files(folder)
    page.wait_for_function("document.querySelector('#folder input, #folder textarea')?.value.includes('dropped-')")
    page.click("#load")
    says(page, "status", "768 tokens of context")
    reply_settings(page, 8, 1)
    assert ask(page, "def f():")
