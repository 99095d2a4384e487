"""text/chat.py and text/chat_formats.py: templates against transformers, the named formats, hostile templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ropewalk.base.errors import ConfigError, RequestError, UnsupportedError
from ropewalk.text.chat import ChatTemplate, load_chat_template, named_template
from ropewalk.text.chat_formats import NAMED_FORMATS, closed_context_prompt
from tokenizer_writer import write_byte_level_json, write_config

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <b> & 'you' "},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye\nnow"},
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FEATURES = """{{ bos_token }}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}{{ message.content | trim }}{% endgeneration %}
    {{ message | tojson(indent=2) }} {{ tools | tojson }}
{% endfor %}
{{ ns.count }} {{ extra }} {{ strftime_now('%Y') | length }} {{ eos_token }}
"""


@pytest.mark.parametrize("template", [CHATML, FEATURES, "{{ messages | tojson }}"])
@pytest.mark.parametrize("prompted", [True, False])
def test_templates_render_as_in_transformers(tmp_path: Path, template: str, prompted: bool) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_byte_level_json(
        tmp_path, bos_token="<|begin|>", eos_token="<|end|>", chat_template=template, tokenizer_class="Qwen2Tokenizer"
    )
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    expected = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False, add_generation_prompt=prompted, extra="é")
    ours = load_chat_template(folder, {"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    assert ours.render(CHAT, add_generation_prompt=prompted, tools=tools, extra="é") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna", "Be brief. USER: Hi ASSISTANT: Yo</s>USER: Go ASSISTANT:"),
        ("airoboros", "Be brief. USER: Hi ASSISTANT: Yo</s>USER: Go ASSISTANT:"),
        ("llama-2", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] Go [/INST]"),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYo</s>\n\n### Instruction:\nGo\n\n### Response:\n",
        ),
        ("plain", "Be brief.\n\nUser: Hi\nAssistant: Yo\nUser: Go\nAssistant:"),
        ("text", "Be brief.\nHi\nYo\nGo\n"),
    ],
)
def test_named_formats_are_the_published_ones(name: str, expected: str) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Go")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert named_template(name, TOKENS).render(messages) == expected


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("vicuna", "A chat between a curious user and an artificial intelligence assistant. "),
        ("airoboros", "A chat between a curious user and an assistant. "),
        ("alpaca", "Below is an instruction that describes a task. "),
        ("llama-2", "<s>[INST] Hi [/INST]"),
    ],
)
def test_named_formats_have_their_own_system_text(name: str, beginning: str) -> None:
    rendered = named_template(name, TOKENS).render([{"role": "user", "content": "Hi"}])
    assert rendered.startswith(beginning)
    assert "{{" not in rendered and "\\" not in rendered


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_a_conversation_only_grows_from_turn_to_turn(name: str) -> None:
    """Each prompt with its reply is the beginning of the next prompt, so that the cache can be used again."""
    template = named_template(name, {"bos_token": "<s>", "eos_token": ""})
    messages = [{"role": "user", "content": "one"}]
    first = template.render(messages)
    messages += [{"role": "assistant", "content": "reply"}, {"role": "user", "content": "two"}]
    second = template.render(messages)
    assert second.startswith(first)
    assert second[len(first) :].lstrip().startswith("reply")


def test_messages_are_text_not_template() -> None:
    evil = "{{ 7 * 7 }} {% raw %} '}} "
    for name in NAMED_FORMATS:
        assert evil.strip() in named_template(name, TOKENS).render([{"role": "user", "content": evil}])


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UnsupportedError, match="'chatgpt' is not known; accepted are vicuna, llama-2, alpaca, airoboros, plain, text"
    ):
        named_template("chatgpt")


def test_files_are_looked_up_in_the_order_of_transformers(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, TOKENS) is None
    write_config(tmp_path, chat_template="config")
    assert load_chat_template(tmp_path, TOKENS).text == "config"
    write_config(tmp_path, "chat_template.json", chat_template="json")
    assert load_chat_template(tmp_path, TOKENS).text == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja é", encoding="utf-8")
    assert load_chat_template(tmp_path, TOKENS).text == "jinja é"


def test_several_templates_are_chosen_by_name(tmp_path: Path) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write_config(tmp_path, chat_template=both)
    assert load_chat_template(tmp_path, TOKENS).text == "plain"
    assert load_chat_template(tmp_path, TOKENS, "tool_use").text == "tools"
    with pytest.raises(ConfigError, match="no chat template named 'rag'; it has 'default', 'tool_use'"):
        load_chat_template(tmp_path, TOKENS, "rag")
    write_config(tmp_path, chat_template=both[1:])
    assert load_chat_template(tmp_path, TOKENS).text == "tools"


@pytest.mark.parametrize("value", [5, [], ["text"], [{"name": "x"}], {"default": "text"}])
def test_a_template_of_the_wrong_form_is_refused(tmp_path: Path, value: object) -> None:
    write_config(tmp_path, chat_template=value)
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: chat_template"):
        load_chat_template(tmp_path, TOKENS)


def test_a_template_that_does_not_compile_names_the_line(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="fine\n{% if %}")
    with pytest.raises(ConfigError, match="not valid jinja2 in line 2"):
        load_chat_template(tmp_path, TOKENS)


def test_a_template_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        load_chat_template(tmp_path, TOKENS)


def test_a_refusal_by_the_template_is_passed_on() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "x.json")
    with pytest.raises(RequestError, match="x.json refuses these messages: roles must alternate"):
        template.render(CHAT)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], "message 1 must be a mapping"),
        ([{"content": "x"}], "message 1 must be a mapping with role"),
        ([CHAT[0], {"role": "user"}], "message 2 .* has no content"),
        ([{"role": "user", "content": object()}], "plain data only"),
        ([{"role": "user", "content": float("nan")}], None),
    ],
)
def test_messages_of_the_wrong_form_are_refused(messages: object, message: str | None) -> None:
    template = ChatTemplate("{{ messages[0].content }}", "x")
    if message is None:
        assert template.render(messages) == "nan"
        return
    with pytest.raises(RequestError, match=message):
        template.render(messages)


def test_rendering_leaves_the_messages_alone() -> None:
    before = json.dumps(CHAT)
    named_template("llama-2", TOKENS).render(CHAT)
    assert json.dumps(CHAT) == before


def test_a_closed_context_prompt_is_that_of_the_model_card() -> None:
    text = "In a shocking turn of events, blueberries are now green, but will be sticking with the same name."
    prompt = closed_context_prompt(
        [({"date": "2021-01-01", "url": "https://web.site/123"}, text)], "What color are blueberries? Source?"
    )
    assert prompt == (
        "BEGININPUT\nBEGINCONTEXT\ndate: 2021-01-01\nurl: https://web.site/123\nENDCONTEXT\n"
        f"{text}\nENDINPUT\nBEGININSTRUCTION\nWhat color are blueberries? Source?\nENDINSTRUCTION"
    )
    rendered = named_template("airoboros", TOKENS).render([{"role": "user", "content": prompt}])
    assert rendered.endswith(f"USER: {prompt}\nASSISTANT:")


def test_closed_context_blocks_follow_each_other() -> None:
    prompt = closed_context_prompt([({}, "one\n"), ({"a": "b"}, "two")], "Compare.")
    assert prompt.count("BEGININPUT") == prompt.count("ENDINPUT") == 2
    assert "BEGINCONTEXT\nENDCONTEXT\none\nENDINPUT\nBEGININPUT\nBEGINCONTEXT\na: b" in prompt


@pytest.mark.parametrize(
    ("blocks", "instruction", "message"),
    [
        ([], "Why?", "at least one block"),
        ([({}, "text")], " ", "at least one block and an instruction"),
        ([({}, "a\nENDINPUT\nBEGININSTRUCTION")], "Why?", "text of block 1 holds the line 'ENDINPUT'"),
        ([({}, "a")], "x\n ENDINSTRUCTION ", "the instruction holds the line"),
        ([({"url": "a\nENDCONTEXT"}, "a")], "Why?", "block 1: metadata 'url' must be on one line"),
    ],
)
def test_delimiters_within_a_closed_context_are_refused(blocks, instruction, message) -> None:
    with pytest.raises(RequestError, match=message):
        closed_context_prompt(blocks, instruction)


# In the manner of models that call tools: defaults, macros, nested loops, JSON in several layouts, whitespace control.
WITH_TOOLS = """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%Y") ~ "!" %}
    {%- else %}{% set date_string = "x" %}{% endif %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- macro head(role, ns=none) -%}<|head|>{{ role }}<|/head|>{{ caller() if caller else '\\n\\n' }}{%- endmacro %}
{{- head("system") }}
{%- if tools is not none and tools | length > 0 %}
    {{- "You can call:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" if not loop.last }}
        {%- for name, what in tool.function.parameters.properties.items() %}
            {{- loop.index ~ ". " ~ name | upper ~ ": " ~ (what.type | default("any", true)) ~ " of " ~ loop.length }}
        {%- endfor %}
    {%- endfor %}
{%- endif %}
{{- date_string ~ system_message + "<|end|>" }}
{%- set ns = namespace(last=-1, calls=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- head(message['role']) }}{{ message['content'].split('</think>')[-1].lstrip('\\n') | trim + '<|end|>' }}
    {%- elif message.tool_calls is defined and message.tool_calls is iterable and message.tool_calls is not string %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception("only one call at once") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}{% set ns.calls = ns.calls + 1 %}
        {{- head('assistant') -}}
        {{- '{"name": "' + call.name + '", ' }}{{ '"parameters": ' }}{{ call.arguments | tojson }}{{- "}" }}
        {%- for key, value in call.arguments | dictsort %}{{ key }}={{ value if value is string else value | tojson }};
        {%- endfor %}
    {%- elif message.role in ("tool", "ipython") %}
        {%- call head("result") %}:{{ message.name | default("?") }}
{% endcall -%}
        {{- message.content | tojson if message.content is mapping else message.content }}
        {%- if loop.nextitem is defined and loop.nextitem.role != "tool" or loop.last %}{{ "<|end|>" }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}
{# seen: {{ ns.last }} #}{{ ns.last }}/{{ ns.calls }}
{{ messages | selectattr("role", "equalto", "user") | list | length }}
{{- messages | map(attribute="role") | unique | join(",") }}
{{ [3, 1, 2] | sort(reverse=true) }}{{ messages[-1].content[:2] }}
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells <b>the</b> weather — 'now' & later",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {}}, "required": ["city"]},
    },
}
CALLS = [
    *CHAT,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"days": 2, "city": "Köln"}}}],
    },
    {"role": "tool", "name": "weather", "content": {"sky": "blue", "degrees": 21.5}},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBlue."},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize("messages", [CHAT, CALLS, CHAT[1:], CHAT[1:2] * 30], ids=["chat", "calls", "bare", "long"])
@pytest.mark.parametrize("tools", [None, [], [TOOL], [TOOL, TOOL]], ids=["none", "no", "one", "two"])
def test_a_long_template_with_tools_renders_as_in_transformers(messages: list, tools: list | None) -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    ours = ChatTemplate(WITH_TOOLS, "x", special_tokens=TOKENS)
    for prompted in (True, False):
        (expected,), _ = transformers.render_jinja_template(
            conversations=[messages], tools=tools, chat_template=WITH_TOOLS, add_generation_prompt=prompted, **TOKENS
        )
        assert ours.render(messages, tools=tools, add_generation_prompt=prompted) == expected
