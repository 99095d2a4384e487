"""The rooms of the page: imports point one way, tabs do not know each other, few files know Gradio."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ropewalk.gradio_demo

FOLDER = Path(ropewalk.gradio_demo.__file__).parent
PACKAGE = "ropewalk.gradio_demo"
TABS = {"tour", "chat", "notebook", "documents", "context_lab", "layers"}
BELOW_TABS = ("shared", "model_bar", "replies")  # each after those that it may import from
TOP = {"session", "app", "serving", "theme"}
# Layouts stand on behaviour, through the session that holds all of it; behaviour knows no layout.
GRADIO = {
    *("app.py", "serving.py", "theme.py", "shared/events.py", "model_bar/layout.py", "replies/layout.py"),
    *(f"{tab}/layout.py" for tab in TABS),
    *("chat/controls.py", "documents/shelf.py"),
}


def imports_of(path: Path) -> set[str]:
    """The full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = {str(path.relative_to(FOLDER)): imports_of(path) for path in sorted(FOLDER.rglob("*.py"))}


def modules_of_the_page(names: set[str]) -> set[str]:
    """Those of the page among imported names, as files."""
    inner = {name.removeprefix(f"{PACKAGE}.").replace(".", "/") + ".py" for name in names if name.startswith(PACKAGE)}
    return inner & set(FILES)


def room(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def allowed_rooms(file: str) -> set[str]:
    own = room(file)
    if own in BELOW_TABS:
        rooms = set(BELOW_TABS[: BELOW_TABS.index(own) + 1])
    elif own in TABS:
        rooms = {*BELOW_TABS, own}
    else:
        rooms = {*BELOW_TABS, *TABS, *TOP}
    return rooms | ({"session"} if file in GRADIO - {"shared/events.py"} else set())


def test_every_file_is_in_a_room() -> None:
    assert {room(file) for file in FILES} == {*BELOW_TABS, *TABS, *TOP, "__init__"}


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_file_imports_only_from_its_room_and_those_below(file: str) -> None:
    for imported in modules_of_the_page(FILES[file]):
        assert room(imported) in allowed_rooms(file), f"{file} imports {imported}"
        if file not in GRADIO:
            assert imported not in GRADIO, f"{file} behaves, and imports the layout {imported}"


def test_gradio_is_known_to_the_layouts_alone() -> None:
    knowing = {file for file, names in FILES.items() if any(name.split(".")[0] == "gradio" for name in names)}
    assert knowing == GRADIO


def test_every_tab_has_its_behaviour_and_layout_side_by_side() -> None:
    for tab in TABS:
        assert {f"{tab}/behaviour.py", f"{tab}/layout.py"} <= set(FILES)


def test_the_session_needs_no_gradio() -> None:
    program = f"import sys; sys.modules['gradio'] = None; import {PACKAGE}.session"
    subprocess.run([sys.executable, "-c", program], check=True)
