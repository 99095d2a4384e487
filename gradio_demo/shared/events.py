"""Events of the page: who sent one, and answers that leave alone what was typed meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ropewalk.gradio_demo.shared.visitors import Visitor, visitor_of

HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}  # events that only move things on the page

# In the browser, where nobody can type between the comparison and the change.
_FILL = """(answer, ...now) => now.map(
    (value, i) => (value ?? "") === (answer.before[i] ?? "") ? answer.after[i] : value)"""


def visitor(request: gr.Request) -> Visitor:
    """Who sent an event."""
    return visitor_of(request.username, request.cookies, request.session_hash)


class Filling:
    """New values for fields that people type in. The server's answer may come after somebody has begun to type. So it
    carries what the fields held before, and a field that holds something else by then is left alone."""

    def __init__(self, fields: Sequence[gr.components.Component]) -> None:
        self._fields = list(fields)
        self.answer = gr.JSON(visible=False)  # an output of the event, given a value of `answer_of`

    def after(self, event: Any) -> None:
        """Fill the fields when `event`, whose outputs hold `self.answer`, has finished."""
        event.then(None, [self.answer, *self._fields], self._fields, js=_FILL, **HIDDEN)


def answer_of(before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
    """The answer that a `Filling` takes: the values of its fields that may be replaced, and the new values."""
    return {"before": list(before), "after": list(after)}
