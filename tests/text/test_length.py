"""text/tokenizer/length.py: what cannot fit is refused before it is tokenised, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.base.errors import ContextLengthError
from ropewalk.text.tokenizer.length import encode_fitting
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from tokenizer_writer import SENTENCES, write_byte_level_json, write_fallback_json, write_sentencepiece

WRITERS = (write_sentencepiece, write_fallback_json, write_byte_level_json)


@pytest.fixture(scope="module", params=WRITERS, ids=lambda writer: writer.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(request.param(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300) | st.lists(st.sampled_from(SENTENCES), max_size=8).map(" ".join), st.integers(1, 200))
def test_a_text_is_refused_only_if_it_has_more_tokens_than_fit(tokenizer: Tokenizer, text: str, size: int) -> None:
    whole = tokenizer.encode(text)
    try:
        assert encode_fitting(tokenizer, text, size) == whole
    except ContextLengthError as error:
        assert len(whole) > size
        assert f"more than the context of {size}" in str(error)


def test_a_long_text_is_not_tokenised(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = tokenizer.longest_token_bytes
    read: list[int] = []
    encode = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda text: read.append(len(text)) or encode(text))
    with pytest.raises(ContextLengthError, match=r"at least \d+ tokens"):
        encode_fitting(tokenizer, "x " * 5_000_000, 512)
    assert sum(read) <= 8 * 512


def test_of_a_text_that_the_longest_tokens_could_hold_only_the_beginning_is_read(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(type(tokenizer), "longest_token_bytes", 10**6)
    with pytest.raises(ContextLengthError, match=r"at least \d+ tokens"):
        encode_fitting(tokenizer, "7 x" * 100_000, 512)


def test_where_spaces_are_collapsed_a_text_of_spaces_still_fits(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, collapse_spaces=True))
    assert tokenizer.longest_token_bytes is None
    text = "rope" + " " * 100_000 + "walk"
    assert encode_fitting(tokenizer, text, 64) == tokenizer.encode(text)


def test_no_token_stands_for_more_bytes_than_the_longest(tokenizer: Tokenizer) -> None:
    longest = tokenizer.longest_token_bytes
    assert longest == max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
