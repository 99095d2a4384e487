"""The settings for long context in the Model tab, and a chat over a full window: checks as in page.py."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from playwright.sync_api import expect

from checks import MODEL
from long_context import SHIFTED

if TYPE_CHECKING:
    from page import Browser

TYPES = ("fp16", "q8", "q6", "q4", "q8_q4", "q4+256", "fp32")
MAX_TURNS = 8
CONTEXT_LABELS = ("ctx-size", "ctx_size", "max_seq_len")


def a_cache_type_and_a_scaling_are_chosen(browser: Browser) -> str:
    browser.choose_model(MODEL)
    browser.set_number(2048, *CONTEXT_LABELS)
    browser.set_number(1, "compress_pos_emb")
    browser.menu(_cache_label(browser)).click()
    for name in TYPES:
        expect(browser.page.get_by_role("option", name=name, exact=True).first).to_be_visible()
    browser.shoot("cache types")
    browser.page.get_by_role("option", name="q4+256", exact=True).first.click()
    browser.choose("rope_method", "auto")
    browser.press("Load")
    shown = browser.see(re.compile(r"^Context 2048; memory: .*q4\+256 cache"))
    decision = browser.see(re.compile("^RoPE scaling: ntk-by-parts, factor 4.*rope_scaling=auto"))
    browser.shoot("automatic scaling")
    return f"{shown}; {decision}"


def a_chat_over_a_full_window_is_shifted(browser: Browser) -> str:
    browser.set_number(512, *CONTEXT_LABELS)
    browser.choose("rope_method", "config")
    browser.choose(_cache_label(browser), "fp16")
    browser.open_more_options(browser.menu("context_shift"))
    browser.choose("context_shift", "on")
    browser.press("Load")
    browser.see(re.compile(r"^Context 512; memory: .*fp16 cache"))
    browser.tab("Parameters")
    browser.set_number(64, "max_new_tokens")
    browser.tab("Chat")
    start = len(browser.server.console())
    for turn in range(MAX_TURNS):
        before = browser.replies()
        browser.send(f"What does function {turn * 37} do with a list of numbers and a list of names?")
        browser.reply_after(before)
        shifted = SHIFTED.findall(browser.server.console()[start:])
        if shifted:
            browser.shoot("shifted")
            return f"in turn {turn + 1}, {shifted[-1]} tokens shifted"
    raise AssertionError(f"no shift in {MAX_TURNS} turns: {browser.server.console()[start:]}")


def _cache_label(browser: Browser) -> str:
    """What this version calls the setting; without one of its own it has ours."""
    own = browser.page.get_by_label("cache-type", exact=True).locator("visible=true")
    return "cache-type" if own.count() else "cache_type"


CHECKS = (a_cache_type_and_a_scaling_are_chosen, a_chat_over_a_full_window_is_shifted)
