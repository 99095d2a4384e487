"""engine/dry_breakers.py: texts that end a repetition, found in tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from fake_model import FakeModel
from ropewalk.engine.dry_breakers import TextBreakers
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json

VOCABULARY = [b"a", b"b", b"ab", b"\n", b"a\nb", b"User", b":", b"er:x", b""]
TOKENS = SimpleNamespace(token_bytes=lambda token_id: VOCABULARY[token_id])


def test_a_token_that_holds_a_breaker_is_one() -> None:
    breakers = TextBreakers(TOKENS, ["\n", "b"])
    assert [token for token in range(len(VOCABULARY)) if breakers.is_breaker(token)] == [1, 2, 3, 4]


def test_a_breaker_written_in_several_tokens_ends_in_the_last_of_them() -> None:
    breakers = TextBreakers(TOKENS, ["User:"])
    assert not any(breakers.is_breaker(token) for token in range(len(VOCABULARY)))
    assert breakers.end_in_last([0, 5, 6])
    assert breakers.end_in_last([5, 8, 6])
    assert not breakers.end_in_last([5, 6, 0])
    assert not breakers.end_in_last([5])
    assert not breakers.end_in_last([6])
    assert not breakers.end_in_last([])


@given(
    st.lists(st.integers(0, len(VOCABULARY) - 1), min_size=1, max_size=12),
    st.lists(st.sampled_from(["a", "ab", "b\na", "User:", ":a", "x"]), min_size=1, max_size=3),
)
def test_breakers_end_where_the_text_says(ids: list[int], texts: list[str]) -> None:
    before = b"".join(VOCABULARY[i] for i in ids[:-1])
    whole = before + VOCABULARY[ids[-1]]
    ends = any(
        whole[start:].startswith(text.encode()) and start + len(text) > len(before)
        for text in texts
        for start in range(len(whole))
    )
    assert TextBreakers(TOKENS, texts).end_in_last(ids) == ends


def test_the_engine_ends_repetitions_at_the_texts_of_a_request(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path))
    prompt = tokenizer.encode("ab:ab:", add_bos=False)
    wanted = tokenizer.encode("a", add_bos=False)[0]

    def first(**options) -> int:
        model = FakeModel(tokenizer.vocab_size, script=lambda history: wanted)
        params = SamplingParams(temperature=0, max_new_tokens=1, dry_multiplier=100.0, dry_allowed_length=1, **options)
        return Engine(model, tokenizer).generate(prompt, params).token_ids[0]

    assert first() == wanted  # ":" is a breaker
    assert first(dry_sequence_breakers=("\n",)) != wanted
