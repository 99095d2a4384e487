"""The document with its marks, an answer with its verdict, and stored plots, as HTML. All text is escaped."""

from __future__ import annotations

from html import escape

from ropewalk.gradio_demo.tour.behaviour import AnswerView, OpenTour


def document_picture(opened: OpenTour | None, is_scaled: bool, passage: str = "") -> str:
    """The document to scroll in, with a line where the length of the training ends, and a passage marked. What lies
    beyond the line is grey while the scaling is off."""
    if opened is None:
        return ""
    document, cut = opened.tour.document, opened.trained
    start = document.find(passage) if passage else len(document)
    end = start + len(passage)
    parts = [_marked(document, *part, start, end) for part in ((0, cut), (cut, len(document)))]
    length, tokens = opened.readers.plain.rope.original_length, opened.tour.measured.tokens
    line = f'<p class="rw-trained"><span>{length:,} tokens: the model was trained on no more</span></p>'
    rest = "rw-known" if is_scaled else "rw-unseen"
    return (
        f"<h3>{escape(opened.tour.title)}</h3>"
        f'<div class="rw-document" tabindex="0" role="region" aria-label="{escape(opened.tour.title)}">'
        f'<div>{parts[0]}</div>{line}<div class="{rest}">{parts[1]}</div></div>'
        f'<p class="rw-line">{tokens:,} tokens, {tokens / length:.1f} times as many as the model was trained on</p>'
    )


def _marked(text: str, first: int, last: int, start: int, end: int) -> str:
    """Characters first..last-1 of a text, those of start..end-1 among them marked."""
    inside = max(first, min(start, last)), max(first, min(end, last))
    before, within, after = text[first : inside[0]], text[inside[0] : inside[1]], text[inside[1] : last]
    mark = f"<mark>{escape(within)}</mark>" if within else ""
    return f"{escape(before)}{mark}{escape(after)}"


def answer_picture(question: str, view: AnswerView) -> str:
    """The question, what the model says, and whether that is what the text says."""
    said = escape(view.text) or "…"
    verdict = ""
    if view.right is not None:
        kind, mark = ("rw-right", "✓ right") if view.right else ("rw-false", "✗ wrong")
        expected = "" if view.right else f" <span>The text says: {escape(view.expected)}</span>"
        verdict = f'<p class="rw-verdict {kind}"><b>{mark}</b>{expected}</p>'
    return (
        f'<div class="rw-answer"><p class="rw-line">{escape(question)}</p><p class="rw-said">{said}</p>{verdict}</div>'
    )


def why_line(text: str) -> str:
    """Why it goes as it does."""
    return f'<p class="rw-why">{escape(text)}</p>' if text else ""


def plots_picture(opened: OpenTour | None) -> str:
    """What was measured when the model was made, side by side where there is room."""
    if opened is None or not opened.plots:
        return ""
    figures = "".join(f'<div class="rw-plot">{svg}</div>' for svg in opened.plots)
    found = opened.tour.measured
    chosen = (
        f"The document was chosen among {found.documents:,}: of {found.questions:,} questions that were tried, "
        f"{found.right_scaled:,} were answered right with the scaling, and {found.right_plain:,} without."
    )
    return (
        "<h3>Measured when the model was made</h3>"
        f'<div class="rw-plots">{figures}</div><p class="rw-line">{escape(chosen)}</p>'
    )
