"""Loading through the API: answers that say why, and arguments that nobody knows."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ropewalk.base.errors import ConfigError, RopewalkError
from ropewalk.generate.pace import Pace

LOAD, LORAS = "/v1/internal/model/load", "/v1/internal/lora/load"


def ask(webui: SimpleNamespace, *requests: tuple[str, Any]) -> list[Any]:
    """The answers of the functions that the routes were made with, or the exceptions that they raise; in one task."""

    async def answers() -> list[Any]:
        found = []
        for path, data in requests:
            try:
                found.append(await webui.api_script.routes[path](data))
            except webui.api_script.HTTPException as error:
                found.append(error)
        return found

    return asyncio.run(answers())


def test_the_answer_says_why_a_model_was_not_loaded(webui: SimpleNamespace) -> None:
    (answer,) = ask(webui, (LOAD, {"model_name": "cut"}))
    assert answer.status_code == 500
    assert answer.detail.startswith("Failed to load the model. ") and "no .safetensors file" in answer.detail


def test_the_answer_says_why_a_lora_was_not_applied(loaded: SimpleNamespace) -> None:
    (answer,) = ask(loaded, (LORAS, ["bad"]))
    assert answer.detail.startswith("Failed to apply the LoRA(s). ") and "adapter_config.json" in answer.detail


def test_a_reason_does_not_stay_for_the_next_answer(webui: SimpleNamespace) -> None:
    ours, other = ask(webui, (LOAD, {"model_name": "cut"}), (LOAD, {"model_name": "dense"}))
    assert ours.detail != other.detail == "Failed to load the model."  # of another loader, as it was


def test_a_model_that_loads_is_answered_as_before(webui: SimpleNamespace) -> None:
    assert asyncio.iscoroutinefunction(webui.api_script.handle_load_model)
    assert ask(webui, (LOAD, {"model_name": "demo"})) == ["OK"]


def test_a_misspelt_argument_is_refused_with_what_it_may_have_meant(loaded: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"there is no ctx_sise: did you mean ctx_size\?.*alpha_value"):
        loaded.api_models._load_model({"model_name": "demo", "args": {"ctx_sise": 320}})
    assert loaded.shared.model.ropewalk_model.max_seq_len == 256


def test_an_argument_of_another_loader_is_ignored_and_named(webui: SimpleNamespace) -> None:
    webui.api_models._load_model({"model_name": "demo", "args": {"cpu": True}})
    assert any("args: cpu: not a setting of this loader" in line for line in webui.console)


def test_the_names_of_older_versions_are_taken(webui: SimpleNamespace) -> None:
    webui.api_models._load_model({"model_name": "demo", "args": {"max_seq_len": 320}})
    assert webui.shared.model.ropewalk_model.max_seq_len == 320


def reply(webui: SimpleNamespace) -> list[int]:
    prompt = torch.arange(3, 23).repeat(2)[None]  # [1, 40]
    return webui.shared.model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)[0].tolist()


def test_a_draft_model_or_a_lookup_guesses_ahead_and_the_text_stays(webui: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setattr(Pace, "wanted", lambda pace, num_others: 3)
    webui.api_models._load_model({"model_name": "demo"})
    expected = reply(webui)
    for kind, draft in (("none", "demo"), ("draft", "demo"), ("ngram", "None")):
        webui.api_models._load_model({"model_name": "demo", "args": {"speculation": kind, "model_draft": draft}})
        assert reply(webui) == expected
        stats = webui.shared.model.last_stats
        assert stats.guessed_tokens > 0 and (kind == "ngram" or stats.accepted_tokens > stats.guessed_tokens - 3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"speculation": "draft"}, "speculation=draft needs a model_draft"),
        ({"model_draft": "cut"}, "model_draft=cut: .*no .safetensors file"),
    ],
)
def test_a_draft_model_that_cannot_be_is_refused_before_the_model_is_unloaded(
    loaded: SimpleNamespace, arguments: dict[str, str], reason: str
) -> None:
    before = loaded.shared.model
    with pytest.raises(RopewalkError, match=reason):
        loaded.api_models._load_model({"model_name": "demo", "args": arguments})
    assert loaded.shared.model is before
