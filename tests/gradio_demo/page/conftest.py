"""A page with the embedded model for each test module, and a browser."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio, which is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from demo_page import CHROMIUM, FLAGS, PATIENCE_MS, gradio_access, opened  # noqa: E402
from demo_session import copy_of_the_embedded_model, embedded_session  # noqa: E402
from quiet_network import quiet_network  # noqa: E402
from ropewalk.gradio_demo.app import build_page  # noqa: E402
from ropewalk.gradio_demo.model_bar.owner import Owner  # noqa: E402
from ropewalk.gradio_demo.serving import Address, launch  # noqa: E402
from ropewalk.gradio_demo.session import Session  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    """Its own for the page and the browser."""
    with quiet_network():
        yield


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Every test is a visitor of its own, so everybody may load."""
    root = tmp_path_factory.mktemp("page")
    session = embedded_session(root, Owner(anyone=True))
    broken = copy_of_the_embedded_model(root / "models" / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    return session


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    """The page, served in the background. What Gradio is told about uploads is checked where they are read."""
    session.workbench.access = gradio_access(session)
    page = build_page(session)
    yield launch(page, Address())
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    """For the tests of a module: while it runs, no other test could run an event loop of its own."""
    if CHROMIUM is None:
        pytest.skip("no chromium was found: install the package chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: playwright.Browser, url: str) -> Iterator[playwright.Page]:
    """The page as a new visitor opens it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    opened(page, url)
    yield page
    context.close()


@pytest.fixture
def endless_replies(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model answers in a few words, and a reply that is watched is to be as long as the page asks for."""
    monkeypatch.setattr(session.workbench.require().engine, "end_token_ids", ())


@pytest.fixture
def slow_model(endless_replies: None, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten milliseconds a token and more, so that a reply is still being written when a slow browser looks."""
    model = session.workbench.require().model
    forward = model.forward

    def slow_forward(*arguments, **options):
        time.sleep(0.01)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", slow_forward)
