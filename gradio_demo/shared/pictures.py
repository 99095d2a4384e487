"""Lines of text that several tabs show, as HTML. All text is escaped; colours are CSS variables of style.css."""

from __future__ import annotations

from html import escape

ERROR = "rw-error"


def live_line(text: str, running: bool, error: bool) -> str:
    """The line under a reply."""
    kind = ERROR if error else "rw-running" if running else ""
    return f'<p class="rw-line {kind}">{escape(text)}</p>' if text else '<p class="rw-line">&nbsp;</p>'


def problem(text: str) -> str:
    """An error message; nothing for an empty text."""
    return f'<p class="rw-line {ERROR}">{escape(text)}</p>' if text else ""


def is_problem(line: str) -> bool:
    """Whether a line tells of a problem."""
    return ERROR in line
