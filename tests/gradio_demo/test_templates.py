"""The page's chat templates: the formats of the other faces under the page's names, with the same prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_model import FakeModel
from ropewalk.base.errors import UnsupportedError
from ropewalk.engine.engine import Engine
from ropewalk.files.embedded import demo_model_path
from ropewalk.gradio_demo.replies.templates import (
    ALL_TEMPLATES,
    FROM_CHECKPOINT,
    chat_template,
    closed_context_template,
    prompt_ids,
    template_names,
)
from ropewalk.text.chat_formats import NAMED_FORMATS
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json, write_config

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def engine_of(folder: Path) -> Engine:
    tokenizer = load_tokenizer(folder)
    return Engine(FakeModel(tokenizer.vocab_size, capacity=512), tokenizer)


def test_the_page_knows_every_format_by_one_name(tmp_path: Path) -> None:
    engine = engine_of(write_byte_level_json(tmp_path))
    names = template_names(engine.tokenizer)
    assert sorted(names) == sorted(set(ALL_TEMPLATES) - {FROM_CHECKPOINT})
    assert len(names) == len(NAMED_FORMATS)
    assert {chat_template(name, engine).format for name in names} == set(NAMED_FORMATS.values())


@pytest.mark.parametrize("embedded", [True, False])
def test_the_first_template_gives_the_prompt_that_the_server_would_give(tmp_path: Path, embedded: bool) -> None:
    engine = engine_of(demo_model_path() if embedded else write_byte_level_json(tmp_path))
    first = template_names(engine.tokenizer)[0]
    assert first == (FROM_CHECKPOINT if embedded else "plain")
    for name in ("", first):
        assert prompt_ids(engine.tokenizer, chat_template(name, engine), TALK) == engine.chat_ids(TALK)


def test_documents_are_asked_in_the_models_own_template_or_in_that_of_closed_context_models(tmp_path: Path) -> None:
    tokenizer = engine_of(write_byte_level_json(tmp_path)).tokenizer
    assert closed_context_template(tokenizer) == "airoboros"
    write_config(tmp_path, chat_template="{{ messages[-1].content }}")
    assert closed_context_template(tokenizer) == FROM_CHECKPOINT


def test_the_template_of_the_checkpoint_comes_first_and_is_the_engines(tmp_path: Path) -> None:
    engine = engine_of(write_byte_level_json(tmp_path))
    with pytest.raises(UnsupportedError, match="the checkpoint brings no chat template: choose one of vicuna"):
        chat_template(FROM_CHECKPOINT, engine)
    write_config(tmp_path, chat_template="{{ messages[-1].content }}")
    assert template_names(engine.tokenizer)[0] == FROM_CHECKPOINT
    template = chat_template("", engine)
    assert template is engine.chat_template  # whose process is there already
    assert template.render(TALK) == "hi"


def test_a_broken_template_is_not_offered_and_one_may_choose_another(tmp_path: Path) -> None:
    engine = engine_of(write_byte_level_json(tmp_path))
    write_config(tmp_path, chat_template="{% if %}")
    assert FROM_CHECKPOINT not in template_names(engine.tokenizer)
    assert chat_template("vicuna", engine).stop == ("USER:",)
