"""The demo page in a browser: every tab as a visitor uses it, in headless Chromium, and what the server refuses."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_session import copy_of_the_embedded_model, embedded_session

gradio = pytest.importorskip("gradio", reason="the page needs Gradio, which is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from ropewalk.gradio_demo.app import build_page  # noqa: E402
from ropewalk.gradio_demo.serving import Address, launch  # noqa: E402
from ropewalk.gradio_demo.session import Session  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE_MS = 60_000
TABS = ("Chat", "Notebook", "Ask documents", "Context lab", "Layers")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    root = tmp_path_factory.mktemp("page")
    session = embedded_session(root)
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


def gradio_access(session: Session):
    """The session's access with Gradio's folder of uploads."""
    from dataclasses import replace

    from gradio.utils import get_upload_folder

    return replace(session.workbench.access, uploads=Path(get_upload_folder()))


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
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


def opened(page: playwright.Page, url: str) -> None:
    page.goto(url)
    page.wait_for_function("document.querySelector('#template input')?.value")


def choose(page: playwright.Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).first.click()


def field(page: playwright.Page, name: str) -> playwright.Locator:
    return page.locator(f"#{name} textarea, #{name} input").first


def says(page: playwright.Page, name: str, text: str) -> str:
    """Wait until the element says `text`; all that it says."""
    page.locator(f"#{name}", has_text=re.compile(text)).first.wait_for()
    return page.locator(f"#{name}").first.inner_text()


def finished(page: playwright.Page, name: str) -> None:
    """Wait until the reply of this line is complete."""
    page.locator(f"#{name} .rw-line:not(.rw-running)", has_text="written").wait_for()


def ask(page: playwright.Page, question: str) -> str:
    """The reply, when it is complete."""
    before = page.locator("#chatbot .bot.message").count()
    field(page, "question").fill(question)
    page.click("#send")
    page.wait_for_function(f"document.querySelectorAll('#chatbot .bot.message').length > {before}")
    finished(page, "chat-line")
    return page.locator("#chatbot .bot.message").last.inner_text()


def reply_settings(page: playwright.Page, length: int, seed: int) -> None:
    field(page, "max-new-tokens").fill(str(length))
    field(page, "max-new-tokens").press("Enter")
    if not field(page, "seed").is_visible():
        page.get_by_text("Sampling", exact=True).first.click()
    field(page, "seed").fill(str(seed))


def test_the_page_loads_and_asks_no_other_host_for_anything(browser: playwright.Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, requests, problems = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened(page, url)
    for tab in TABS:
        choose(page, tab)
        page.wait_for_timeout(300)
    elsewhere = [asked for asked in requests if not asked.startswith((url, "data:", "blob:"))]
    context.close()
    assert requests and not elsewhere
    assert not problems
    assert "embedded model" in page_text_of(url)


def page_text_of(url: str) -> str:
    import httpx

    answer = httpx.get(url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    return answer.text


@pytest.fixture
def slow_model(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten milliseconds a token and more, so that a reply is still being written when a slow browser looks."""
    model = session.workbench.require().model
    forward = model.forward

    def slow_forward(*arguments, **options):
        time.sleep(0.01)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", slow_forward)


def longer_reply(page: playwright.Page, length: int) -> int:
    """Wait until the last reply has more than `length` characters; how many it has."""
    reply = "[...document.querySelectorAll('#chatbot .bot.message')].at(-1)?.innerText.trim().length"
    page.wait_for_function(f"length => ({reply} ?? 0) > length", arg=length)
    return page.evaluate(reply)


@pytest.mark.usefixtures("slow_model")
def test_a_reply_streams_and_can_be_stopped(page: playwright.Page) -> None:
    reply_settings(page, 1500, 1)
    field(page, "question").fill("def read_lines(path):")
    page.click("#send")
    longer_reply(page, longer_reply(page, 0))
    assert "written" in page.locator("#chat-line .rw-running").inner_text()
    page.click("#stop")
    says(page, "chat-line", "stopped")
    assert "from the cache" in says(page, "chat-meter", "of 2,048 tokens")


