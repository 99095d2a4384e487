"""Pictures of the tabs besides the chat: tokens by probability, layers as bars, sources, progress."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ropewalk.gradio_demo.documents.behaviour import Count, Source
from ropewalk.gradio_demo.layers.behaviour import Bar, OrderView
from ropewalk.gradio_demo.notebook.behaviour import ShownToken
from ropewalk.gradio_demo.replies.measuring import Measured

HUES = 320  # degrees of the circle that the layers share: less than all of it, or first and last would look alike
MAX_BARS = 400


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


def order_picture(view: OrderView) -> str:
    """One bar per layer instance: the colour is the layer, the height its weight; a dot marks repetitions."""
    if view.error is not None:
        return f'<pre class="rw-error rw-caret">{escape(view.error)}</pre>'
    bars = "".join(_bar(bar, view.num_layers) for bar in view.bars[:MAX_BARS])
    return (
        f'<div class="rw-bars" role="img" aria-label="layer order {escape(view.canonical)}">{bars}</div>'
        f'<p class="rw-line">{escape(view.canonical)} — {escape(view.cost)}</p>'
    )


def sources_list(sources: Sequence[Source]) -> str:
    """Where an answer may come from."""
    if not sources:
        return ""
    items = "".join(
        f"<li><b>{escape(source.document.title)}</b>{_about(source)}"
        f'<span class="rw-line">{"named in the answer · " if source.cited else ""}'
        f"{source.shared:.0%} of the answer's longer words stand in it</span></li>"
        for source in sources
    )
    return f'<ol class="rw-sources">{items}</ol>'


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


def progress_bar(measured: Measured, unit: str) -> str:
    """How far a measurement is."""
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


def _bar(bar: Bar, num_layers: int) -> str:
    hue = HUES * bar.layer / max(1, num_layers)
    height = max(12, min(100, 100 * abs(bar.weight)))
    name = f"layer {bar.layer}{' of the second model' if bar.second else ''}, weight {bar.weight:g}"
    label = f"{'b' if bar.second else ''}{bar.layer}"
    classes = "rw-layer" + (" rw-repeated" if bar.repeated else "")
    return (
        f'<span class="{classes}" title="{name}"><i style="height:{height:.0f}%;background:hsl({hue:.0f} 48% 52%)"></i>'
        f"<em>{label}</em></span>"
    )


def _about(source: Source) -> str:
    known = [value for value in (source.document.date, source.document.url) if value]
    return f" <span>{escape(' · '.join(known))}</span>" if known else ""
