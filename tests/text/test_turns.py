"""Conversations in the orders that role-playing programs send: the exact prompts of every named format, and what a
model's own template gets after it refuses them."""

from __future__ import annotations

import logging

import pytest

from ropewalk.base.errors import RequestError
from ropewalk.text.chat import ChatTemplate, named_template
from ropewalk.text.chat_formats import NAMED_FORMATS

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """(the first letter of a role, content) as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[role], "content": content} for role, content in turns]


# What a role-playing program sends: prompts, a greeting, questions, and a last instruction.
PLAY = talk(
    ("s", "You are Ann."),
    ("s", "Ann likes tea."),
    ("s", ""),
    ("a", "Hello!"),
    ("u", "Hi."),
    ("u", "Tea?"),
    ("a", "Yes."),
    ("s", "It rains."),
    ("u", "Go on."),
    ("s", "Stay in character."),
)
PLAYED = {
    "vicuna": "You are Ann.\n\nAnn likes tea. ASSISTANT: Hello!</s>USER: Hi.\n\nTea? ASSISTANT: Yes.</s>It rains. "
    "USER: Go on. Stay in character. ASSISTANT:",
    "airoboros": "You are Ann.\n\nAnn likes tea. ASSISTANT: Hello!</s>USER: Hi.\n\nTea? ASSISTANT: Yes.</s>It rains. "
    "USER: Go on. Stay in character. ASSISTANT:",
    "llama-2": "<s>[INST] <<SYS>>\nYou are Ann.\n\nAnn likes tea.\n<</SYS>>\n\n [/INST] Hello! </s>"
    "<s>[INST] Hi.\n\nTea? [/INST] Yes. </s><s>[INST] It rains.\n\nGo on.\n\nStay in character. [/INST]",
    "alpaca": "You are Ann.\n\nAnn likes tea.\n\n### Response:\nHello!</s>\n\n### Instruction:\nHi.\n\nTea?\n\n"
    "### Response:\nYes.</s>\n\nIt rains.\n\n### Instruction:\nGo on.\n\nStay in character.\n\n### Response:\n",
    "plain": "You are Ann.\n\nAnn likes tea.\n\nAssistant: Hello!\nUser: Hi.\n\nTea?\nAssistant: Yes.\nIt rains.\n"
    "User: Go on.\nStay in character.\nAssistant:",
    "text": "You are Ann.\nAnn likes tea.\n\nHello!\nHi.\nTea?\nYes.\nIt rains.\nGo on.\nStay in character.\n",
}


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_a_named_format_takes_what_role_playing_programs_send(name: str) -> None:
    assert named_template(name, TOKENS).render(PLAY) == PLAYED[name]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (talk(("a", "Hello!")), "<s>[INST]  [/INST] Hello! </s>"),
        (talk(("u", "")), "<s>[INST]  [/INST]"),
        (
            talk(
                ("s", "Be."),
            ),
            "<s>[INST] <<SYS>>\nBe.\n<</SYS>>\n\n [/INST]",
        ),
        (talk(("u", "a"), ("s", "b"), ("a", "c"), ("s", "d")), "<s>[INST] a\n\nb [/INST] c </s><s>[INST] d [/INST]"),
        (talk(("u", "a"), ("u", " \n"), ("u", "b")), "<s>[INST] a\n\nb [/INST]"),
        (talk(("u", "a"), ("a", ""), ("u", "b")), "<s>[INST] a\n\nb [/INST]"),
        (talk(("u", "a"), ("a", "b"), ("a", "c"), ("u", "d")), "<s>[INST] a [/INST] b\n\nc </s><s>[INST] d [/INST]"),
    ],
)
def test_llama_2_is_given_alternating_turns_in_any_case(messages: list[dict[str, str]], expected: str) -> None:
    assert named_template("llama-2", TOKENS).render(messages) == expected


@pytest.mark.parametrize("name", sorted(set(NAMED_FORMATS) - {"llama-2"}))
def test_the_assistants_turn_is_opened_only_where_asked(name: str) -> None:
    template = named_template(name, TOKENS)
    whole, cut = (template.render(PLAY, add_generation_prompt=prompted) for prompted in (True, False))
    assert whole.startswith(cut)
    assert whole[len(cut) :] in ("ASSISTANT:", "### Response:\n", "Assistant:", "")


@pytest.mark.parametrize("name", NAMED_FORMATS)
@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool", "content": "4"}, "message 2 has the role \"?'?tool.* knows system, user, assistant"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "message 2 .*must have text as content"),
        ({"role": "assistant", "tool_calls": []}, "message 2 .*must have text as content"),
    ],
)
def test_what_a_named_format_cannot_write_is_refused_by_its_message(name: str, message: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        named_template(name, TOKENS).render([{"role": "user", "content": "a"}, message])


# Templates of real models refuse in these ways.
ALTERNATING = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set rest = messages[1:] %}{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}[{{ system if loop.first }}|{{ m.role }}:{{ m.content }}]
{%- endfor %}"""
WITHOUT_SYSTEM = """{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- m.role }}:{{ m.content }};
{%- endfor %}"""
SYSTEM_FIRST = """{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}
{{- raise_exception('System message must be at the beginning.') }}{% endif %}
{{- m.role }}:{{ m.content }};
{%- endfor %}"""