@pytest.mark.usefixtures("slow_model")
def test_a_reply_ends_when_its_reader_closes_the_page(browser: playwright.Browser, url: str, session: Session) -> None:
    """Others wait for its place. 1,900 tokens of the slow model would take 19 seconds and more."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    opened(page, url)
    reply_settings(page, 1900, 1)
    field(page, "question").fill("def read_lines(path):")
    page.click("#send")
    longer_reply(page, 0)
    queue = session.workbench.require().engine.queue
    assert queue.num_running == 1
    context.close()
    deadline = time.monotonic() + 15
    while queue.num_running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert queue.num_running == 0


def test_settings_change_the_result(page: playwright.Page) -> None:
    reply_settings(page, 16, 1)
    one = ask(page, "def read_lines(path):")
    assert "16 written" in page.inner_text("#chat-line")
    reply_settings(page, 16, 2)
    page.click("#again")
    page.wait_for_function("text => document.querySelector('#chatbot').innerText.indexOf(text) < 0", arg=one)
    finished(page, "chat-line")
    reply_settings(page, 16, 1)
    page.click("#again")
    page.wait_for_function("text => document.querySelector('#chatbot').innerText.indexOf(text) >= 0", arg=one)


def test_undo_gives_the_question_back(page: playwright.Page) -> None:
    reply_settings(page, 8, 1)
    ask(page, "class Queue:")
    page.click("#undo")
    page.wait_for_function("document.querySelector('#question textarea').value === 'class Queue:'")
    assert page.locator("#chatbot .bot.message").count() == 0


def test_a_reload_of_the_page_keeps_the_conversation_and_others_do_not_see_it(
    page: playwright.Page, browser: playwright.Browser, url: str
) -> None:
    reply_settings(page, 8, 1)
    reply = ask(page, "def only_mine(path):")
    opened(page, url)
    page.locator("#chatbot .bot.message").first.wait_for()
    assert page.locator("#chatbot .bot.message").last.inner_text() == reply
    assert "only_mine" in field(page, "conversations").input_value()
    other = browser.new_context()
    stranger = other.new_page()
    opened(stranger, url)
    stranger.wait_for_timeout(500)
    assert "only_mine" not in stranger.content()
    other.close()


def test_a_broken_folder_is_explained_and_the_old_model_still_answers(page: playwright.Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    field(page, "folder").fill("broken")
    field(page, "folder").press("Enter")
    page.click("#load")
    says(page, "load-problem", "model.safetensors")
    assert "embedded model" in page.inner_text("#status")
    reply_settings(page, 8, 1)
    assert ask(page, "def f():")


def test_a_folder_outside_is_refused_with_what_can_be_opened(page: playwright.Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    field(page, "folder").fill("/etc")
    field(page, "folder").press("Enter")
    says(page, "load-problem", "others may not be read")


def test_a_wrong_value_is_explained_at_its_field(page: playwright.Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    field(page, "field-max_seq_len").fill("many")
    field(page, "field-max_seq_len").press("Tab")
    says(page, "field-max_seq_len", "a number is needed, got 'many'")
    field(page, "field-max_seq_len").fill("2048")
    field(page, "field-max_seq_len").press("Tab")
    says(page, "field-max_seq_len", "Longest text in tokens")


def test_loading_with_another_context_changes_the_card(page: playwright.Page) -> None:
    page.get_by_text("Model and how it is loaded").click()
    field(page, "field-max_seq_len").fill("1024")
    page.click("#load")
    says(page, "card", "1,024 tokens")
    field(page, "field-max_seq_len").fill("2048")
    page.click("#load")
    says(page, "card", "2,048 tokens")


def test_the_notebook_shows_tokens_with_their_alternatives(page: playwright.Page) -> None:
    choose(page, "Notebook")
    page.click("#notebook-go")
    finished(page, "notebook-line")
    page.locator(".rw-token").nth(3).focus()
    assert page.locator(".rw-token").nth(3).locator("tr").count() == 5
    assert page.locator(".rw-token").nth(3).locator(".rw-alts").is_visible()


def test_a_question_is_asked_of_a_dropped_document(page: playwright.Page, tmp_path: Path) -> None:
    (tmp_path / "hemp.txt").write_text("Rope is made of hemp.")
    choose(page, "Ask documents")
    page.set_input_files("#documents-files input[type=file]", tmp_path / "hemp.txt")
    says(page, "documents-list", "hemp.txt")
    says(page, "documents-count", "tokens of 2,048, 128 kept for the answer: fits")
    field(page, "documents-question").fill("What is rope made of?")
    page.click("#documents-ask")
    says(page, "documents-sources", "hemp.txt")
    assert field(page, "documents-answer").input_value()


def test_the_context_lab_measures_to_its_plot(page: playwright.Page) -> None:
    choose(page, "Context lab")
    field(page, "lab-lengths").fill("64, 128")
    field(page, "lab-tokens").fill("2048")
    field(page, "lab-tokens").press("Enter")
    page.click("#lab-perplexity-go")
    page.locator("#lab-perplexity-plot svg").wait_for()
    assert "yarn" in page.inner_text("#lab-perplexity-plot")
    says(page, "lab-perplexity-progress", "done")


def test_a_layer_order_is_drawn_and_applied(page: playwright.Page, session: Session) -> None:
    choose(page, "Layers")
    field(page, "order").fill("0-4,3-4")
    page.wait_for_function("document.querySelectorAll('#order-picture .rw-layer').length === 7")
    page.click("#order-apply")
    says(page, "order-applied", "now runs 0-4,3-4")
    assert str(session.workbench.require().model.layer_order) == "0-4,3-4"
    page.click("#order-reset")
    page.wait_for_function("document.querySelectorAll('#order-picture .rw-layer').length === 5")
    page.click("#order-apply")
    says(page, "order-applied", "now runs 0-4.")


def test_nothing_is_wider_than_a_phone(browser: playwright.Browser, url: str) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 860})
    page = context.new_page()
    opened(page, url)
    page.get_by_text("Model and how it is loaded").click()
    for tab in TABS:
        if page.get_by_role("tab", name=tab, exact=True).first.is_visible():
            choose(page, tab)
        else:
            page.locator("#tabs .overflow-menu > button").first.click()
            page.locator("#tabs .overflow-dropdown button", has_text=tab).first.click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, tab
    context.close()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "{models}/broken/config.json", "{data}/conversations", "../../etc/passwd", "http://localhost"],
)
def test_the_server_hands_out_no_files(url: str, session: Session, path: str) -> None:
    import httpx

    root = session.exports.parent
    named = path.format(models=root / "models", data=root / "data")
    assert httpx.get(f"{url}gradio_api/file={named}").status_code in (403, 404)


def test_with_auth_nothing_is_shown_before_the_password(session: Session) -> None:
    import httpx

    page = build_page(session)
    url = launch(page, Address(auth=(("reader", "secret"),)))
    try:
        assert httpx.get(f"{url}config").status_code == 401
        wrong = httpx.post(f"{url}login", data={"username": "reader", "password": "guess"})
        right = httpx.post(f"{url}login", data={"username": "reader", "password": "secret"})
        assert (wrong.status_code, right.status_code) == (400, 200)
        assert httpx.get(f"{url}config", cookies=right.cookies).status_code == 200
    finally:
        page.close()


def test_a_taken_port_is_explained(url: str, session: Session) -> None:
    from ropewalk.base.errors import RequestError

    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(RequestError, match=f"port {port}"):
        launch(build_page(session), Address(port=port))


def test_the_page_listens_on_this_machine_only(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")


def test_a_dropped_folder_is_loaded(page: playwright.Page, tmp_path: Path) -> None:
    """The last one here: the page has another model from now on."""
    folder = copy_of_the_embedded_model(tmp_path / "dropped", max_position_embeddings=768)
    page.get_by_text("Model and how it is loaded").click()
    page.get_by_text("Or drop a model folder").click()
    page.locator("input[type=file][webkitdirectory]").first.set_input_files(folder)
    page.wait_for_function("document.querySelector('#folder input, #folder textarea')?.value.includes('dropped-')")
    page.click("#load")
    says(page, "status", "768 tokens of context")
    reply_settings(page, 8, 1)
    assert ask(page, "def f():")
