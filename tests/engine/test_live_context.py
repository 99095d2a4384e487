"""Another RoPE while replies run, windows that are full, conversations that lose their oldest turns."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from gptq_writer import write_checkpoint
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.engine.engine import Engine
from ropewalk.engine.shorten import limit_of_strides, shortened
from ropewalk.generate.context_shift import ContextShift, checked_shift
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.shift import common
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_sentencepiece
from variants import Variant

WINDOW = 256
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, {"vocab_size": 400, "max_position_embeddings": 128}, desc_act=True)
    return write_sentencepiece(path)


def engine_of(folder: Path, max_running: int = 3, context_shift: bool | int = False, **options: Any) -> Engine:
    model = Variant("cpu", "int8").load(folder, **{"max_seq_len": WINDOW, **options})
    return Engine(model, load_tokenizer(folder), "plain", max_running=max_running, context_shift=context_shift)


def ids(length: int, seed: int = 0) -> list[int]:
    return [(place * 37 + seed * 11 + place // 7) % 390 + 5 for place in range(length)]


def written(engine: Engine, prompt: list[int], params: SamplingParams = LONG, **options: Any) -> list[int]:
    return engine.generate(prompt, params, **options).token_ids


def test_without_context_shift_a_reply_ends_at_the_end_of_the_window(folder: Path) -> None:
    reply = engine_of(folder).generate(ids(WINDOW - 5), LONG)
    assert reply.finish_reason == "context" and len(reply.steps) == 6 and reply.stats.dropped_tokens == 0


def test_with_it_the_reply_goes_on_and_says_what_was_dropped(folder: Path) -> None:
    engine = engine_of(folder)
    params = SamplingParams(temperature=0, max_new_tokens=200, ignore_eos=True)
    reply = engine.generate(ids(WINDOW - 5), params, context_shift=10)
    assert reply.finish_reason == "length" and len(reply.steps) == 200
    assert reply.stats.dropped_tokens >= 195 and reply.stats.shifted_tokens > reply.stats.dropped_tokens
    assert reply.stats.context_used <= WINDOW and "instead of reading" in reply.stats.describe()
    assert reply.token_ids[:6] == written(engine, ids(WINDOW - 5))
    assert reply.token_ids == written(engine_of(folder, context_shift=10), ids(WINDOW - 5), params)


def test_a_reply_without_a_limit_ends_some_time(folder: Path) -> None:
    endless = SamplingParams(temperature=0, ignore_eos=True)
    reply = engine_of(folder).generate(ids(20), endless, context_shift=True)
    assert reply.finish_reason == "length" and WINDOW <= len(reply.steps) <= 2 * WINDOW


def test_replies_that_run_together_shift_as_each_would_alone(folder: Path) -> None:
    asked = [(ids(WINDOW - 3 - 4 * number, number), 30 + number) for number in range(3)]
    alone = [
        written(
            engine_of(folder),
            prompt,
            SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True),
            context_shift=7,
        )
        for prompt, tokens in asked
    ]
    engine, together = engine_of(folder), {}

    def run(number: int) -> None:
        prompt, tokens = asked[number]
        params = SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)
        together[number] = written(engine, prompt, params, context_shift=7)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(3)] == alone


def test_a_prompt_that_lacks_a_stretch_is_not_read_again(folder: Path) -> None:
    engine = engine_of(folder)
    whole = ids(200)
    written(engine, whole, context_shift=True, client="ann")
    for number, (client, shift, shifted) in enumerate([("bob", True, 0), ("ann", False, 0), ("ann", True, 90)]):
        lacking = whole[: 28 + number] + whole[108 + number :] + [7, 8, 9]  # else they find what the last one read
        engine.generate(lacking, SamplingParams(max_new_tokens=1), context_shift=shift, client=client)
        assert engine.last_stats.shifted_tokens == shifted
    assert engine.last_stats.prompt_tokens - engine.last_stats.reused_tokens == 3


def conversation(turns: int) -> list[dict[str, str]]:
    found = [SYSTEM]
    for turn in range(turns):
        found += [{"role": "user", "content": f"Question {turn}? " * 3}, {"role": "assistant", "content": "An answer."}]
    return [*found, {"role": "user", "content": "And now?"}]


def test_a_conversation_loses_its_oldest_turns_in_strides_and_keeps_the_system_prompt(folder: Path) -> None:
    engine = engine_of(folder)
    seen = []
    for turns in range(12):
        messages = conversation(turns)
        kept, dropped = shortened(engine, messages, 20)
        assert kept[0] == SYSTEM and kept[1]["role"] == "user" and kept[-1] == messages[-1]
        assert kept == [SYSTEM, *messages[1 + dropped :]]
        assert dropped == 0 or len(engine.chat_ids(kept)) <= WINDOW - 20 or len(kept) == 2
        seen.append(dropped)
    assert seen == sorted(seen) and seen[-1] > 0 and len(set(seen)) < 12
    assert limit_of_strides(100, 100) == 100 and limit_of_strides(100, 101) == 76 and limit_of_strides(100, 126) == 76


def test_a_chat_over_a_full_window_reads_nothing_again(folder: Path) -> None:
    """Read is what follows the last reply, and of that what its text gives from where the tokenizer cuts it in another
    way than the model wrote it; the last token that was written has not been read itself."""
    engine, params = engine_of(folder, context_shift=True, max_seq_len=512), SamplingParams(max_new_tokens=10)
    with pytest.raises(RequestError, match="more than the context"):
        engine.chat(conversation(60), params, context_shift=False)
    shifts, messages, last = 0, [SYSTEM], []
    for turn in range(20):
        messages.append({"role": "user", "content": f"Question {turn}, about the number {turn * 37}? " * 2})
        prompt, _, dropped = engine.chat_prompt(messages, params.max_new_tokens)
        stream = engine.chat(messages, params, client="ann")
        reply = "".join(stream)
        if turn:
            before, _, _ = engine.chat_prompt([SYSTEM, *messages[1 + dropped : -2]])  # as it stands in the new prompt
            held = before + last[:-1]
            assert stream.stats.prompt_tokens - stream.stats.reused_tokens == len(prompt) - common(prompt, held)
            assert common(prompt, held) >= len(before)
        assert stream.dropped_messages == dropped and (dropped > 0 or not stream.stats.shifted_tokens)
        shifts += stream.stats.shifted_tokens > 0
        last = [step.token_id for step in stream.steps]
        messages.append({"role": "assistant", "content": reply})
    assert shifts >= 2


@pytest.mark.parametrize("value", ["yes", -1, 1.5])
def test_context_shift_is_a_flag_or_a_number(folder: Path, value: object) -> None:
    with pytest.raises(RequestError, match="context_shift must be True, False, or the number of tokens"):
        checked_shift(value)
    with pytest.raises(RequestError, match="context_shift must be"):
        engine_of(folder).stream(ids(3), context_shift=value)


@pytest.mark.parametrize("keep, length", [(4, 256), (0, 2), (1000, 256), (4, 4096), (10, 17)])
def test_something_goes_and_something_stays(keep: int, length: int) -> None:
    start, drop = ContextShift(keep).stretch(length)
    assert start >= 1 and drop >= 1 and start + drop <= length and start <= max(keep, 1)


@pytest.mark.parametrize("mode", ["rotate", "recompute"])
def test_the_rope_changes_between_steps_while_replies_run(folder: Path, mode: str) -> None:
    engine = engine_of(folder)
    params = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
    stream, before = engine.stream(ids(60), params), None
    for _ in stream:
        if len(stream.steps) == 12:
            before = [step.token_id for step in stream.steps]
            engine.rescale(YARN, mode)
    after = [step.token_id for step in stream.steps]
    assert stream.finish_reason == "length" and after[: len(before)] == before
    assert engine.model.rope.method.name == "yarn"
    fresh = engine_of(folder, rope_scaling=YARN)
    rest = SamplingParams(temperature=0, max_new_tokens=40 - len(before), ignore_eos=True)
    if mode == "recompute":  # from then on it is a reply of a model that was loaded like this
        assert after[len(before) :] == written(fresh, ids(60) + before, rest)
    assert written(engine, ids(70, 5)) == written(fresh, ids(70, 5))


def test_a_conversation_goes_on_with_turned_keys_or_is_read_anew(folder: Path) -> None:
    for mode, read in (("rotate", 2), ("recompute", 102)):
        engine = engine_of(folder)
        reply = written(engine, ids(80))
        engine.rescale(YARN, mode)
        engine.generate(ids(80) + reply[:20] + [7], LONG)
        assert engine.last_stats.prompt_tokens - engine.last_stats.reused_tokens in (read, read - 1)


def test_what_is_refused_changes_nothing_and_the_window_can_grow(folder: Path) -> None:
    engine = engine_of(folder, cache_memory=engine_of(folder).model.cache_bytes(512))
    rope, stream = engine.model.rope, engine.stream(ids(100), LONG)
    next(stream)
    for options, error, message in (
        ({"max_seq_len": 50}, RequestError, "less than the 1.. tokens of a sequence that is open"),
        ({"max_seq_len": 4096}, ConfigError, "cache_memory"),
        ({"mode": "slowly"}, ConfigError, "mode must be one of"),
    ):
        with pytest.raises(error, match=message):
            engine.rescale(YARN, **options)
        assert engine.model.rope == rope and engine.context_size == WINDOW
    engine.rescale(YARN, max_seq_len=512)
    assert engine.context_size == 512 and len(stream.complete().steps) == 20
    assert engine.generate(ids(400), LONG).finish_reason == "length"


def test_rescaling_within_a_callback_of_a_step_is_refused(folder: Path) -> None:
    engine, errors = engine_of(folder), []

    def progress(done: int, total: int) -> None:
        try:
            engine.rescale(YARN)
        except RequestError as error:
            errors.append(str(error))

    engine.generate(ids(50), LONG, progress=progress)
    assert errors and "within a callback of a step" in errors[0]


def test_many_threads_ask_while_the_rope_changes_back_and_forth(folder: Path) -> None:
    engine, failures = engine_of(folder), []

    def ask(number: int) -> None:
        try:
            for turn in range(4):
                written(engine, ids(40 + 20 * turn, number), context_shift=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(8):
        scaling = YARN if turn % 2 == 0 else {"rope_type": "default"}
        engine.rescale(scaling, ("rotate", "recompute")[turn // 2 % 2])
    for thread in threads:
        thread.join()
    assert not failures
