"""A request through an engine: its text piece by piece, stop strings, statistics, refusals."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import GREEDY, PROMPT, engine_of, engine_that_says, say
from fake_model import FakeModel, reply
from gptq_writer import write_checkpoint
from ropewalk import load_model
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.engine.engine import Engine
from ropewalk.files.embedded import demo_model_path
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from tokenizer_writer import write_config, write_sentencepiece
from variants import Variant, variants


def test_the_pieces_are_the_text_with_its_leading_space_and_end_at_the_end_token(tokenizer: Tokenizer) -> None:
    pieces, stream = say(tokenizer, " fox jumps\n  over 🙂 Zwölf")
    assert "".join(pieces) == " fox jumps\n  over 🙂 Zwölf"
    assert len(pieces) > 3
    assert "" not in pieces
    assert stream.finish_reason == "stop"
    assert stream.stop_string is None


def test_a_stop_string_is_not_shown_even_if_it_spans_tokens(tokenizer: Tokenizer) -> None:
    pieces, stream = say(tokenizer, " fox jumps over the lazy dog", stop=["ver the l", "zzz"])
    assert "".join(pieces) == " fox jumps o"
    assert (stream.finish_reason, stream.stop_string) == ("stop", "ver the l")


def test_text_held_back_for_a_stop_string_that_never_comes_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    pieces, stream = say(tokenizer, " fox jumps over", stop="over the")
    assert "".join(pieces) == " fox jumps over"
    assert stream.finish_reason == "stop"


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 24), length=st.integers(1, 6))
def test_every_cut_of_a_text_by_a_stop_string_is_exact(tokenizer: Tokenizer, start: int, length: int) -> None:
    text = " fox jumps over é the lazy"
    stop = text[start : start + length]
    pieces, _ = say(tokenizer, text, stop=stop)
    assert "".join(pieces) == text[: text.index(stop)]


def test_generate_returns_text_tokens_and_statistics(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps")
    done = engine.generate(PROMPT, SamplingParams(temperature=0, logprobs=2))
    assert done.text == " fox jumps"
    assert tokenizer.decode(done.token_ids).strip() == "fox jumps"
    assert done.finish_reason == engine.last_finish_reason == "stop"
    assert done.stats == engine.last_stats
    assert done.stats.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert all(step.logprob == pytest.approx(0.0, abs=1e-3) and len(step.top) == 2 for step in done.steps)


def test_a_prompt_of_token_ids_gives_the_same_reply(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps")
    assert engine.generate(tokenizer.encode(PROMPT), GREEDY).text == engine.generate(PROMPT, GREEDY).text


def test_a_second_request_reuses_the_cache(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps")
    first = engine.generate(PROMPT, GREEDY)
    second = engine.generate(PROMPT, GREEDY)
    assert second.text == first.text
    assert second.stats.reused_tokens == second.stats.prompt_tokens - 1


def test_cancelling_keeps_what_there_is(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over the lazy")
    stream = engine.stream(PROMPT, GREEDY, cancelled=lambda: bool(stream.steps))
    text = "".join(stream)
    assert stream.finish_reason == "cancelled"
    assert len(stream.steps) == 1
    assert " fox jumps over the lazy".startswith(text)
    assert engine.generate(PROMPT, SamplingParams(temperature=0)).text == " fox jumps over the lazy"


def test_an_error_within_a_request_frees_the_engine(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox")
    with pytest.raises(RequestError, match="logit_bias"):
        engine.generate(PROMPT, SamplingParams(logit_bias={10**6: 1.0}))
    assert engine.generate(PROMPT, GREEDY).text == " fox"


def test_wrong_requests_are_refused_when_they_are_made(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox")
    with pytest.raises(RequestError, match="no token ids"):
        engine.stream([])
    with pytest.raises(RequestError, match="out of range"):
        engine.stream([10**6])
    with pytest.raises(RequestError, match="more than the context of 256"):
        engine.stream("rope " * 500)
    with pytest.raises(RequestError, match="params must be SamplingParams"):
        engine.stream(PROMPT, {"temperature": 0})


def test_inference_mode_does_not_leak_to_the_caller(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    seen = []
    original = engine.model.forward

    def forward(*args, **kwargs):
        seen.append(torch.is_inference_mode_enabled())
        return original(*args, **kwargs)

    engine.model.forward = forward
    for _ in engine.stream(PROMPT, GREEDY):
        assert not torch.is_inference_mode_enabled()
    assert seen and all(seen)


def test_the_end_tokens_of_model_and_tokenizer_both_count(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" fox jumps", add_bos=False)
    model = FakeModel(tokenizer.vocab_size, eos=(ids[-1],), script=reply(ids, len(tokenizer.encode(PROMPT))))
    engine = Engine(model, tokenizer)
    assert engine.end_token_ids == (ids[-1], tokenizer.eos_id)
    assert engine.generate(PROMPT, GREEDY).token_ids == ids[:-1]


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="belongs to another model"):
        Engine(FakeModel(vocab_size=32), tokenizer)


def test_added_tokens_beyond_the_model_are_refused_in_prompts_only(tmp_path: Path, caplog) -> None:
    folder = write_sentencepiece(tmp_path)
    write_config(folder, "added_tokens.json", **{"<pad>": 400})
    with caplog.at_level(logging.WARNING):
        engine = Engine(FakeModel(400), load_tokenizer(folder))
    assert "added tokens" in caplog.text
    assert engine.generate("rope", GREEDY).finish_reason
    with pytest.raises(RequestError, match="token id 400 at position 1 is out of range"):
        engine.generate("<pad>", GREEDY)


def test_a_piece_is_shown_as_soon_as_its_token_is_chosen(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    stream = engine.stream(PROMPT, SamplingParams(temperature=0, stop="zebra"))
    for piece in stream:
        shown = tokenizer.decode([*tokenizer.encode(PROMPT), *(step.token_id for step in stream.steps)])
        assert shown.endswith(piece)


@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_a_prefix_hit_changes_no_token_of_a_real_model(tmp_path: Path, variant: Variant) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 400}, desc_act=True)
    model = variant.load(write_sentencepiece(tmp_path), max_seq_len=64, max_input_len=5)
    engine = Engine(model, load_tokenizer(tmp_path))
    params = SamplingParams(temperature=1.0, seed=3, max_new_tokens=12, ignore_eos=True, logprobs=0)
    engine.generate("A ropewalk is a long", params)
    hit = engine.generate("A ropewalk is a long straight lane", params)
    other = variant.load(tmp_path, max_seq_len=64, max_input_len=5)
    fresh = Engine(other, engine.tokenizer).generate("A ropewalk is a long straight lane", params)
    assert hit.stats.reused_tokens > 3
    assert fresh.stats.reused_tokens == 0
    assert hit.token_ids == fresh.token_ids
    if variant.backend == "cpu":  # bit for bit; torch sums in another order for other shapes
        assert hit.steps == fresh.steps


def test_each_token_comes_with_what_it_adds_to_the_text(tokenizer: Tokenizer) -> None:
    stream = engine_that_says(tokenizer, " fox 🙂 over").stream(PROMPT, SamplingParams(temperature=0, stop="ver"))
    assert "".join(stream) == " fox 🙂 o"
    tokens = stream.tokens()
    assert [step for step, _ in tokens] == list(stream.steps)
    assert "".join(text for _, text in tokens).startswith(" fox 🙂 over"[: len(" fox 🙂 o")])
    assert stream.tokens(2) == tokens[2:]
    assert stream.queue_s >= 0


def test_the_score_of_a_prompt_is_that_of_its_logits_and_leaves_it_in_the_cache(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, 2)
    ids = engine.tokenizer.encode("A ropewalk is a long straight lane")
    logits = engine.model.forward(ids, engine.model.new_cache(), logits="all")
    steps = engine.score(ids, 3)
    assert [step.token_id for step in steps] == ids and steps[0].logprob is None
    for position, step in enumerate(steps[1:]):
        log_p = torch.log_softmax(logits[position], dim=-1)
        assert step.logprob == float(log_p[step.token_id])
        assert [value for _, value in step.top] == torch.topk(log_p, 3).values.tolist()
    assert engine.generate(ids, GREEDY).stats.reused_tokens == len(ids) - 1
    assert engine.score(ids, cancelled=lambda: True) is None
    with pytest.raises(RequestError, match="no token ids"):
        engine.score([])


@pytest.mark.parametrize(
    ("name", "value"),
    [("kept_folder", "a folder"), ("queue_limit", "x"), ("queue_limit", -1), ("chat_template", 5), ("max_running", 0)],
)
def test_a_wrong_argument_is_refused_when_the_engine_is_made(tokenizer: Tokenizer, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        Engine(FakeModel(tokenizer.vocab_size), tokenizer, **{name: value})


def test_adapters_that_are_not_loaded_are_refused_when_the_engine_is_made() -> None:
    model = load_model(demo_model_path(), threads=1)
    with pytest.raises(RequestError, match="storm"):
        Engine(model, load_tokenizer(demo_model_path()), adapters="storm")


def test_a_number_of_alternatives_below_0_is_refused(tokenizer: Tokenizer) -> None:
    engine = Engine(FakeModel(tokenizer.vocab_size), tokenizer)
    with pytest.raises(RequestError, match="count must be an integer from 0 on, got -1"):
        engine.score(tokenizer.encode(PROMPT), -1)
