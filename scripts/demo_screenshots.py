"""Pictures of the demo page for the documentation: every tab, wide and narrow, light and dark.

    ropewalk demo --port 7860 --anyone-may-load &   # tour and tour-off: of a model that has a tour
    python scripts/demo_screenshots.py http://127.0.0.1:7860 docs/images

Needs playwright and a Chromium (--chromium). Pictures are reduced to 256 colours, which keeps each below 150 KB.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
SIZES = {"wide": (1280, 800), "narrow": (400, 860)}
COLOURS = 256
PATIENCE_MS = 180_000
DOCUMENT = """List of ships
Wornes laid the keel of the Young Needle. The captain of the Young Needle is Mardun. The road was quiet that year.
Mardun lives in Belwick. Mardun keeps a goat.
"""


def main() -> None:
    """Take all pictures, or those of the named tabs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--tabs", nargs="+", choices=TABS, default=list(TABS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
        for size in SIZES:
            for theme in ("light", "dark"):
                with opened(browser, args.url, size, theme) as page:
                    for name in args.tabs:
                        TABS[name](page)
                        save(page, args.out / f"demo-{name}-{size}-{theme}.png")
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, size: str, theme: str) -> Iterator[Page]:
    """The page as a new visitor sees it."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    page = context.new_page()
    page.goto(url)
    page.get_by_role("tab", name="Chat", exact=True).first.wait_for()
    choose(page, "Chat")  # with a model that has a tour, the page opens on that
    page.wait_for_function("document.querySelector('#template input')?.value", timeout=PATIENCE_MS)
    page.wait_for_timeout(1500)
    yield page
    context.close()


def save(page: Page, path: Path) -> None:
    """The whole page, reduced."""
    page.evaluate("document.activeElement?.matches('.rw-token') || document.activeElement?.blur(); scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size // 1024} KB")


def choose(page: Page, tab: str) -> None:
    """Open a tab; a narrow page has some of them in a menu."""
    button = page.get_by_role("tab", name=tab, exact=True)
    if not button.first.is_visible():
        page.locator("#tabs .overflow-menu > button").first.click()
        page.locator("#tabs .overflow-dropdown button", has_text=tab).first.click()
    else:
        button.first.click()
    page.wait_for_timeout(500)


def wait_text(page: Page, selector: str, text: str) -> None:
    """Wait until the element shows the text."""
    page.locator(selector, has_text=text).first.wait_for(timeout=PATIENCE_MS)


def fill_setting(page: Page, selector: str, text: str) -> None:
    """Type into a field, whatever element it is made of."""
    page.locator(f"{selector} textarea, {selector} input").first.fill(text)


def picture_tour(page: Page) -> None:
    """A question answered, and its passage."""
    choose(page, "Tour")
    page.click("#tour-question-2")
    page.locator("#tour-answer .rw-verdict").wait_for(timeout=PATIENCE_MS)
    page.locator("#tour-document mark").wait_for()


def picture_tour_off(page: Page) -> None:
    """The same question without the scaling."""
    picture_tour(page)
    page.locator("#tour-switch input").uncheck()
    wait_text(page, "#tour-why", "Without scaling")


def picture_model(page: Page) -> None:
    """The model bar, opened."""
    page.get_by_text("Model and how it is loaded").click()
    page.wait_for_timeout(700)


def picture_chat(page: Page) -> None:
    """Two turns, the second of which comes from the cache in part."""
    if page.locator("#field-threads").is_visible():
        page.get_by_text("Model and how it is loaded").click()
    choose(page, "Chat")
    page.get_by_text("Sampling", exact=True).first.click()
    fill_setting(page, "#seed", "7")
    fill_setting(page, "#max-new-tokens", "48")
    page.keyboard.press("Enter")
    for question in (f"{DOCUMENT}\nWho built the Young Needle?", "Where does Mardun live?"):
        page.locator("#question textarea").fill(question)
        page.click("#send")
        wait_text(page, "#chat-line", "written at")
        page.locator("#chat-line .rw-running").wait_for(state="detached", timeout=PATIENCE_MS)
    page.get_by_text("Sampling", exact=True).first.click()


def picture_notebook(page: Page) -> None:
    """A continuation with the alternatives of one token."""
    choose(page, "Notebook")
    fill_setting(page, "#notebook-seed", "3")
    page.click("#notebook-go")
    wait_text(page, "#notebook-line", "written at")
    page.locator(".rw-token").first.focus()


def picture_documents(page: Page) -> None:
    """A file that is kept, and a question."""
    choose(page, "Ask documents")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ships.txt"
        path.write_text(DOCUMENT, encoding="utf-8")
        page.set_input_files("#documents-files input[type=file]", path)
        wait_text(page, "#documents-list", "ships.txt")
    page.get_by_text("Read once, and keep").click()
    page.click("#documents-keep")
    wait_text(page, "#documents-keep-line", "kept: ")
    fill_setting(page, "#documents-seed", "5")
    page.locator("#documents-question textarea").fill("Which animal does Mardun keep?")
    page.click("#documents-ask")
    wait_text(page, "#documents-sources", "ships.txt")


def picture_lab(page: Page) -> None:
    """Perplexity under several scalings."""
    choose(page, "Context lab")
    page.click("#lab-perplexity-go")
    wait_text(page, "#lab-perplexity-progress", "done")
    page.locator("#lab-perplexity-plot svg").wait_for()


def picture_retrieval(page: Page) -> None:
    """Pass keys by depth and length."""
    choose(page, "Context lab")
    choose(page, "Retrieval")
    page.click("#lab-retrieval-go")
    wait_text(page, "#lab-retrieval-progress", "done")
    page.locator("#lab-retrieval-plot svg").wait_for()


def picture_recommend(page: Page) -> None:
    """Which scaling to take, and why."""
    choose(page, "Context lab")
    choose(page, "Which scaling?")
    page.click("#lab-recommend-go")
    wait_text(page, "#lab-recommend-progress", "The rule")
    page.locator("#lab-recommend-plot svg").wait_for()


def picture_layers(page: Page) -> None:
    """An order with repeated layers, compared and not applied."""
    choose(page, "Layers")
    fill_setting(page, "#order", "0-3,2*2@0.5,3-4")
    page.click("#order-compare")
    wait_text(page, "#order-line", "done")


TABS: dict[str, Callable[[Page], None]] = {
    "tour": picture_tour,
    "tour-off": picture_tour_off,
    "model": picture_model,
    "chat": picture_chat,
    "notebook": picture_notebook,
    "documents": picture_documents,
    "lab": picture_lab,
    "recommend": picture_recommend,
    "retrieval": picture_retrieval,
    "layers": picture_layers,
}

if __name__ == "__main__":
    main()
