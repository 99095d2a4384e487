"""Chat through an engine: templates, their stop strings, and turns that reuse the conversation."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import GREEDY, engine_that_says
from fake_model import FakeModel
from ropewalk.base.errors import UnsupportedError
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.chat import ChatTemplate
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json, write_sentencepiece


def chat_engine(folder: Path, **options) -> Engine:
    return Engine(FakeModel(512, capacity=512), load_tokenizer(folder), **options)


def test_chat_uses_the_template_of_the_folder_without_a_second_bos(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": template}
    engine = chat_engine(write_byte_level_json(tmp_path, **config))
    ids = engine.chat_ids([{"role": "user", "content": "hi"}])
    assert engine.tokenizer.decode(ids, skip_special=False) == "<|begin|>user: hi<|end|>"
    assert engine.chat([{"role": "user", "content": "hi"}], GREEDY).complete().stats.prompt_tokens == len(ids)


def test_a_named_template_adds_the_bos_token_and_its_stop_strings(tmp_path: Path) -> None:
    engine = chat_engine(write_sentencepiece(tmp_path), chat_template="vicuna")
    messages = [{"role": "user", "content": "hi"}]
    assert engine.chat_ids(messages)[0] == engine.tokenizer.bos_id
    prompt = engine.tokenizer.decode(engine.chat_ids(messages))
    talk = engine_that_says(engine.tokenizer, " yes USER: more", prompt=prompt, chat_template="vicuna")
    stream = talk.chat(messages, SamplingParams(temperature=0))
    assert "".join(stream) == " yes "
    assert stream.stop_string == "USER:"


def test_chat_turns_reuse_the_conversation_so_far(tmp_path: Path) -> None:
    engine = chat_engine(write_byte_level_json(tmp_path), chat_template="vicuna")
    messages = [{"role": "user", "content": "hi"}]
    engine.chat(messages, SamplingParams(temperature=0, max_new_tokens=0)).complete()
    messages += [{"role": "assistant", "content": " yes"}, {"role": "user", "content": "more"}]
    done = engine.chat(messages, SamplingParams(temperature=0, max_new_tokens=1)).complete()
    assert done.stats.reused_tokens >= len(engine.chat_ids(messages[:1])) - 1


def test_a_model_without_a_template_falls_back_to_plain_lines_with_one_warning(tmp_path: Path, caplog) -> None:
    engine = chat_engine(write_sentencepiece(tmp_path))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    ids = engine.chat_ids(messages)
    assert engine.tokenizer.decode(ids) == "Be brief.\n\nUser: hi\nAssistant:"
    engine.chat(messages, GREEDY).complete()
    assert engine.chat_template.stop == ("\nUser:",)
    [warning] = [record.getMessage() for record in caplog.records if record.name == "ropewalk.text.chat"]
    assert warning.startswith(f"{tmp_path.name} brings no chat template")
    assert "--chat-template NAME (vicuna, llama-2, alpaca, airoboros, plain, text)" in warning


def test_a_template_that_was_asked_for_by_name_is_not_warned_of(tmp_path: Path, caplog) -> None:
    engine = chat_engine(write_sentencepiece(tmp_path), chat_template="plain")
    assert engine.tokenizer.decode(engine.chat_ids([{"role": "user", "content": "hi"}])) == "User: hi\nAssistant:"
    assert not caplog.records


def test_the_fallback_ends_at_the_next_question(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path))
    talk = engine_that_says(tokenizer, " yes\nUser: more", prompt="User: hi\nAssistant:")
    stream = talk.chat([{"role": "user", "content": "hi"}], SamplingParams(temperature=0))
    assert "".join(stream) == " yes"
    assert stream.stop_string == "\nUser:"


def test_an_unknown_name_of_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'gpt' is not known"):
        chat_engine(write_sentencepiece(tmp_path), chat_template="gpt")


def test_a_template_object_and_its_variables_are_used(tmp_path: Path) -> None:
    template = ChatTemplate("{{ mood }} {{ messages[0].content }}", "test")
    engine = chat_engine(write_byte_level_json(tmp_path), chat_template=template)
    ids = engine.chat_ids([{"role": "user", "content": "hi"}], mood="calm")
    assert engine.tokenizer.decode(ids) == "calm hi"
