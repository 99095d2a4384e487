"""Documents against the context, and the sources of an answer, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ropewalk.gradio_demo.documents.behaviour import Count, Source


def count_line(count: Count) -> str:
    """Tokens of a prompt against the context, as a bar."""
    part = 100 * min(1.0, count.tokens / count.size)
    state = "rw-written" if count.fits else "rw-over"
    verdict = "fits" if count.fits else "is too long: remove a document, or load the model with a longer context"
    return (
        f'<div class="rw-meter"><div class="rw-bar"><span class="{state}" style="width:{part:.1f}%"></span></div>'
        f'<p class="rw-line {"" if count.fits else "rw-error"}">{count.tokens:,} tokens of {count.size:,}, '
        f"{count.room:,} kept for the answer: {verdict}</p></div>"
    )


def sources_list(sources: Sequence[Source]) -> str:
    """Where an answer may come from."""
    if not sources:
        return ""
    items = "".join(
        f"<li><b>{escape(source.document.title)}</b>{_about(source)}"
        f'<span class="rw-line">{"named in the answer · " if source.cited else ""}'
        f"{source.shared:.0%} of the answer's longer words occur in it</span></li>"
        for source in sources
    )
    return f'<ol class="rw-sources">{items}</ol>'


def _about(source: Source) -> str:
    known = [value for value in (source.document.date, source.document.url) if value]
    return f" <span>{escape(' · '.join(known))}</span>" if known else ""
