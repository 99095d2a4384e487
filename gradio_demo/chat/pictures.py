"""The question before a conversation is deleted, as HTML."""

from __future__ import annotations

from html import escape


def deletion_question(title: str) -> str:
    """Which conversation it is about, and that there is no way back."""
    return f'<p class="rw-line">Delete <b>{escape(title)}</b>? It cannot be brought back.</p>'
