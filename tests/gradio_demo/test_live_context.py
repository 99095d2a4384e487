"""The page while a conversation is open: another RoPE for the model, and a window that is full."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from demo_session import GREEDY, VISITOR, asked, embedded_session, empty_session, values
from ropewalk.base.errors import RequestError
from ropewalk.gradio_demo.chat.conversations import Conversation
from ropewalk.gradio_demo.model_bar.settings import FieldError
from ropewalk.gradio_demo.replies.request import SHIFT
from ropewalk.gradio_demo.replies.templates import PLAIN


def read_of(line: str) -> int:
    """The prompt tokens that the line under a reply says were read."""
    return int(re.search(r"(\d+) read at", line).group(1))


def test_a_full_window_is_shifted_and_the_line_says_so(tmp_path: Path) -> None:
    session = embedded_session(tmp_path, max_seq_len="256")
    conversation, shifted = Conversation(template=PLAIN, system="Write Python."), 0
    for number in range(16):
        question = f"def function_{number}(path, mode):"
        view = list(session.chats.ask(VISITOR, conversation, question, replace(GREEDY, overflow=SHIFT)))[-1]
        conversation = view.conversation
        assert view.error is None
        if "of them shifted" in view.line:
            shifted += 1
            assert read_of(view.line) < 60 and "oldest messages left out" in view.line
    assert shifted >= 2


@pytest.mark.parametrize("mode", ["rotate", "recompute"])
def test_the_rope_of_the_loaded_model_changes_while_a_conversation_is_open(tmp_path: Path, mode: str) -> None:
    session = embedded_session(tmp_path)
    conversation = asked(session, "def read_lines(path):" + " # of which there are many" * 20)
    engine = session.workbench.require().engine
    changed = values(session, rope_method="linear", rope_factor="2", max_seq_len="2048")
    loaded = session.loading.rescale(VISITOR, changed, mode)
    assert loaded.engine is engine and loaded.model.rope.method.name == "linear"
    assert "linear" in loaded.info.rope and loaded.settings.rope_factor == 2.0
    view = list(session.chats.ask(VISITOR, conversation, "def write_lines(path):", GREEDY))[-1]
    reused = int(re.search(r"(\d+) from the cache", view.line).group(1))
    assert view.error is None and (reused > 0) == (mode == "rotate")


def test_a_change_that_cannot_be_made_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    session = embedded_session(tmp_path)
    rope = session.workbench.require().model.rope
    for changes, field in (
        ({"rope_method": "yarn", "rope_factor": ""}, "rope_factor"),
        ({"rope_method": "yarn", "rope_factor": "many"}, "rope_factor"),
        ({"max_seq_len": "4000000"}, "max_seq_len"),
    ):
        with pytest.raises(FieldError) as caught:
            session.loading.rescale(VISITOR, values(session, **changes), "rotate")
        assert caught.value.field in (field, "cache_memory")
        assert session.workbench.require().model.rope == rope
    with pytest.raises(RequestError, match="no model is loaded"):
        empty_session(tmp_path / "other").workbench.rescale(values(session), "rotate")


def test_the_automatic_choice_is_one_of_the_methods(tmp_path: Path) -> None:
    session = embedded_session(tmp_path, rope_method="auto", rope_factor="", max_seq_len="1024")
    assert session.workbench.require().model.rope.decided_by.startswith("rope_scaling=auto")
