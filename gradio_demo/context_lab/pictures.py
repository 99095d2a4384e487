"""The progress of a measurement, as a bar, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ropewalk.gradio_demo.replies.measuring import Measured


def progress_bar(measured: Measured, unit: str) -> str:
    """The progress of a measurement, or why there is none."""
    if measured.error is not None:
        return f'<p class="rw-line rw-error">{escape(measured.error)}</p>'
    part = 100 * measured.done / measured.total if measured.total else 0
    if not measured.running:
        part = part if measured.cancelled else 100
    state = "running" if measured.running else "cancelled: what was measured is shown" if measured.cancelled else "done"
    return (
        f'<div class="rw-meter"><div class="rw-bar"><span class="rw-cached" style="width:{part:.1f}%"></span></div>'
        f'<p class="rw-line">{state}: {measured.done:,} of {measured.total:,} {unit}</p></div>'
    )


def advice_lines(advice: Sequence[str]) -> str:
    """Paragraphs below the bar."""
    return "".join(f'<p class="rw-line rw-advice">{escape(line)}</p>' for line in advice)
