"""model_bar/owner.py: who may change the shared model, and the options of the command that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo_session import VISITOR, embedded_session
from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.main import main
from ropewalk.gradio_demo.model_bar.owner import ABSENT_S, Owner
from ropewalk.gradio_demo.shared.access import EMBEDDED
from ropewalk.gradio_demo.shared.visitors import Visitor, visitor_of

FIRST, SECOND = Visitor("cookie 1", "tab 1"), Visitor("cookie 2", "tab 2")


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_visitor_owns_the_model_while_it_is_there() -> None:
    clock = Clock()
    owner = Owner(clock=clock)
    assert owner.may(FIRST) and not owner.may(SECOND)
    for _ in range(10):
        clock.now += ABSENT_S - 1
        assert owner.may(FIRST) and not owner.may(SECOND)
    assert owner.may(Visitor(FIRST.person, "another tab"))


def test_an_owner_who_left_is_followed_by_the_next_who_asks() -> None:
    clock = Clock()
    owner = Owner(clock=clock)
    assert owner.may(FIRST)
    clock.now += ABSENT_S + 1
    assert owner.may(SECOND) and not owner.may(FIRST)


def test_with_logins_those_named_may_and_a_cookie_of_that_name_does_not_help() -> None:
    owner = Owner(logins=["anna"])
    assert owner.may(visitor_of("anna", {}, "tab"))
    assert not owner.may(visitor_of("ben", {}, "tab"))
    assert not owner.may(visitor_of(None, {"ropewalk_visitor": "anna"}, "tab"))
    with pytest.raises(RequestError, match="only anna may change it"):
        owner.require(visitor_of("ben", {}, "tab"))


def test_anyone_may_where_that_was_asked_for() -> None:
    owner = Owner(anyone=True, logins=["anna"])
    assert owner.may(FIRST) and owner.may(SECOND)


def test_who_may_not_load_changes_nothing(tmp_path: Path) -> None:
    session = embedded_session(tmp_path, Owner(logins=["anna"]))
    loaded = session.workbench.loaded
    with pytest.raises(RequestError, match="only anna"):
        session.loading.load(VISITOR, EMBEDDED, {})
    with pytest.raises(RequestError, match="only anna"):
        session.loading.unload(VISITOR)
    assert "only anna" in session.layers.apply(VISITOR, "0-4,3-4").error
    assert session.workbench.loaded is loaded and session.layers.current() == "0-4"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--owner", "anna"], "--owner anna: give --auth anna:PASSWORD too"),
        (["--owner", "anna", "--auth", "ben:secret"], "--owner anna: give --auth anna:PASSWORD too"),
        (["--owner", "anna", "--auth", "anna:secret", "--anyone-may-load"], "cannot be used together"),
    ],
)
def test_options_that_name_nobody_are_explained(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    assert main(["demo", *options]) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "may"),
    [
        ([], {FIRST}),
        (["--anyone-may-load"], {FIRST, SECOND, Visitor("login anna", ""), Visitor("login ben", "")}),
        (["--auth", "anna:a", "--auth", "ben:b"], {Visitor("login anna", "")}),
        (["--auth", "anna:a", "--auth", "ben:b", "--owner", "ben"], {Visitor("login ben", "")}),
    ],
)
def test_the_options_decide_who_owns(options: list[str], may: set[Visitor], monkeypatch: pytest.MonkeyPatch) -> None:
    serving = pytest.importorskip("ropewalk.gradio_demo.serving")
    given = []
    monkeypatch.setattr(serving, "serve_demo", lambda *arguments: given.extend(arguments))
    assert main(["demo", *options]) == 0
    (owner,) = [argument for argument in given if isinstance(argument, Owner)]
    everybody = [FIRST, SECOND, Visitor("login anna", ""), Visitor("login ben", "")]
    assert {visitor for visitor in everybody if owner.may(visitor)} == may
