"""The page: its parts from top to bottom."""

from __future__ import annotations

import gradio as gr

from ropewalk.gradio_demo.chat.layout import build_chat
from ropewalk.gradio_demo.context_lab.layout import build_context_lab
from ropewalk.gradio_demo.documents.layout import build_documents
from ropewalk.gradio_demo.layers.layout import build_layers
from ropewalk.gradio_demo.model_bar.layout import build_model_bar
from ropewalk.gradio_demo.notebook.layout import build_notebook
from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.tour.layout import build_tour

CACHE_S = 24 * 3600  # uploads and exports are deleted after a day


def build_page(session: Session) -> gr.Blocks:
    """All parts of the page."""
    page = gr.Blocks(title="ropewalk", analytics_enabled=False, delete_cache=(CACHE_S, CACHE_S), fill_width=True)
    with page:
        bar = build_model_bar(session, page)
        has_tour = session.tours.current() is not None
        with gr.Tabs(elem_id="tabs", selected="tour" if has_tour else "chat") as tabs:
            with gr.Tab("Tour", id="tour", visible=has_tour) as tour:
                build_tour(session, bar, tabs, tour)
            with gr.Tab("Chat", id="chat"):
                build_chat(session, bar, page)
            with gr.Tab("Notebook", id="notebook"):
                build_notebook(session, bar)
            with gr.Tab("Ask documents", id="documents"):
                build_documents(session, bar, page)
            with gr.Tab("Context lab", id="lab"):
                build_context_lab(session, bar)
            with gr.Tab("Layers", id="layers"):
                build_layers(session, bar)
    return page