def test_equal_roles_in_a_row_are_joined_for_a_template_that_wants_turns() -> None:
    assert ChatTemplate(ALTERNATING, "x").render(PLAY) == (
        "[You are Ann.\n\nAnn likes tea.|user:][|assistant:Hello!][|user:Hi.\n\nTea?][|assistant:Yes.]"
        "[|user:It rains.\n\nGo on.\n\nStay in character.]"
    )


def test_system_texts_become_the_users_for_a_template_that_takes_none() -> None:
    assert ChatTemplate(WITHOUT_SYSTEM, "x").render(PLAY) == (
        "user:You are Ann.\n\nAnn likes tea.;assistant:Hello!;user:Hi.\n\nTea?;assistant:Yes.;"
        "user:It rains.\n\nGo on.\n\nStay in character.;"
    )
    assert ChatTemplate(WITHOUT_SYSTEM, "x").render(talk(("s", "Be."), ("u", "Hi"))) == "user:Be.\n\nHi;"


def test_later_system_texts_become_the_users_where_only_the_first_is_taken() -> None:
    messages = talk(("s", "Be."), ("u", "Hi"), ("a", "Yo"), ("s", "Rain."), ("u", "Go"))
    expected = "system:Be.;user:Hi;assistant:Yo;user:Rain.\n\nGo;"
    assert ChatTemplate(SYSTEM_FIRST, "x").render(messages) == expected


def test_a_conversation_that_the_template_takes_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    messages = talk(("s", "a"), ("u", "b"), ("u", ""), ("u", "c"))
    assert ChatTemplate(SYSTEM_FIRST, "x").render(messages) == "system:a;user:b;user:;user:c;"
    assert not caplog.records


def test_a_changed_conversation_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate(ALTERNATING, "my-model/chat_template.jinja")
    with caplog.at_level(logging.WARNING):
        template.render(PLAY)
        template.render(PLAY)
    [record] = caplog.records
    assert "my-model/chat_template.jinja refuses some conversations (Conversation roles must" in record.getMessage()


def test_a_refusal_that_stays_is_told_as_it_was_first() -> None:
    template = ChatTemplate("{{ raise_exception('roles of ' ~ (messages | length) ~ ' messages') }}", "x")
    with pytest.raises(RequestError, match="x refuses these messages: roles of 10 messages"):
        template.render(PLAY)


@pytest.mark.parametrize("reason", ["Tokens are missing", "No function was given"])
def test_a_refusal_for_another_reason_is_not_tried_again(reason: str) -> None:
    text = "{% if messages | length > 2 %}{{ raise_exception('" + reason + "') }}{% endif %}short"
    with pytest.raises(RequestError, match=reason):
        ChatTemplate(text, "x").render(talk(("u", "a"), ("u", "b"), ("u", "c")))


def test_calls_of_tools_are_never_joined() -> None:
    messages = [*talk(("a", "Hello!"), ("u", "Hi")), {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]
    with pytest.raises(RequestError, match="must alternate"):
        ChatTemplate(ALTERNATING, "x").render(messages)
