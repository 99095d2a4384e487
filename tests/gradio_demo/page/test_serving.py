"""What the page asks for, hands out and refuses, and how it fits a phone."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser

from demo_page import TABS, choose, opened
from ropewalk.base.errors import ConfigError, RequestError, RopewalkError
from ropewalk.gradio_demo.app import build_page
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.serving import Address, check_address, launch, serve_demo
from ropewalk.gradio_demo.session import Session


def test_the_page_loads_and_asks_no_other_host_for_anything(browser: Browser, url: str) -> None:
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
    answer = httpx.get(url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    return answer.text


def test_nothing_is_wider_than_a_phone(browser: Browser, url: str) -> None:
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
    root = session.exports.parent
    named = path.format(models=root / "models", data=root / "data")
    assert httpx.get(f"{url}gradio_api/file={named}").status_code in (403, 404)


def test_with_auth_nothing_is_shown_before_the_password(session: Session) -> None:
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
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(RequestError, match=f"port {port}"):
        launch(build_page(session), Address(port=port))
    with pytest.raises(ConfigError, match=f"--port {port} cannot be listened on: Address already in use"):
        check_address(Address(port=port))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (Address(port=99999), "--port must be from 0 to 65535, got 99999"),
        (Address(port=0), "--port must be from 1 on, got 0"),
        (Address(host="no-such-host.invalid"), "--host no-such-host.invalid --port 0 cannot be listened on: "),
        (Address(host="a..b"), "--host a..b --port 0 cannot be listened on: "),
        (Address(root_path="ropewalk"), "--root-path must begin with /, such as /ropewalk"),
    ],
)
def test_an_address_that_cannot_be_is_told_before_a_model_is_loaded(address: Address, message: str) -> None:
    with pytest.raises(RopewalkError, match=re.escape(message)):
        serve_demo(address, Path("absent"), None, Path("absent"), 1, Owner(), print)


def test_the_page_listens_on_this_machine_only(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")
