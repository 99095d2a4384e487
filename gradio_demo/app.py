"""The page: its parts from top to bottom, and how it is served."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from ropewalk.gradio_demo.session import Session
from ropewalk.gradio_demo.tabs.chat import build_chat
from ropewalk.gradio_demo.tabs.model_bar import build_model_bar
from ropewalk.gradio_demo.theme import make_theme
from ropewalk.gradio_demo.visitors import VisitorCookie

STYLE = Path(__file__).with_name("style.css")
HEAD = '<div class="rw-head"><h1>ropewalk</h1><span>GPTQ models at long context, on this machine</span></div>'
CACHE_S = 24 * 3600  # uploads and exports are deleted after a day
MAX_UPLOAD = "64gb"
WORKERS = 64  # each running reply, measurement and load takes one while it lasts


@dataclass(frozen=True, slots=True)
class Address:
    """Where the page is served. auth: (user, password) pairs, or none."""

    host: str = "127.0.0.1"
    port: int | None = 7860
    root_path: str | None = None
    auth: Sequence[tuple[str, str]] = ()
    in_browser: bool = False


def build_page(session: Session) -> gr.Blocks:
    """All parts of the page."""
    page = gr.Blocks(title="ropewalk", analytics_enabled=False, delete_cache=(CACHE_S, CACHE_S), fill_width=True)
    with page:
        gr.HTML(HEAD)
        bar = build_model_bar(session)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat", id="chat"):
                build_chat(session, bar, page)
    return page


def serve(page: gr.Blocks, address: Address, block: bool = True) -> str:
    """Serve until interrupted, or in the background; the address to open."""
    page.queue(default_concurrency_limit=None)
    _, local_url, _ = page.launch(
        server_name=address.host,
        server_port=address.port,
        root_path=address.root_path,
        auth=list(address.auth) or None,
        inbrowser=address.in_browser,
        share=False,
        quiet=True,
        prevent_thread_lock=not block,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_threads=WORKERS,
        max_file_size=MAX_UPLOAD,
        theme=make_theme(),
        css_paths=[STYLE],
        app_kwargs={"middleware": [Middleware(VisitorCookie)]},
    )
    return local_url


def uploads_folder() -> Path:
    """Where Gradio keeps what is dropped on the page."""
    return Path(gr.utils.get_upload_folder() if hasattr(gr.utils, "get_upload_folder") else tempfile.gettempdir())
