"""The page of a running web UI, driven in headless Chromium as a person would. Needs playwright and a Chromium.

Labels are those of v2.8 to v4.7; what differs between them is tried by all its names.

Over 400 lines because the checks are one sequence: each needs what those before it left in the web UI.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect, sync_playwright

import page_long_context
from checks import BROKEN, CONSOLE_LINE, LORAS, MODEL, PROMPT, Skip
from page_long_context import CONTEXT_LABELS
from server import DEMO_MODEL, PAGE_IS_UP, WebuiCopy, WebuiServer, traces

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WAIT_MS = 120_000
SAMPLE_TEXT = "held-out-sample"
PERPLEXITY = (9.0, 12.0)  # 10.2 by `ropewalk perplexity --lengths 512`; the web UI counts a short last window in full
UNSUPPORTED = ("broken-other-family", "broken-falcon", "broken-awq")


@dataclass(slots=True)
class Browser:
    """A page of the web UI, and where screenshots of it go."""

    page: Page
    copy: WebuiCopy
    server: WebuiServer
    shots: Path
    noted: dict[str, Any] = field(default_factory=dict)

    def open(self) -> None:
        """Load the page and wait until it has been built."""
        self.page.goto(self.server.page_url, wait_until="load")
        expect(self.page.get_by_role("tab", name="Session", exact=True)).to_be_visible(timeout=60_000)

    def tab(self, name: str) -> None:
        """Go to a tab."""
        self.page.get_by_role("tab", name=name, exact=True).first.click()

    def press(self, name: str) -> None:
        """Press the visible button of that name."""
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first.click()

    def menu(self, label: str) -> Locator:
        """The visible drop-down menu of that label."""
        return self.page.get_by_label(label, exact=True).locator("visible=true").first

    def choose(self, label: str, option: str) -> None:
        """Choose in a drop-down menu."""
        self.menu(label).click()
        self.page.get_by_role("option", name=option, exact=True).first.click()

    def choose_model(self, name: str) -> None:
        """Choose a model and wait until the page has answered that."""
        self.tab("Model")
        self.choose("Model", name)
        answer = self.page.locator("h3:visible, p:visible").filter(has_text=name)
        expect(answer.first).to_be_visible(timeout=WAIT_MS)

    def open_more_options(self, wanted: Locator) -> None:
        """Open the part of the Model tab that some versions hide a field in, if this one does."""
        more = self.page.get_by_role("button", name=re.compile("^See more options")).locator("visible=true")
        if not wanted.count() and more.count():
            more.first.click()

    def choose_several(self, label: str, *options: str) -> None:
        """Add to what is chosen in a menu that takes several; its box may be too narrow to count as visible."""
        title = self.page.get_by_text(label, exact=True).locator("visible=true").first
        title.locator("xpath=following::input[1]").click(force=True)
        for option in options:
            self.page.get_by_role("option", name=option, exact=True).first.click()
        self.page.keyboard.press("Tab")

    def number(self, *labels: str) -> Locator:
        """The box for the number of a slider, or a number field, whose label is one of these."""
        words = "|".join(map(re.escape, labels))
        return self.page.get_by_label(re.compile(f"^(number input for )?({words})")).locator("visible=true").first

    def set_number(self, value: float, *labels: str) -> None:
        """Type a number."""
        box = self.number(*labels)
        self.open_more_options(box)
        box.fill(str(value))
        box.press("Tab")

    def send(self, text: str) -> None:
        """Send a chat message."""
        box = self.page.locator("#chat-input textarea")
        box.fill(text)
        box.press("Enter")

    def stop(self) -> None:
        """End the reply that is being written, if it is."""
        button = self.page.locator("#stop:visible")
        if button.count():
            button.first.click()

    def last_message(self) -> str:
        """The text of the last chat message."""
        return self.page.locator("#chat .message-body").last.inner_text()

    def replies(self) -> int:
        """How many replies have ended, by the console."""
        return len(CONSOLE_LINE.findall(self.server.console()))

    def reply_after(self, before: int) -> int:
        """Wait for the end of the next reply, and until the page has it; returns its number of tokens."""
        deadline = time.monotonic() + 90
        while self.replies() <= before:
            assert time.monotonic() < deadline, "the reply does not end"
            time.sleep(0.1)
        self.page.wait_for_timeout(1000)
        return int(CONSOLE_LINE.findall(self.server.console())[before][2])

    def see(self, text: str | re.Pattern[str], timeout: int = WAIT_MS) -> str:
        """Wait until a text is shown; returns the paragraph or item that has it."""
        found = self.page.get_by_text(text).locator("visible=true").first
        expect(found).to_be_visible(timeout=timeout)
        return " ".join(found.inner_text().split())

    def shoot(self, name: str) -> None:
        """Take a screenshot, once nothing moves any more."""
        self.page.wait_for_timeout(600)
        self.shots.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.shots / f"{name}.png", animations="disabled")


def extension_is_activated_in_the_session_tab(browser: Browser) -> str:
    browser.tab("Session")
    box = browser.page.get_by_label("ropewalk", exact=True)
    expect(box).to_be_visible()
    box.check()
    browser.shoot("session")
    browser.press("Apply flags/extensions and restart")
    deadline = time.monotonic() + 60
    while browser.server.console().count(PAGE_IS_UP) < 2:
        assert time.monotonic() < deadline, "the page did not come up again"
        time.sleep(0.2)
    assert 'Loading the extension "ropewalk"' in browser.server.console()
    browser.page.wait_for_timeout(3000)  # the old page reloads by itself
    browser.open()
    browser.tab("Model")
    browser.menu("Model loader").click()
    expect(browser.page.get_by_role("option", name="ropewalk", exact=True)).to_be_visible()
    browser.page.keyboard.press("Escape")
    return "ropewalk is in the list of loaders"


def selecting_a_gptq_folder_fills_the_fields(browser: Browser) -> str:
    browser.choose_model(MODEL)
    expect(browser.menu("Model loader")).to_have_value("ropewalk", timeout=WAIT_MS)
    expect(browser.number(*CONTEXT_LABELS)).to_have_value("512")
    expect(browser.menu("rope_method")).to_have_value("config")
    browser.open_more_options(browser.number("rope_freq_base"))
    expect(browser.number("rope_freq_base")).to_have_value("10000")
    decision = browser.see(re.compile("^RoPE scaling: none"))
    browser.shoot("selected")
    return decision


def load_shows_what_was_loaded(browser: Browser) -> str:
    browser.press("Load")
    browser.see(f"Successfully loaded {MODEL}")
    browser.shoot("loaded")
    return browser.see(re.compile(r"^Context 512"))


def chat_streams(browser: Browser) -> str:
    browser.tab("Chat")
    before = browser.replies()
    browser.send("Write a function that reads a file.")
    replies = browser.page.locator("#chat .message-body")
    lengths: set[int] = set()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(lengths) < 50 and browser.replies() == before:
        lengths.add(len(replies.last.inner_text()) if replies.count() > 1 else 0)
    browser.stop()
    browser.reply_after(before)
    assert len(lengths) > 2, f"the reply did not grow: {sorted(lengths)}"
    text = replies.last.inner_text()
    assert text.strip(), "an empty reply"
    browser.shoot("chat")
    return f"seen growing at {len(lengths)} lengths, to {len(text)} characters"


def another_context_and_compress_pos_emb(browser: Browser) -> str:
    browser.tab("Model")
    browser.set_number(2048, *CONTEXT_LABELS)
    browser.set_number(4, "compress_pos_emb")
    browser.press("Load")
    shown = browser.see(re.compile(r"^Context 2048"))
    decision = browser.see(re.compile("^RoPE scaling: linear, factor 4"))
    browser.shoot("scaled")
    browser.tab("Parameters")
    expect(browser.number("Truncate the prompt")).to_have_value("2048")
    return f"{decision}; {shown}; truncation 2048"


def both_scalings_are_said_to_multiply(browser: Browser) -> str:
    browser.tab("Model")
    browser.set_number(2, "alpha_value")
    browser.press("Load")
    seen = browser.see(re.compile("they multiply"))
    browser.shoot("multiplied")
    browser.set_number(1, "alpha_value")
    browser.press("Load")
    browser.see(re.compile("^RoPE scaling: linear, factor 4"))
    return seen


def settings_are_saved(browser: Browser) -> str:
    browser.tab("Model")
    browser.press("Save settings")
    saved = browser.see(re.compile("saved", re.IGNORECASE))
    path = next(browser.copy.webui.rglob("config-user.yaml"))
    text = path.read_text()
    for line in ("loader: ropewalk", "compress_pos_emb: 4", "rope_method: config"):
        assert line in text, f"{line} is not in {path.name}: {text}"
    browser.choose_model(next(iter(BROKEN)))
    expect(browser.number("compress_pos_emb")).to_have_value("1", timeout=WAIT_MS)
    browser.choose_model(MODEL)
    expect(browser.number("compress_pos_emb")).to_have_value("4", timeout=WAIT_MS)
    expect(browser.number(*CONTEXT_LABELS)).to_have_value("2048")
    return saved


def loras_are_applied(browser: Browser) -> str:
    browser.press("Load")
    browser.see(f"Successfully loaded {MODEL}")
    browser.open_more_options(browser.page.get_by_text("LoRA(s)", exact=True).locator("visible=true"))
    browser.choose_several("LoRA(s)", *LORAS)
    browser.press("Apply LoRAs")
    seen = browser.see(re.compile("^Successful+y applied the LoRAs"))  # v2 spells it with one l
    browser.shoot("loras")
    assert browser.server.api.get("/v1/internal/model/info")["lora_names"] == list(LORAS)
    browser.choose_several("LoRA(s)", "lora-broken")
    browser.press("Apply LoRAs")
    refusal = browser.see(re.compile("DoRA"))
    browser.shoot("lora-refused")
    return f"{seen}; of another: {refusal}"


def a_broken_folder_says_why(browser: Browser) -> str:
    reasons = []
    for name in BROKEN:
        browser.choose_model(name)
        expect(browser.menu("Model loader")).to_have_value("ropewalk")
        if name in UNSUPPORTED:
            browser.see("ropewalk cannot load this model")
            browser.shoot(f"{name} selected")
        browser.press("Load")
        browser.see(f"Failed to load {name}")
        reason = browser.page.locator(f"p:has-text('{name}'):visible, li:has-text('{name}'):visible").last
        reasons.append(f"{name.removeprefix('broken-')}: {' '.join(reason.inner_text().split())[:60]}")
        browser.see(re.compile(f"{MODEL}.? is still loaded"))
        browser.shoot(name)
    assert browser.server.api.post("/v1/completions", prompt="def ", max_tokens=4)["choices"][0]["text"]
    return "; ".join(reasons)


def chat_stops(browser: Browser) -> str:
    browser.tab("Parameters")
    browser.page.get_by_label("Ban the eos_token").locator("visible=true").first.check()  # so that only Stop ends it
    browser.tab("Chat")
    before = browser.replies()
    browser.send("Write a long program.")
    expect(browser.page.locator("#chat .message-body").last).not_to_be_empty()
    browser.page.wait_for_timeout(1500)
    browser.page.locator("#stop:visible").first.click()
    new = browser.reply_after(before)
    assert 0 < new < 500, f"{new} tokens"
    browser.shoot("stopped")
    browser.noted["stopped"] = _words(browser.last_message())
    return f"after {new} tokens"


def chat_continues(browser: Browser) -> str:
    before, stopped = browser.replies(), browser.noted["stopped"]
    messages = browser.page.locator("#chat .message-body").count()
    browser.page.locator("#chat-input textarea").press("Alt+Enter")
    browser.page.wait_for_timeout(2500)
    browser.stop()
    new = browser.reply_after(before)
    text = _words(browser.last_message())
    assert text.startswith(stopped[:40]) and len(text) > len(stopped), (stopped[-80:], text[-80:])
    assert browser.page.locator("#chat .message-body").count() == messages, "another message"
    browser.shoot("continued")
    return f"{len(stopped)} characters became {len(text)}, {new} tokens"


def chat_regenerates(browser: Browser) -> str:
    before, text = browser.replies(), _words(browser.last_message())
    messages = browser.page.locator("#chat .message-body").count()
    browser.page.locator("#chat-input textarea").press("Control+Enter")
    browser.page.wait_for_timeout(2500)
    browser.stop()
    browser.reply_after(before)
    again = _words(browser.last_message())
    for _ in range(40):  # the page shows the end of a reply somewhat after the console has told it
        if again and again != text:
            break
        browser.page.wait_for_timeout(250)
        again = _words(browser.last_message())
    assert again and again != text, "the same reply"
    assert browser.page.locator("#chat .message-body").count() == messages, "another message"
    browser.tab("Parameters")
    browser.page.get_by_label("Ban the eos_token").locator("visible=true").first.uncheck()
    return f"another reply in its place, {len(again)} characters"


def _words(text: str) -> str:
    """Text as the page shows it, without what Markdown does to spaces."""
    return " ".join(text.split())


def notebook_keeps_the_indentation(browser: Browser) -> str:
    browser.tab("Parameters")
    browser.set_number(0.01, "temperature")  # the likeliest token is one of several spaces
    browser.tab("Notebook")
    box = browser.page.locator("#textbox-notebook textarea")
    box.fill(PROMPT)
    before = browser.replies()
    browser.press("Generate")
    browser.page.wait_for_timeout(3000)
    browser.stop()
    new = browser.reply_after(before)
    text = box.input_value()
    assert text.startswith(PROMPT), text
    line = text.removeprefix(PROMPT).partition("\n")[0]
    assert len(line) - len(line.lstrip(" ")) in (4, 8), text  # one space less where the web UI loses one
    browser.shoot("notebook")
    return f"{new} tokens, from {line!r} on"


def the_extension_is_saved_for_the_next_start(browser: Browser) -> str:
    browser.tab("Session")
    browser.page.get_by_role("button", name=re.compile(r"^Save .*settings\.yaml$")).locator(
        "visible=true"
    ).first.click()
    confirm = browser.page.get_by_role("button", name="Save", exact=True).locator("visible=true")
    expect(confirm.first).to_be_visible()
    confirm.first.click()
    path = browser.copy.user_data / "settings.yaml"
    deadline = time.monotonic() + 20
    while not path.is_file() or "- ropewalk" not in path.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, "settings.yaml does not name it"
        time.sleep(0.2)
    return f"- ropewalk in {path.name}"


def uninstalling_leaves_no_trace(browser: Browser) -> str:
    browser.server.stop()
    printed = browser.copy.ropewalk("webui", "uninstall", browser.copy.webui)
    assert (left := traces(browser.copy)) == [], left
    with WebuiServer(browser.copy, page=True) as server:
        assert server.alive
    return "; ".join(line.replace(str(browser.copy.webui), "") for line in printed.splitlines())


def next_token_probabilities(browser: Browser) -> str:
    browser.tab("Notebook")
    browser.page.get_by_role("tab", name="Logits", exact=True).locator("visible=true").first.click()
    browser.press("Get next token probabilities")
    box = browser.page.locator("textarea:visible")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        values = [item.input_value() for item in box.all()]
        found = [value for value in values if re.search(r"0\.\d{3,}", value)]
        if found:
            browser.shoot("logits")
            return found[0].splitlines()[0]
        time.sleep(0.2)
    raise AssertionError(f"no probabilities: {values}")


def perplexity_is_measured(browser: Browser) -> str:
    plain = {"ctx_size": 512, "compress_pos_emb": 1, "alpha_value": 1}  # without the LoRAs too
    browser.server.api.post("/v1/internal/model/load", model_name=MODEL, args=plain)
    browser.tab("Training")
    browser.tab("Perplexity evaluation")
    browser.choose("Input dataset", SAMPLE_TEXT)
    browser.press("Evaluate loaded model")
    seen = browser.see(re.compile(r"perplexity for .* is: [\d.]+|The perplexity .*", re.IGNORECASE), timeout=120_000)
    browser.shoot("perplexity")
    value = float(re.findall(r"\d+\.\d+", seen)[-1])
    assert PERPLEXITY[0] < value < PERPLEXITY[1], f"{value}, not between {PERPLEXITY}"
    return seen


def training_is_refused(browser: Browser) -> str:
    browser.tab("Training")
    browser.tab("Train LoRA")
    browser.press("Start LoRA Training")
    seen = browser.see(re.compile("cannot be trained"))
    browser.shoot("training")
    return seen


def unload_frees_the_model(browser: Browser) -> str:
    browser.tab("Model")
    browser.press("Unload")
    seen = browser.see(re.compile("unloaded", re.IGNORECASE))
    assert browser.server.api.get("/v1/internal/model/info")["model_name"] == "None"
    return seen


CHECKS: tuple[Callable[[Browser], str], ...] = (
    extension_is_activated_in_the_session_tab,
    selecting_a_gptq_folder_fills_the_fields,
    load_shows_what_was_loaded,
    another_context_and_compress_pos_emb,
    chat_streams,
    chat_stops,
    chat_continues,
    chat_regenerates,
    notebook_keeps_the_indentation,
    both_scalings_are_said_to_multiply,
    the_extension_is_saved_for_the_next_start,
    settings_are_saved,
    loras_are_applied,
    a_broken_folder_says_why,
    next_token_probabilities,
    perplexity_is_measured,
    training_is_refused,
    *page_long_context.CHECKS,
    unload_frees_the_model,
    uninstalling_leaves_no_trace,
)


def page_scene(table: Any, copy: WebuiCopy, shots: Path) -> None:
    """The page: everything that a person does there. table: as in e2e.py."""
    scene = "page"
    _add_sample_text(copy)
    table.check(scene, "ropewalk webui install", lambda: copy.ropewalk("webui", "install", copy.webui).splitlines()[0])
    server = WebuiServer(copy, page=True)
    try:
        if not table.check(scene, "the server starts", lambda: str(server.__enter__().alive)):
            return
        with chromium() as page:
            browser = Browser(page, copy, server, shots)
            browser.open()
            for check in CHECKS:
                name = check.__name__.replace("_", " ")
                if not table.check(scene, name, partial(check, browser)) and server.alive:
                    browser.shoot(f"failed {name}")
    finally:
        (copy.scratch / "console page.txt").write_text(server.console(), encoding="utf-8")
        server.stop()


def _add_sample_text(copy: WebuiCopy) -> None:
    """A text for the perplexity tab, so that it needs no network."""
    folder = copy.user_data / "training" / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    text = (DEMO_MODEL / "held_out.txt").read_text(encoding="utf-8")
    (folder / f"{SAMPLE_TEXT}.txt").write_text(text[:20_000], encoding="utf-8")


@contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A fresh headless Chromium: the system's if there is one, else playwright's own."""
    if not Path(CHROMIUM).exists() and shutil.which("chromium") is None:
        raise Skip("no Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or CHROMIUM, args=list(CHROMIUM_FLAGS)
        )
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(WAIT_MS)
            yield page
        finally:
            browser.close()
