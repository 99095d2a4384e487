"""How the context is filled, as a bar."""

from __future__ import annotations

from ropewalk.gradio_demo.replies.status import Meter


def context_meter(meter: Meter) -> str:
    """A bar of the context: from the cache, read anew, written, free."""
    if not meter.size:
        return ""
    parts = (
        ("cached", meter.cached, "from the cache"),
        ("read", meter.read, "read anew"),
        ("written", meter.written, "written"),
    )
    bars = "".join(
        f'<span class="rw-{name}" style="width:{100 * count / meter.size:.2f}%"></span>' for name, count, _ in parts
    )
    keys = "".join(f'<span class="rw-key rw-{name}">{count:,} {text}</span>' for name, count, text in parts)
    return (
        f'<div class="rw-meter" role="img" aria-label="{meter.used} of {meter.size} tokens of context used">'
        f'<div class="rw-bar">{bars}</div><div class="rw-keys">{keys}'
        f'<span class="rw-total">{meter.used:,} of {meter.size:,} tokens</span></div></div>'
    )
