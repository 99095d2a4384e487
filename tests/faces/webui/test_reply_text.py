"""The text of replies: every space that the tokens have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

CODE = "def f(path):\n        with open(path) as file:\n                return file\n"
SKIPPING = {"skip_special_tokens": True}


def pieces(webui: SimpleNamespace, tokens: list[int]) -> list[str]:
    """A reply as the web UI streams it: each token decoded alone, after a prompt of one token."""
    decode = webui.transformers_loader.get_reply_from_output_ids  # held by name where replies are streamed
    return [decode([1, *tokens[:end]], SKIPPING, end) for end in range(1, len(tokens) + 1)]


def test_a_token_of_eight_spaces_stays_eight_spaces(loaded: SimpleNamespace) -> None:
    tokenizer = loaded.shared.tokenizer
    token = tokenizer.convert_tokens_to_ids("▁" * 8)
    assert len(tokenizer.decode([token])) == 7  # what the web UI is given
    assert pieces(loaded, [token]) == [" " * 8]


def test_streamed_code_keeps_its_indentation(loaded: SimpleNamespace) -> None:
    tokens = loaded.shared.tokenizer.encode(CODE, add_special_tokens=False)
    expected = " " + CODE  # sentencepiece puts a space before the first word
    assert "".join(pieces(loaded, tokens)) == expected
    assert loaded.text_generation.get_reply_from_output_ids([1, *tokens], SKIPPING, 1) == expected


def test_a_reply_of_no_tokens_is_empty(loaded: SimpleNamespace) -> None:
    assert loaded.text_generation.get_reply_from_output_ids([1], None, 1) == ""


def test_special_tokens_are_skipped_or_shown_as_asked(loaded: SimpleNamespace) -> None:
    decode, tokenizer = loaded.text_generation.get_reply_from_output_ids, loaded.shared.tokenizer
    tokens = [tokenizer.convert_tokens_to_ids("return"), tokenizer.eos_token_id]
    assert decode(tokens, SKIPPING) == "return"
    assert decode(tokens, {"skip_special_tokens": False}).replace(" ", "") == "return</s>"


def test_replies_of_other_models_are_left_as_they_are(loaded: SimpleNamespace) -> None:
    tokenizer = loaded.shared.tokenizer
    loaded.models.unload_model()
    loaded.shared.model, loaded.shared.tokenizer = "a model of transformers", tokenizer
    assert pieces(loaded, [tokenizer.convert_tokens_to_ids("▁" * 8)]) == [" " * 7]
