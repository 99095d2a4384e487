"""Keeping documents in a browser, and finding them again when the page has been started anew."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser, Page

from demo_page import PATIENCE_MS, choose, field, gradio_access, opened, says
from demo_session import embedded_session
from ropewalk.config.layer_order import choose_layer_order
from ropewalk.gradio_demo.app import build_page
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.serving import Address, launch

TEXT = "Hemp is a plant whose fibres make rope.\n" * 12


def started(root: Path, port: int | None = None) -> tuple[object, str, object]:
    """A page whose data lies below `root`: (page to close, address, session)."""
    session = embedded_session(root, Owner(anyone=True))
    session.workbench.access = gradio_access(session)
    page = build_page(session)
    return page, launch(page, Address(port=port)), session


def test_a_kept_document_is_offered_at_the_next_start_and_not_read_again(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "hemp.txt").write_text(TEXT)
    served, url, _ = started(tmp_path)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    try:
        opened(page, url)
        choose(page, "Ask documents")
        page.set_input_files("#documents-files input[type=file]", tmp_path / "hemp.txt")
        says(page, "documents-list", "hemp.txt")
        page.get_by_text("Read once, and keep").click()
        page.click("#documents-keep")
        line = says(page, "documents-keep-line", "kept: ")
        kept = int(line.removeprefix("kept: ").split()[0])
    finally:
        served.close()
    served, url, session = started(tmp_path)
    try:
        opened(page, url)
        choose(page, "Ask documents")
        take_up(page, "hemp.txt")
        field(page, "documents-question").fill("What is rope made of?")
        page.click("#documents-ask")
        says(page, "documents-sources", "hemp.txt")
        assert f"{kept:,} from the cache" in page.inner_text("#documents-line")
        assert session.workbench.require().engine.kept.num_recalled == 1
        config = session.workbench.require().model.config
        for order, said in (("0-4,3-4", "1 more were kept with another model"), ("0-4", "Choosing puts them")):
            session.workbench.set_layer_order(choose_layer_order(config, order))
            says(page, "documents-kept", said)
        page.locator("#documents-kept", has_not_text="more were kept").wait_for()
        page.locator("#documents-kept input").click()
        page.get_by_role("option", name="hemp.txt").click()
        page.click("#documents-forget")
        says(page, "documents-keep-line", "forgotten")
        assert list(session.shelf.folder.folder.iterdir()) == []
    finally:
        served.close()
        context.close()


def take_up(page: Page, title: str) -> None:
    """Choose the kept documents of that title; who has kept something finds the list open."""
    page.locator("#documents-kept input").click()
    page.get_by_role("option", name=title).click()
    says(page, "documents-list", title)
    says(page, "documents-keep-line", "on the list, and not read again")


def test_nothing_ticked_is_explained(page: Page) -> None:
    choose(page, "Ask documents")
    page.get_by_text("Read once, and keep").click()
    page.click("#documents-keep")
    says(page, "documents-keep-line", "at least one")
