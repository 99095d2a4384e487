"""A layer order as bars."""

from __future__ import annotations

from html import escape

from ropewalk.gradio_demo.layers.behaviour import Bar, OrderView

HUES = 320  # degrees of the colour circle for all layers; over the whole circle, first and last would look alike
MAX_BARS = 400


def order_picture(view: OrderView) -> str:
    """One bar per layer instance: the colour is the layer, the height its weight; a dot marks repetitions."""
    if view.error is not None:
        return f'<pre class="rw-error rw-caret">{escape(view.error)}</pre>'
    bars = "".join(_bar(bar, view.num_layers) for bar in view.bars[:MAX_BARS])
    return (
        f'<div class="rw-bars" role="img" aria-label="layer order {escape(view.canonical)}">{bars}</div>'
        f'<p class="rw-line">{escape(view.canonical)} — {escape(view.cost)}</p>'
    )


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
