"""What several parts of the page need."""

from __future__ import annotations

import gradio as gr

from ropewalk.gradio_demo.shared.visitors import Visitor, visitor_of

HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}  # events that only move things on the page


def visitor(request: gr.Request) -> Visitor:
    """Who sent an event."""
    return visitor_of(request.username, request.cookies, request.session_hash)
