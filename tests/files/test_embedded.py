"""Conversations with the embedded model use its LoRA and the scaling of that; whoever chooses otherwise gets that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ropewalk
from ropewalk.engine.engine import Engine
from ropewalk.faces.cli.loading import options_for_adapters
from ropewalk.faces.cli.main import _parser
from ropewalk.files import embedded
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.tokenizer.load import load_tokenizer

SCALING = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
GREEDY = SamplingParams(temperature=0, max_new_tokens=24)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the embedded model."""
    folder = tmp_path / "demo_model"
    shutil.copytree(embedded.demo_model_path(), folder)
    monkeypatch.setattr(embedded, "demo_model_path", lambda: folder)
    return folder


def chosen(*arguments: str, to_talk: bool = True):
    """(scaling, names of adapters) of a command."""
    args = _parser().parse_args(arguments)
    options = options_for_adapters(args, to_talk)
    return options.rope_scaling, [Path(text).name for text in args.adapter]


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_the_embedded_model_talks_with_its_adapter(folder: Path, command: str) -> None:
    assert chosen(command) == (SCALING, ["yarn-8"])


def test_options_of_a_person_win(folder: Path) -> None:
    assert chosen("generate", "--rope-scaling", '{"type": "yarn", "factor": 2}') == ({"type": "yarn", "factor": 2}, [])
    assert chosen("generate", "--alpha-value", "2") == (None, [])
    scaling, names = chosen("generate", "--adapter", "linear-4")
    assert names == ["linear-4"] and scaling["rope_type"] == "linear"
    assert chosen("generate", str(folder)) == (None, [])
    assert chosen("perplexity", to_talk=False) == (None, [])


def test_an_engine_uses_its_adapters_for_requests_that_name_none(folder: Path) -> None:
    model = ropewalk.load_model(folder, threads=1, backend="cpu", rope_scaling=SCALING)
    adapter = embedded.embedded_adapter()
    model.load_adapter(adapter, adapter.name)
    tokenizer = load_tokenizer(folder)
    by_default, plain = Engine(model, tokenizer, adapters=adapter.name), Engine(model, tokenizer)
    prompt = (folder / "held_out.txt").read_text(encoding="utf-8")[:2000]

    def said(engine: Engine, adapters: object = None) -> list[int]:
        return engine.generate(prompt, GREEDY, adapters=adapters).token_ids

    assert said(by_default) == said(plain, adapter.name)
    assert said(by_default, []) == said(plain)
    assert said(plain) != said(plain, adapter.name)
