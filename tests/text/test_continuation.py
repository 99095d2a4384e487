"""text/continuation.py: the prompt ends where the last message does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_model import FakeModel
from ropewalk.base.errors import RequestError
from ropewalk.engine.engine import Engine
from ropewalk.text.chat import ChatTemplate, named_template
from ropewalk.text.chat_formats import NAMED_FORMATS
from ropewalk.text.continuation import render_continued
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRIMMING = CHATML.replace("m.content", "m.content | trim")
TALK = [{"role": "user", "content": "Tell a story."}, {"role": "assistant", "content": "Once upon a "}]


def test_the_last_message_is_left_open() -> None:
    text = render_continued(ChatTemplate(CHATML, "test"), TALK)
    assert text == "<|user|>\nTell a story.<|end|>\n<|assistant|>\nOnce upon a "


def test_where_the_template_trims_messages_the_space_at_the_end_goes_too() -> None:
    template = ChatTemplate(TRIMMING, "test")
    assert render_continued(template, TALK).endswith("<|assistant|>\nOnce upon a")
    empty = [TALK[0], {"role": "assistant", "content": ""}]
    assert render_continued(template, empty).endswith("<|assistant|>\n")
    assert TALK[1]["content"] == "Once upon a "


@pytest.mark.parametrize("messages", [TALK, [*TALK, {"role": "user", "content": "and then"}]])
def test_it_is_what_transformers_writes(messages) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for text in (CHATML, TRIMMING):
        theirs = utils.render_jinja_template([messages], chat_template=text, continue_final_message=True)[0][0]
        assert render_continued(ChatTemplate(text, "test"), messages) == theirs


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_every_named_format_can_be_continued(name: str) -> None:
    template = named_template(name, {"bos_token": "<s>", "eos_token": "</s>"})
    text = render_continued(template, TALK)
    assert text.rstrip().endswith("Once upon a") and "Tell a story." in text


@pytest.mark.parametrize("content", [None, ["a"], 5])
def test_a_last_message_without_text_is_refused(content) -> None:
    with pytest.raises(RequestError, match="needs a last message whose content is text"):
        render_continued(ChatTemplate(CHATML, "test"), [TALK[0], {"role": "assistant", "content": content}])


def test_a_template_that_leaves_the_last_message_out_is_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "test")
    with pytest.raises(RequestError, match="the chat template of test does not write the last message unchanged"):
        render_continued(template, TALK)


def test_the_engine_goes_on_with_the_last_message(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path))
    engine = Engine(FakeModel(tokenizer.vocab_size), tokenizer, ChatTemplate(CHATML, "test"))
    ids = engine.chat_ids(TALK, continue_final_message=True)
    assert tokenizer.decode(ids, skip_special=False).endswith("<|assistant|>\nOnce upon a ")
    stream = engine.chat(TALK, continue_final_message=True)
    stream.close()
    assert stream._request.prompt_ids == ids
    closed = engine.chat_ids(TALK, add_generation_prompt=False)
    assert tokenizer.decode(closed, skip_special=False).endswith("Once upon a <|end|>\n")
    with pytest.raises(RequestError, match="cannot be used together"):
        engine.chat_ids(TALK, continue_final_message=True, add_generation_prompt=True)
