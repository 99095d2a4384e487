"""The demo page in headless Chromium, as visitors use it. Everything waits for conditions, never for moments."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.shared.access import Access

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE_MS, OPENING_MS = 60_000, 30_000
TABS = ("Chat", "Notebook", "Ask documents", "Context lab", "Layers")


def gradio_access(session: Session) -> Access:
    """The session's access with Gradio's folder of uploads."""
    return replace(session.workbench.access, uploads=Path(get_upload_folder()))


def opened(page: Any, url: str) -> None:
    """The page on its chat: with a model that has a tour, it opens on that.

    A page that stays blank is opened once more, as a visitor would: Chromium drops what it is fetching when a network
    interface comes or goes, and without one of its modules nothing is shown. One whose scripts fail is a bug.
    """
    lost: list[str] = []
    errors: list[str] = []
    page.on("requestfailed", lambda request: lost.append(f"{request.url}: {request.failure}"))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    if not _has_tabs(page):
        assert lost or not errors, f"the page stayed blank, as its scripts failed: {errors}"
        warnings.warn(f"the page stayed blank; not fetched: {lost}; it shows {page.inner_text('body')!r}", stacklevel=2)
        page.goto(url)
    choose(page, "Chat")
    page.wait_for_function("document.querySelector('#template input')?.value")


def _has_tabs(page: Any) -> bool:
    """Whether the page is built within half of a test's patience."""
    from playwright.sync_api import TimeoutError

    try:
        page.get_by_role("tab", name="Chat", exact=True).first.wait_for(timeout=OPENING_MS)
    except TimeoutError:
        return False
    return True


def choose(page: Any, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).first.click()


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} textarea, #{name} input").first


def says(page: Any, name: str, text: str) -> str:
    """Wait until the element says `text`; all that it says."""
    page.locator(f"#{name}", has_text=re.compile(text)).first.wait_for()
    return page.locator(f"#{name}").first.inner_text()


def finished(page: Any, name: str) -> None:
    """Wait until the reply of this line is complete."""
    page.locator(f"#{name} .rw-line:not(.rw-running)", has_text="written").wait_for()


def ask(page: Any, question: str) -> str:
    """The reply, when it is complete."""
    before = page.locator("#chatbot .bot.message").count()
    field(page, "question").fill(question)
    page.click("#send")
    page.wait_for_function(f"document.querySelectorAll('#chatbot .bot.message').length > {before}")
    finished(page, "chat-line")
    return page.locator("#chatbot .bot.message").last.inner_text()


def reply_settings(page: Any, length: int, seed: int) -> None:
    field(page, "max-new-tokens").fill(str(length))
    field(page, "max-new-tokens").press("Enter")
    if not field(page, "seed").is_visible():
        page.get_by_text("Sampling", exact=True).first.click()
    field(page, "seed").fill(str(seed))


def longer_reply(page: Any, length: int) -> int:
    """Wait until the last reply has more than `length` characters; how many it has."""
    reply = "[...document.querySelectorAll('#chatbot .bot.message')].at(-1)?.innerText.trim().length"
    page.wait_for_function(f"length => ({reply} ?? 0) > length", arg=length)
    return page.evaluate(reply)
