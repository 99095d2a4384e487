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


def test_a_model_without_a_template_says_which_there_are(tmp_path: Path) -> None:
    engine = chat_engine(write_sentencepiece(tmp_path))
    with pytest.raises(UnsupportedError, match="brings no chat template: choose one by name .vicuna, llama-2"):
        engine.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(UnsupportedError, match="'gpt' is not known"):
        chat_engine(tmp_path, chat_template="gpt")


def test_a_template_object_and_its_variables_are_used(tmp_path: Path) -> None:
    template = ChatTemplate("{{ mood }} {{ messages[0].content }}", "test")
    engine = chat_engine(write_byte_level_json(tmp_path), chat_template=template)
    ids = engine.chat_ids([{"role": "user", "content": "hi"}], mood="calm")
    assert engine.tokenizer.decode(ids) == "calm hi"
