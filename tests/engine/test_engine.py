"""engine/engine.py: text in, text out, on a fake model with real tokenizers."""

from __future__ import annotations

import gc
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_model import FakeModel, reply
from gptq_writer import write_checkpoint
from ropewalk.base.errors import ConfigError, QueueFullError, RequestError, UnsupportedError
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.chat import ChatTemplate
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from tokenizer_writer import WRITERS, write_byte_level_json, write_config, write_sentencepiece
from variants import Variant, variants

PROMPT = "The quick brown"
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module", params=WRITERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


def engine_that_says(tokenizer: Tokenizer, text: str, prompt: str = PROMPT, **options) -> Engine:
    """An engine whose model continues `prompt` with `text` and then an end token."""
    prompt_ids = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + text)
    common = next((i for i, (a, b) in enumerate(zip(whole, prompt_ids, strict=False)) if a != b), len(prompt_ids))
    assert common == len(prompt_ids), "the text must not change the tokens of the prompt"
    script = reply([*whole[len(prompt_ids) :], tokenizer.eos_id], len(prompt_ids))
    return Engine(FakeModel(tokenizer.vocab_size, capacity=256, script=script), tokenizer, **options)


def say(tokenizer: Tokenizer, text: str, **params) -> tuple[list[str], object]:
    stream = engine_that_says(tokenizer, text).stream(PROMPT, SamplingParams(temperature=0, **params))
    return list(stream), stream


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


