"""How the page is served: where, to whom, and what it may read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ropewalk.base.errors import RequestError
from ropewalk.base.listening import bound_socket
from ropewalk.engine.kept_folder import KeptFolder
from ropewalk.gradio_demo.app import build_page
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.session import make_session
from ropewalk.gradio_demo.shared.access import EMBEDDED, MAX_UPLOAD_BYTES, Access
from ropewalk.gradio_demo.shared.visitors import VisitorCookie
from ropewalk.gradio_demo.theme import make_theme

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")
WORKERS = 64  # each running reply, measurement and load takes one while it lasts
# What Gradio remembers of a page takes half a MiB, and Gradio cannot tell a closed page from a quiet one. So it keeps
# the pages that asked last: open ones ask for news every two seconds.
OPEN_PAGES = 128


@dataclass(frozen=True, slots=True)
class Address:
    """Where the page is served. port: None takes the first free one from 7860; auth: (user, password) pairs."""

    host: str = "127.0.0.1"
    port: int | None = None
    root_path: str | None = None
    auth: tuple[tuple[str, str], ...] = ()
    in_browser: bool = False


def serve_demo(
    address: Address,
    model: Path | None,
    models: Path | None,
    data: Path,
    max_running: int,
    owner: Owner,
    note: Callable[[str], None],
    kept_folder: KeptFolder | None = None,
) -> None:
    """Load a model and serve the page until interrupted.

    Raises:
        RequestError, ConfigError: as `check_address`. FieldError: the model cannot be loaded.
    """
    check_address(address)
    granted = () if model is None else (model.resolve(),)
    access = Access(None if models is None else models.resolve(), granted, Path(get_upload_folder()))
    with tempfile.TemporaryDirectory(prefix="ropewalk-demo-") as exports:
        session = make_session(access, data, Path(exports), max_running, owner, kept_folder)
        name = EMBEDDED if model is None else str(granted[0])
        session.workbench.load(name, asdict(session.workbench.suggest(name)))
        page = build_page(session)
        note(f"Documents that are read once are kept in {session.shelf.folder.folder}")
        note(f"The page is at {launch(page, address)} (Ctrl-C ends it)")
        page.block_thread()


def check_address(address: Address) -> None:
    """Find out before a model is loaded that the page could not be served there.

    Raises:
        RequestError: a wrong root path, or port 0, which Gradio does not take. ConfigError: as `bound_socket`.
    """
    path = address.root_path
    if path is not None and not path.startswith(("/", "http://", "https://")):
        raise RequestError(f"--root-path must begin with /, such as /ropewalk, or be a whole URL, got {path!r}")
    if address.port == 0:
        raise RequestError("--port must be from 1 on, got 0: without it the first free one from 7860 is taken")
    bound_socket(address.host.strip("[]"), address.port or 0).close()


def launch(page: gr.Blocks, address: Address) -> str:
    """Serve the page in the background, and return the address to open.

    Raises:
        RequestError: the port is taken.
    """
    page.queue(default_concurrency_limit=None)
    try:
        _, local_url, _ = page.launch(
            server_name=address.host,
            server_port=address.port,
            root_path=address.root_path,
            auth=list(address.auth) or None,
            inbrowser=address.in_browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            max_threads=WORKERS,
            state_session_capacity=OPEN_PAGES,
            max_file_size=MAX_UPLOAD_BYTES,
            theme=make_theme(),
            css_paths=[STYLE],
            head=f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
            app_kwargs={"middleware": [Middleware(VisitorCookie)]},
        )
    except OSError as error:
        raise RequestError(f"the page cannot be served at {address.host}, port {address.port}: {error}") from error
    return local_url
