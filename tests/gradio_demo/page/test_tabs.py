"""The tabs besides the chat in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page

from demo_page import choose, field, finished, says
from demo_session import embedded_length
from ropewalk.gradio_demo.session import Session


@pytest.mark.usefixtures("endless_replies")
def test_the_notebook_shows_tokens_with_their_alternatives(page: Page) -> None:
    choose(page, "Notebook")
    page.click("#notebook-go")
    finished(page, "notebook-line")
    page.locator(".rw-token").nth(3).focus()
    assert page.locator(".rw-token").nth(3).locator("tr").count() == 5
    assert page.locator(".rw-token").nth(3).locator(".rw-alts").is_visible()


def test_a_question_is_asked_of_a_dropped_document(page: Page, tmp_path: Path) -> None:
    (tmp_path / "hemp.txt").write_text("Rope is made of hemp.")
    choose(page, "Ask documents")
    page.set_input_files("#documents-files input[type=file]", tmp_path / "hemp.txt")
    says(page, "documents-list", "hemp.txt")
    says(page, "documents-count", f"tokens of {embedded_length():,}, 128 kept for the answer: fits")
    field(page, "documents-question").fill("What is rope made of?")
    page.click("#documents-ask")
    says(page, "documents-sources", "hemp.txt")
    assert field(page, "documents-answer").input_value()


def test_a_second_document_is_added_to_the_first_once(page: Page, tmp_path: Path) -> None:
    choose(page, "Ask documents")
    for name in ("hemp.txt", "flax.txt"):
        (tmp_path / name).write_text(f"Rope is made of {name}.")
        page.set_input_files("#documents-files input[type=file]", tmp_path / name)
        says(page, "documents-list", name)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "hemp.txt").write_text("Another text of this name.")
    page.set_input_files("#documents-files input[type=file]", tmp_path / "more" / "hemp.txt")
    says(page, "documents-list", "hemp.txt \\(2\\)")
    boxes = page.locator("#documents-list input[type=checkbox]")
    assert [page.locator("#documents-list label").nth(i).inner_text().strip() for i in range(boxes.count())] == [
        "hemp.txt",
        "flax.txt",
        "hemp.txt (2)",
    ]
    assert all(boxes.nth(i).is_checked() for i in range(3))


def test_the_context_lab_measures_to_its_plot(page: Page) -> None:
    choose(page, "Context lab")
    field(page, "lab-lengths").fill("64, 128")
    field(page, "lab-tokens").fill("2048")
    field(page, "lab-tokens").press("Enter")
    page.click("#lab-perplexity-go")
    says(page, "lab-perplexity-progress", "done")  # until then the curves that come with the model may be there
    assert "yarn" in page.inner_text("#lab-perplexity-plot")
    letters = page.locator("#lab-perplexity-plot text", has_text="context length").first
    body = page.locator(".gradio-container").first.evaluate("node => getComputedStyle(node).color")
    assert letters.evaluate("node => getComputedStyle(node).fill") == body  # readable in both themes
    page.set_viewport_size({"width": 400, "height": 860})  # the plot is wider, and scrolls in its frame
    page.wait_for_function("document.documentElement.scrollWidth <= 400 && innerWidth == 400")
    assert page.locator("#lab-perplexity-plot svg").evaluate("node => node.getBoundingClientRect().width") >= 480


def test_the_context_lab_recommends_and_can_be_cancelled(page: Page) -> None:
    choose(page, "Context lab")
    choose(page, "Which scaling?")
    field(page, "lab-budget").fill("65536")
    field(page, "lab-budget").press("Enter")
    page.click("#lab-recommend-go")
    says(page, "lab-recommend-progress", "running: [1-9]")
    page.click("#lab-recommend-cancel")
    says(page, "lab-recommend-progress", "Cancelled before every scaling was measured")
    field(page, "lab-wanted").fill("1024")
    field(page, "lab-wanted").press("Enter")
    field(page, "lab-budget").fill("2048")
    field(page, "lab-budget").press("Enter")
    page.click("#lab-recommend-go")
    said = says(page, "lab-recommend-progress", "The rule")
    assert "done: 20,480 of 20,480 tokens" in said and "--max-seq-len 1024" in said
    page.locator("#lab-recommend-plot svg").wait_for()
    assert "ntk-by-parts 2" in page.inner_text("#lab-recommend-plot")


def test_a_layer_order_is_drawn_and_applied(page: Page, session: Session) -> None:
    choose(page, "Layers")
    field(page, "order").fill("0-4,3-4")
    page.wait_for_function("document.querySelectorAll('#order-picture .rw-layer').length === 7")
    page.click("#order-apply")
    says(page, "order-applied", "now runs 0-4,3-4")
    assert str(session.workbench.require().model.layer_order) == "0-4,3-4"
    page.click("#order-reset")
    page.wait_for_function("document.querySelectorAll('#order-picture .rw-layer').length === 5")
    page.click("#order-apply")
    says(page, "order-applied", "now runs 0-4.")
