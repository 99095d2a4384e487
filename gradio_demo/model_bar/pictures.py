"""The loaded model as HTML: one line of status, the queue, the card of what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ropewalk.backends.cpu import CpuBackend
from ropewalk.backends.protocol import Backend
from ropewalk.base.memory import format_bytes
from ropewalk.containers.choice import container_of
from ropewalk.files.names import shown_name
from ropewalk.gradio_demo.model_bar.workbench import Loaded


def status_line(loaded: Loaded | None) -> str:
    """Which model answers, in one line."""
    if loaded is None:
        return '<p class="rw-status">No model is loaded. Open the model bar to load one.</p>'
    model = loaded.model
    parts = [
        f"<b>{escape(_short_name(loaded))}</b>",
        escape(weights_kind(loaded)),
        f"{model.max_seq_len:,} tokens of context",
        escape(rope_name(loaded)),
    ]
    note = (
        '<span class="rw-note">A tiny model that finds answers in a text in front of it, in simple English, and knows '
        "nothing else. Load a GPTQ folder to talk with something clever.</span>"
    )
    return f'<p class="rw-status">{" · ".join(parts)}{note if loaded.is_embedded else ""}</p>'


def queue_line(loaded: Loaded | None) -> str:
    """How busy the model is with everybody's replies; nothing while it is idle."""
    if loaded is None or not loaded.engine.queue.num_running:
        return ""
    queue = loaded.engine.queue
    return (
        f'<p class="rw-line rw-queue rw-running">{queue.num_running} of {queue.num_turns} places answering, '
        f"{queue.num_waiting} waiting</p>"
    )


def note_line(text: str) -> str:
    """What a visitor should know about the model bar; nothing for an empty text."""
    return f'<p class="rw-line">{escape(text)}</p>' if text else ""


def model_card(loaded: Loaded | None) -> str:
    """What was decided when the model was loaded."""
    if loaded is None:
        return '<p class="rw-empty">No model is loaded.</p>'
    info, model = loaded.info, loaded.model
    rows = [
        ("Family", f"{info.family}, {info.num_layers} layers, {info.num_heads} heads ({info.num_kv_heads} for keys)"),
        ("Weights", ", ".join(f"{count} linears {kind}" for kind, count in info.linears.items())),
        ("Format", _format_row(loaded)),
        ("RoPE", info.rope.removeprefix("RoPE scaling: ").split("; decided by")[0]),
        ("Decided by", info.rope_decided_by),
        ("Context", f"{model.max_seq_len:,} tokens, read in chunks of {model.max_input_len:,}"),
        ("Layers run", f"{model.layer_order} ({len(model.instances)} in all)"),
        ("Computes", _computes_row(model.backend)),
        (
            "Memory",
            f"weights {format_bytes(model.weight_bytes)}, {model.cache_type} cache up to "
            f"{format_bytes(model.cache_memory)}, of which a full context takes "
            f"{format_bytes(model.cache_bytes(model.max_seq_len))}",
        ),
        ("Guesses ahead", loaded.engine.speculation or "no"),
    ]
    return table(rows)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f'<dl class="rw-card">{cells}</dl>'


def weights_kind(loaded: Loaded) -> str:
    """ "4-bit GPTQ", or how else the weights are stored."""
    quant = loaded.model.quant
    return "dense weights" if quant is None else f"{quant.default.bits}-bit {container_of(quant).title}"


def rope_name(loaded: Loaded) -> str:
    """ "yarn ×4": the scaling in use."""
    method = loaded.model.rope.method
    amount = getattr(method, "alpha", None) or getattr(method, "factor", None)
    if method.name == "none":
        return "no RoPE scaling"
    return f"RoPE {method.name}" + (f" ×{amount:g}" if amount else "")


def _short_name(loaded: Loaded) -> str:
    return loaded.name if loaded.is_embedded else shown_name(loaded.folder)


def _computes_row(backend: Backend) -> str:
    if isinstance(backend, CpuBackend):
        return f"{backend.compute} on {backend.runtime.threads} threads, {backend.runtime.isa}"
    return f"{backend.compute} on {backend.name} ({backend.device})"


def _format_row(loaded: Loaded) -> str:
    info = loaded.info
    if info.format is None:
        return "not quantised"
    order = "act-order" if info.act_order else "rows in order"
    return f"{info.format}, {order}, {'symmetric' if info.symmetric else 'asymmetric'}"
