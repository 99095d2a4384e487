"""gradio_demo/chat/conversations.py: what is saved comes back, any file is read or refused, nothing gets lost."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.base.errors import RequestError
from ropewalk.gradio_demo.chat.conversations import Conversation, ConversationStore, Turn, read_conversation

TURNS = st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), st.text(), st.text()), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "format",
                    "turns",
                    "messages",
                    "role",
                    "content",
                    "system",
                    "template",
                    "id",
                    "created",
                    "updated",
                    "note",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(TURNS, st.text(), st.text())
def test_an_exported_conversation_is_read_back_as_it_was(turns: list[Turn], system: str, template: str) -> None:
    conversation = Conversation(tuple(turns), system, template)
    assert read_conversation(conversation.to_json(), "file") == conversation


@given(JSON)
def test_any_json_is_read_or_refused_with_the_name_of_the_file(data: object) -> None:
    try:
        conversation = read_conversation(json.dumps(data), "my file")
    except RequestError as error:
        assert "my file" in str(error)
    else:
        assert read_conversation(conversation.to_json(), "file") == conversation


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_conversation(text, "my file")
    except RequestError as error:
        assert "my file" in str(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("3", "must hold an exported conversation or a list of messages, found 3"),
        ('{"format": 2}', "format 2 is not known, 1 is"),
        ("{}", "turns must be a list of messages, found None"),
        ('[{"role": "tool", "content": ""}]', "message 1 must have a role, user or assistant"),
        ('[{"role": "user", "content": 3}]', "content of message 1 must be text, found 3"),
        ('{"turns": [], "system": 3}', "system must be text"),
    ],
)
def test_a_file_of_another_form_is_refused_with_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read_conversation(text, "file")


def test_half_of_a_character_is_refused_before_the_page_has_it() -> None:
    text = json.dumps([{"role": "user", "content": "a \ud800 b"}, {"role": "assistant", "content": "x"}])
    with pytest.raises(RequestError, match="content of message 1 has an unpaired surrogate at character 2"):
        read_conversation(text, "my file")


def test_a_list_of_messages_is_read_with_its_system_text() -> None:
    text = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    conversation = read_conversation(text, "file")
    assert (conversation.system, conversation.turns) == ("Be brief.", (Turn("user", "Hello"),))
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}


def test_a_conversation_without_turns_leaves_no_file(tmp_path: Path) -> None:
    store, conversation = ConversationStore(tmp_path), said("taken back")
    store.save("me", conversation)
    store.save("me", replace(conversation, turns=()))
    assert store.list("me") == [] and list(tmp_path.rglob("*.json")) == []
    assert store.find("me", conversation.id) is None


def test_a_folder_that_cannot_be_written_is_told_without_its_place(tmp_path: Path) -> None:
    (tmp_path / "conversations").write_text("a file where the folder should be")
    store = ConversationStore(tmp_path)
    for act in (lambda: store.save("me", said("lost")), lambda: store.delete("me", said("kept").id)):
        with pytest.raises(RequestError, match="the conversation cannot be (saved|deleted): Not a directory") as caught:
            act()
        assert str(tmp_path) not in str(caught.value)
    assert store.list("me") == [] and store.current("me").turns == ()


def test_people_have_conversations_of_their_own(tmp_path: Path) -> None:
    store, mine, yours = ConversationStore(tmp_path), said("mine"), said("yours")
    store.save("me", mine)
    store.save("you", yours)
    assert store.list("me") == [mine]
    with pytest.raises(RequestError, match="deleted in another tab") as caught:
        store.load("you", mine.id)
    assert str(tmp_path) not in str(caught.value)


def test_names_of_people_and_ids_lead_to_no_other_place(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path)
    store.save("../../elsewhere/\0", said("here"))
    assert [path.name for path in tmp_path.iterdir()] == ["conversations"]
    for bad in ("../x", "", "A" * 32, "0" * 31, None):
        with pytest.raises(RequestError, match="is not the id of a conversation"):
            store.load("me", bad)


def test_the_conversation_open_last_is_open_again_after_a_restart(tmp_path: Path) -> None:
    first, second = said("1"), said("2")
    ConversationStore(tmp_path).save("me", first)
    ConversationStore(tmp_path).save("me", second)
    ConversationStore(tmp_path).set_current("me", first.id)
    assert ConversationStore(tmp_path).current("me") == first
    assert ConversationStore(tmp_path).current("you").turns == ()


def test_a_process_killed_while_writing_leaves_the_conversation_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, conversation = ConversationStore(tmp_path), said("kept")
    store.save("me", conversation)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.save("me", conversation.with_turn(Turn("assistant", "lost")))
    assert store.list("me") == [conversation]


def test_a_damaged_file_hides_no_other_conversation(tmp_path: Path) -> None:
    store, whole, damaged = ConversationStore(tmp_path), said("whole"), said("damaged")
    store.save("me", whole)
    store.save("me", damaged)
    next(tmp_path.rglob(f"{damaged.id}.json")).write_text("{")
    assert store.list("me") == [whole]
    assert store.current("me").turns == ()


def test_only_this_user_can_read_the_folder(tmp_path: Path) -> None:
    ConversationStore(tmp_path).save("me", said("mine"))
    folder = next(tmp_path.rglob("*.json")).parent
    assert folder.stat().st_mode & 0o077 == 0


def said(text: str) -> Conversation:
    """A conversation of one question."""
    return Conversation((Turn("user", text),))