def test_a_stream_closed_early_frees_the_engine(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    stream = engine.stream(PROMPT, GREEDY)
    next(stream)
    stream.close()
    assert stream.finish_reason == engine.last_finish_reason == "cancelled"
    assert list(stream) == []
    assert engine.generate(PROMPT, GREEDY).text == " fox jumps over"


def test_a_stream_that_is_dropped_frees_the_engine_at_once(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    gc.disable()
    try:
        for _ in engine.stream(PROMPT, GREEDY):
            break
        assert engine.generate(PROMPT, GREEDY).text == " fox jumps over"
    finally:
        gc.enable()


def test_a_second_stream_of_one_thread_is_refused_instead_of_waiting_forever(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    stream = engine.stream(PROMPT, GREEDY)
    next(stream)
    with pytest.raises(RequestError, match="still busy with a stream that this thread began"):
        engine.generate(PROMPT, GREEDY)
    assert "".join(stream).endswith("over")


def test_threads_take_turns_and_get_the_same_text(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over the lazy dog")
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(engine.generate(PROMPT, GREEDY).text), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(texts) == 4
    assert len(set(texts)) == 1


def test_a_request_that_waits_can_be_cancelled(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    running = engine.stream(PROMPT, GREEDY)
    next(running)
    waiting = threading.Event()
    results = []

    def cancelled() -> bool:
        waiting.set()
        return True

    thread = threading.Thread(target=lambda: results.append(engine.generate(PROMPT, GREEDY, cancelled)), daemon=True)
    thread.start()
    assert waiting.wait(10)
    thread.join(timeout=10)
    assert (results[0].text, results[0].finish_reason, results[0].stats) == ("", "cancelled", None)
    assert "".join(running).endswith("over")


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
    fresh = Engine(model, engine.tokenizer).generate("A ropewalk is a long straight lane", params)
    assert hit.stats.reused_tokens > 3
    assert fresh.stats.reused_tokens == 0
    assert hit.token_ids == fresh.token_ids
    if variant.backend == "cpu":  # bit for bit; torch sums in another order for other shapes
        assert hit.steps == fresh.steps


def engine_of(folder: Path, num_caches: int, **options) -> Engine:
    """A real, tiny model on the compiled core."""
    write_checkpoint(folder, {"vocab_size": 400}, desc_act=True)
    model = Variant("cpu", "int8", None).load(write_sentencepiece(folder), max_seq_len=64, max_input_len=5)
    return Engine(model, load_tokenizer(folder), num_caches=num_caches, **options)


def random_requests() -> list[tuple[str, SamplingParams]]:
    prompts = ["A ropewalk is a long", "The quick brown fox", "A ropewalk is a long straight lane", "rope"]
    return [
        (prompts[number % 4], SamplingParams(temperature=1.0, seed=number, max_new_tokens=6 + number, logprobs=2))
        for number in range(12)
    ]


@pytest.mark.parametrize("num_caches", [2, 3])
def test_requests_that_run_together_get_bit_for_bit_what_they_get_alone(tmp_path: Path, num_caches: int) -> None:
    engine = engine_of(tmp_path, num_caches)
    requests = random_requests()
    alone = [Engine(engine.model, engine.tokenizer).generate(*request) for request in requests]
    together: dict[int, object] = {}

    def run(number: int) -> None:
        together[number] = engine.generate(*requests[number])

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [(done.text, done.steps) for done in alone] == [
        (together[number].text, together[number].steps) for number in range(len(requests))
    ]


def test_one_thread_can_hold_as_many_streams_as_there_are_caches_and_interleave_them(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, 2)
    requests = random_requests()[2:5]
    alone = [engine.generate(*request).steps for request in requests]
    first, second, third = (engine.stream(*request) for request in requests)
    next(first)
    next(second)
    with pytest.raises(RequestError, match="still busy with a stream that this thread began"):
        next(third)
    for _ in zip(first, second, strict=False):
        pass
    first.complete(), second.complete()
    assert [first.steps, second.steps] == alone[:2]


def test_a_running_reply_goes_on_between_the_layers_of_another_prompt(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, 2)
    stream = engine.stream("rope", SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True))
    next(stream)
    tokens_seen: list[int] = []

    def watch(done: int, total: int) -> None:
        deadline = time.monotonic() + 10
        while not engine._step_line.num_waiting and stream.finish_reason is None and time.monotonic() < deadline:
            time.sleep(0.001)
        tokens_seen.append(len(stream.steps))

    prompt = "A ropewalk is a long straight lane " * 2
    other = threading.Thread(target=lambda: engine.generate(prompt, progress=watch, params=GREEDY), daemon=True)
    other.start()
    stream.complete()
    other.join(timeout=30)
    assert tokens_seen[:10] == list(range(tokens_seen[0], tokens_seen[0] + 10))


def test_a_ticket_shows_its_position_and_serves_one_stream_after_another(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    with engine.enter() as ticket, engine.enter() as waiting:
        assert (ticket.position, waiting.position) == (0, 1)
        for _ in range(2):
            assert engine.generate(PROMPT, GREEDY, ticket=ticket).text == " fox jumps over"
        first = engine.stream(PROMPT, GREEDY, ticket=ticket)
        next(first)
        with pytest.raises(RequestError, match="one stream at a time"):
            engine.generate(PROMPT, GREEDY, ticket=ticket)
        first.close()
        assert not waiting.has_turn
    with pytest.raises(RequestError, match="this ticket is closed"):
        engine.generate(PROMPT, GREEDY, ticket=ticket)


def test_past_the_queue_limit_a_request_is_refused(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox", queue_limit=1)
    with engine.enter(), engine.enter():
        with pytest.raises(QueueFullError, match="1 running and 1 waiting"):
            engine.enter()
        with pytest.raises(QueueFullError):
            engine.generate(PROMPT, GREEDY)


def test_exclusive_waits_for_running_requests_and_holds_back_the_next(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over", num_caches=2)
    running = engine.enter()
    inside, leave = threading.Event(), threading.Event()

    def change() -> None:
        with engine.exclusive():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    assert not inside.wait(0.1)
    running.close()
    assert inside.wait(10)
    with engine.enter() as ticket:
        assert ticket.position == 1
        leave.set()
        assert ticket.wait(10)
    thread.join(timeout=10)


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
