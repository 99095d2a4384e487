"""Lines of text that several tabs show, as HTML. All text is escaped; colours are CSS variables of style.css."""

from __future__ import annotations

from html import escape


def live_line(text: str, running: bool, error: bool) -> str:
    """The line under a reply."""
    kind = "rw-error" if error else "rw-running" if running else ""
    return f'<p class="rw-line {kind}">{escape(text)}</p>' if text else '<p class="rw-line">&nbsp;</p>'


def problem(text: str) -> str:
    """An error message; nothing for an empty text."""
    return f'<p class="rw-line rw-error">{escape(text)}</p>' if text else ""
