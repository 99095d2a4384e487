"""The continuation of the notebook, token by token, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ropewalk.gradio_demo.notebook.behaviour import ShownToken


def token_view(tokens: Sequence[ShownToken]) -> str:
    """The continuation token by token, coloured by probability; hovering or tapping one lists what else was likely."""
    if not tokens:
        return '<p class="rw-empty">The tokens of the continuation appear here, coloured by how likely each was.</p>'
    spans = "".join(_token(token) for token in tokens)
    legend = "".join(
        f'<span style="background:{_colour(p)}">{text}</span>'
        for p, text in ((1.0, "sure"), (0.5, "even"), (0.05, "surprised"))
    )
    return (
        f'<div class="rw-tokens"><div class="rw-legend">{legend}<i>Point at a token, or tap it.</i></div>'
        f'<div class="rw-text">{spans}</div></div>'
    )


def _token(token: ShownToken) -> str:
    rows = "".join(
        f"<tr><td>{escape(_visible(text))}</td><td>{probability:.1%}</td></tr>"
        for text, probability in token.alternatives
    )
    name = f"<b>{escape(_visible(token.text))}</b> {token.probability:.1%}"
    detail = f'<span class="rw-alts">{name}<table>{rows}</table></span>'
    style = f"background:{_colour(token.probability)}"
    return f'<span class="rw-token" tabindex="0" style="{style}">{escape(token.text)}{detail}</span>'


def _colour(probability: float) -> str:
    """Green for sure, through amber, to red; translucent, for both themes."""
    return f"hsl({int(8 + 150 * probability)} 70% 45% / 0.28)"


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"
