"""Engines on the compiled core with few pages: every reply bit for bit as alone, with guesses and without."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gptq_writer import write_checkpoint
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.engine.engine import Engine
from ropewalk.engine.text_stream import Completion
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.loader import load_model
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_sentencepiece

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}
CONTEXT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, {"vocab_size": 400, "max_position_embeddings": 64}, desc_act=True)
    return write_sentencepiece(folder)


def engine_with(folder: Path, contexts: float | None = None, rope: dict | None = None, **options) -> Engine:
    """An engine whose pages hold so many contexts."""
    given = {"max_seq_len": CONTEXT, "rope_scaling": rope, "max_input_len": 48}
    memory = None if contexts is None else int(contexts * load_model(folder, **given).cache_bytes(CONTEXT))
    model = load_model(folder, **given, cache_memory=memory)
    return Engine(model, load_tokenizer(folder), **options)


def asked(number: int) -> tuple[str, SamplingParams]:
    prompt = "A ropewalk is a long straight lane " * (1 + number % 3) + "rope " * number
    return prompt, SamplingParams(seed=number, max_new_tokens=60, ignore_eos=True, logprobs=1, temperature=0.8)


def together(engine: Engine, count: int) -> dict[int, Completion]:
    done: dict[int, Completion] = {}

    def run(number: int) -> None:
        priority = "batch" if number % 4 == 3 else "interactive"
        done[number] = engine.generate(*asked(number), client=number % 2, priority=priority)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return done


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, DYNAMIC], ids=["linear", "dynamic"])
@pytest.mark.parametrize("speculation", [None, "ngram"])
def test_replies_that_take_pages_from_each_other_are_bit_for_bit_as_alone(
    folder: Path, rope: dict, speculation: str | None
) -> None:
    engine = engine_with(folder, 1.25, rope, speculation=speculation)
    alone = engine_with(folder, None, rope)
    done = together(engine, 8)
    assert engine.scheduler.num_preempted
    for number in range(8):
        expected = alone.generate(*asked(number))
        assert (done[number].text, done[number].steps) == (expected.text, expected.steps)
        assert done[number].stats.context_used == expected.stats.context_used
    assert engine.model.cache_used == engine.model.cache_shared <= engine.model.cache_memory


def test_a_draft_model_guesses_and_the_reply_is_as_without(folder: Path) -> None:
    plain = engine_with(folder)
    same = engine_with(folder, draft_model=folder)
    assert same.speculation == "draft"
    params = SamplingParams(temperature=0, max_new_tokens=80, ignore_eos=True, logprobs=2)
    expected, done = (engine.generate("A ropewalk is", params) for engine in (plain, same))
    assert done.steps == expected.steps
    assert (done.stats.context_used, done.stats.new_tokens) == (expected.stats.context_used, expected.stats.new_tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculation": "draft"}, "needs a draft_model"),
        ({"speculation": "luck"}, "speculation must be 'ngram', 'draft' or None, got 'luck'"),
        ({"speculation": "ngram", "draft_model": "here"}, "draft_model has no effect with speculation='ngram'"),
        ({"draft_model": 7}, "draft_model must be the folder of a model, or a loaded model, got int"),
        ({"max_running": 0}, "max_running must be a positive integer, got 0"),
        ({"max_running": True}, "max_running must be a positive integer, got True"),
    ],
)
def test_options_that_contradict_each_other_are_refused(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_with(folder, **options)


def test_a_client_that_cannot_be_told_from_others_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="client must be hashable, such as a name, got list"):
        engine_with(folder).generate("One", client=["a"])


def test_a_draft_model_of_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 384}, desc_act=True)
    with pytest.raises(ConfigError, match="draft_model: .* knows 384 tokens, .* knows 400"):
        engine_with(folder, draft_model=write_sentencepiece(tmp_path))


def test_a_draft_model_whose_table_is_padded_otherwise_guesses(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 512}, desc_act=True)
    padded = engine_with(folder, draft_model=write_sentencepiece(tmp_path))
    params = SamplingParams(temperature=0, max_new_tokens=80, ignore_eos=True)
    assert padded.generate("A ropewalk is", params).steps == engine_with(folder).generate("A ropewalk is", params).steps


def test_prompts_that_begin_alike_are_read_once_by_all_clients(folder: Path) -> None:
    engine = engine_with(folder, rope={"rope_type": "linear", "factor": 4.0})
    common = "A ropewalk is a long straight lane where strands are twisted into rope. " * 2
    first = engine.generate(common + "One", SamplingParams(max_new_tokens=2), client="a")
    other = engine.generate(common + "Two", SamplingParams(max_new_tokens=2), client="b")
    assert first.stats.reused_tokens == 0
    assert other.stats.reused_tokens >= first.stats.prompt_tokens - 4


def test_a_draft_model_stays_within_its_context_and_the_reply_goes_on(folder: Path) -> None:
    small = load_model(folder, max_seq_len=64)
    engine = engine_with(folder, rope={"rope_type": "linear", "factor": 4.0}, draft_model=small)
    alone = engine_with(folder, rope={"rope_type": "linear", "factor": 4.0})
    params = SamplingParams(temperature=0, max_new_tokens=120, ignore_eos=True)
    assert engine.generate("A ropewalk is a", params).steps == alone.generate("A ropewalk is a", params).steps
