"""The server under the official client, on the embedded model: what it answers is what the engine writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import httpx
import openai
import pytest

from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions
from ropewalk.files.embedded import demo_model_path
from ropewalk.generate.evaluate import sequence_perplexity
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.loader import load_model
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import RunningServer

PROMPT = "def read_lines(path):\n"
TALK = [{"role": "user", "content": "def read_lines(path):"}]
DEFAULTS = SamplingParams(temperature=0.8, top_k=20)


@pytest.fixture(scope="module")
def alone() -> Engine:
    """An engine of the same model that nobody else uses."""
    model = load_model(demo_model_path(), threads=1)
    return Engine(model, load_tokenizer(demo_model_path()), "vicuna")


@pytest.fixture(scope="module")
def server(alone: Engine) -> Iterator[RunningServer]:
    model = load_model(demo_model_path(), threads=1)
    engine = Engine(model, alone.tokenizer, "vicuna", max_running=2, queue_limit=32)
    with RunningServer(engine, AppOptions("demo", defaults=DEFAULTS)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client


def params(**settings) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.8, "top_k": 20} | settings)


def test_the_model_is_listed_and_found_with_its_context(client: openai.OpenAI, alone: Engine) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").model_extra["context_length"] == alone.context_size


def test_a_completion_is_what_the_engine_writes_with_these_settings(client: openai.OpenAI, alone: Engine) -> None:
    done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, seed=5)
    expected = alone.generate(PROMPT, params(seed=5, max_new_tokens=24))
    assert done.choices[0].text == expected.text
    assert done.choices[0].finish_reason == "length"
    assert done.usage.prompt_tokens == expected.stats.prompt_tokens
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (24, expected.stats.prompt_tokens + 24)
    assert (done.object, done.model) == ("text_completion", "demo")


def test_what_a_request_says_comes_before_the_defaults_of_the_server(client: openai.OpenAI, alone: Engine) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.25, "seed": 2}
    more = {"top_k": 0, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.1, "repetition_range": 32}
    done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, **given, extra_body=more)
    settings = given | more
    settings["typical"] = settings.pop("typical_p")
    assert done.choices[0].text == alone.generate(PROMPT, SamplingParams(**settings, max_new_tokens=20)).text


def test_a_completion_has_16_tokens_unless_it_asks_for_more(client: openai.OpenAI) -> None:
    done = client.completions.create(model="demo", prompt=PROMPT, seed=1, extra_body={"ignore_eos": True})
    assert done.usage.completion_tokens == 16


def test_a_stream_is_the_same_text_in_pieces_with_the_usage_at_its_end(client: openai.OpenAI, alone: Engine) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=24, seed=5, stream=True, stream_options=options
        )
    )
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == alone.generate(PROMPT, params(seed=5, max_new_tokens=24)).text
    assert len(texts) > 5
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_events_of_a_stream_end_with_the_word_of_openai(server: RunningServer) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    assert "usage" not in json.loads(lines[0].removeprefix("data: "))


def test_a_chat_reply_is_the_next_turn_of_the_engine(client: openai.OpenAI, alone: Engine) -> None:
    done = client.chat.completions.create(model="demo", messages=TALK, max_completion_tokens=20, seed=3)
    expected = alone.chat(TALK, params(seed=3, max_new_tokens=20)).complete()
    assert (done.choices[0].message.role, done.choices[0].message.content) == ("assistant", expected.text)
    assert done.choices[0].finish_reason == expected.finish_reason
    assert done.usage.prompt_tokens == len(alone.chat_ids(TALK))


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(client: openai.OpenAI, alone: Engine) -> None:
    chunks = list(client.chat.completions.create(model="demo", messages=TALK, max_tokens=20, seed=3, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    expected = alone.chat(TALK, params(seed=3, max_new_tokens=20)).complete()
    assert (text, chunks[-1].choices[0].finish_reason) == (expected.text, expected.finish_reason)
    assert chunks[0].object == "chat.completion.chunk"


def test_text_in_parts_and_the_developers_role_are_understood(client: openai.OpenAI, alone: Engine) -> None:
    parts = [{"type": "text", "text": "def read"}, {"type": "text", "text": "lines"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    done = client.chat.completions.create(model="demo", messages=messages, max_tokens=12, temperature=0)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def read\nlines"}]
    assert (
        done.choices[0].message.content == alone.chat(plain, params(temperature=0, max_new_tokens=12)).complete().text
    )


def test_stop_strings_end_a_reply_and_are_not_in_it(client: openai.OpenAI, alone: Engine) -> None:
    whole = alone.generate(PROMPT, params(temperature=0, max_new_tokens=40)).text
    stop = whole[12:15]
    done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "zebra"])
    assert (done.choices[0].text, done.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
    chat_whole = alone.chat(TALK, params(temperature=0, max_new_tokens=30)).complete().text
    stop = chat_whole[8:11]
    streamed = client.chat.completions.create(
        model="demo", messages=TALK, max_tokens=30, temperature=0, stop=stop, stream=True, logprobs=True
    )
    chunks = list(streamed)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == chat_whole[: chat_whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    tokens = [entry.token for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    shown = chat_whole[: chat_whole.index(stop)]
    assert "".join(tokens).startswith(shown) and not "".join(tokens[:-1]).startswith(shown + stop)


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_of_a_completion_lie_beside_its_tokens(client: openai.OpenAI, alone: Engine, streams: bool) -> None:
    settings = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "seed": 4, "logprobs": 2}
    if streams:
        parts = [c.choices[0] for c in client.completions.create(**settings, stream=True)]
        text = "".join(part.text for part in parts)
        offsets = [offset for part in parts for offset in part.logprobs.text_offset]
        values = [value for part in parts for value in part.logprobs.token_logprobs]
        tokens = [token for part in parts for token in part.logprobs.tokens]
        tops = [top for part in parts for top in part.logprobs.top_logprobs]
    else:
        choice = client.completions.create(**settings).choices[0]
        text, found = choice.text, choice.logprobs
        offsets, values, tokens, tops = found.text_offset, found.token_logprobs, found.tokens, found.top_logprobs
    expected = alone.generate(PROMPT, params(seed=4, max_new_tokens=12, logprobs=2))
    assert values == [step.logprob for step in expected.steps]
    assert "".join(tokens) == text == expected.text
    assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    assert [set(top.values()) for top in tops] == [
        {step.logprob, *(logprob for _, logprob in step.top)} for step in expected.steps
    ]


def test_logprobs_of_a_chat_reply_name_tokens_bytes_and_alternatives(client: openai.OpenAI, alone: Engine) -> None:
    done = client.chat.completions.create(
        model="demo", messages=TALK, max_tokens=10, seed=4, logprobs=True, top_logprobs=3
    )
    expected = alone.chat(TALK, params(seed=4, max_new_tokens=10, logprobs=3)).complete()
    entries = done.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == [step.logprob for step in expected.steps]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == expected.text
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [
        [logprob for _, logprob in step.top] for step in expected.steps
    ]


def test_a_bias_changes_what_is_written_and_minus_100_bans(client: openai.OpenAI, alone: Engine) -> None:
    first = alone.generate(PROMPT, params(temperature=0, max_new_tokens=1)).token_ids[0]
    biased = {"model": "demo", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    banned = client.completions.create(**biased, logit_bias={str(first): -100})
    assert banned.choices[0].text != alone.tokenizer.decode([first])
    chosen = alone.tokenizer.encode("path", add_bos=False)[-1]
    forced = client.completions.create(**biased, logit_bias={str(chosen): 100})
    assert forced.choices[0].text == alone.tokenizer.token_bytes(chosen).decode()


def test_several_replies_differ_by_their_seeds(client: openai.OpenAI, alone: Engine) -> None:
    done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, seed=7, n=3)
    expected = [alone.generate(PROMPT, params(seed=7 + number, max_new_tokens=12)) for number in range(3)]
    assert [choice.text for choice in done.choices] == [one.text for one in expected]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert done.usage.prompt_tokens == expected[0].stats.prompt_tokens
    assert done.usage.completion_tokens == sum(len(one.steps) for one in expected)
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(model="demo", messages=TALK, max_tokens=8, seed=7, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {
        number: alone.chat(TALK, params(seed=7 + number, max_new_tokens=8)).complete().text for number in range(2)
    }


def test_several_prompts_as_text_or_tokens_are_answered_in_order(client: openai.OpenAI, alone: Engine) -> None:
    texts = ["def f(", "class A:"]
    expected = [alone.generate(text, params(temperature=0, max_new_tokens=6)).text for text in texts]
    settings = {"model": "demo", "max_tokens": 6, "temperature": 0}
    by_text = client.completions.create(prompt=texts, **settings)
    by_ids = client.completions.create(prompt=[alone.tokenizer.encode(text) for text in texts], **settings)
    one = client.completions.create(prompt=alone.tokenizer.encode(texts[1]), **settings)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices] == expected
    assert one.choices[0].text == expected[1]
    assert by_text.usage.prompt_tokens == sum(len(alone.tokenizer.encode(text)) for text in texts)


def test_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    settings = {"model": "demo", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    plain = client.completions.create(**settings).choices[0].text
    assert client.completions.create(**settings, echo=True).choices[0].text == PROMPT + plain
    streamed = client.completions.create(**settings, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + plain


@pytest.mark.parametrize("streams", [False, True])
def test_echo_with_logprobs_scores_the_prompt_as_the_perplexity_does(client, alone: Engine, streams: bool) -> None:
    settings = {"model": "demo", "prompt": PROMPT, "max_tokens": 2, "seed": 1, "echo": True, "logprobs": 2}
    if streams:
        parts = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
        text = "".join(part.text for part in parts)
        values = [value for part in parts for value in part.logprobs.token_logprobs]
        offsets = [offset for part in parts for offset in part.logprobs.text_offset]
        tops = [top for part in parts for top in part.logprobs.top_logprobs]
    else:
        choice = client.completions.create(**settings).choices[0]
        text, values, offsets = choice.text, choice.logprobs.token_logprobs, choice.logprobs.text_offset
        tops = choice.logprobs.top_logprobs
    ids = alone.tokenizer.encode(PROMPT)
    assert text.startswith(PROMPT) and len(values) == len(tops) == len(offsets) == len(ids) + 2
    assert values[0] is None and tops[0] is None
    with alone.scheduler.open(ids, keep=False) as sequence:
        perplexity = sequence_perplexity(sequence)
    assert math.exp(-sum(values[1 : len(ids)]) / (len(ids) - 1)) == pytest.approx(perplexity, rel=1e-5)
    assert all(value <= max(top.values()) for value, top in zip(values[1:], tops[1:], strict=True))
    reply = alone.generate(PROMPT, params(seed=1, max_new_tokens=2, logprobs=2))
    assert values[-2:] == [step.logprob for step in reply.steps] and text == PROMPT + reply.text
    assert offsets == sorted(offsets) and offsets[len(ids)] == len(PROMPT)


@pytest.mark.parametrize("prompt", ["a</s>b", "<|user|>hi<|assistant|>", [1, 252, 171, 164]])
def test_logprobs_do_not_change_the_text_that_is_echoed(client: openai.OpenAI, prompt) -> None:
    settings = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True}
    plain = client.completions.create(**settings).choices[0].text
    choice = client.completions.create(**settings, logprobs=0).choices[0]
    assert choice.text == plain
    assert choice.logprobs.text_offset[-1] <= len(plain)
    if isinstance(prompt, str):
        assert choice.logprobs.text_offset[-1] == len(prompt)


def test_a_prompt_that_was_read_to_be_scored_does_not_count_as_cached(server: RunningServer, client) -> None:
    settings = {"model": "demo", "prompt": "a prompt that nobody has sent before " * 8, "max_tokens": 1}
    before = server.metric('ropewalk_tokens_total{kind="cached"}')
    done = client.completions.create(**settings, echo=True, logprobs=1)
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    assert server.metric('ropewalk_tokens_total{kind="cached"}') == before
    again = client.completions.create(**settings)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_no_new_tokens_can_be_asked_for(client: openai.OpenAI) -> None:
    done = client.completions.create(model="demo", prompt=PROMPT, max_tokens=0, echo=True)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (PROMPT, "length")
    assert done.usage.completion_tokens == 0


def test_a_conversation_that_goes_on_is_taken_from_the_cache(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="demo", messages=TALK, max_tokens=8, temperature=0)
    longer = [*TALK, {"role": "assistant", "content": first.choices[0].message.content}, *TALK]
    again = client.chat.completions.create(model="demo", messages=longer, max_tokens=4)
    assert again.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens - 5


def test_a_negative_seed_repeats_as_well(client: openai.OpenAI) -> None:
    settings = {"model": "demo", "prompt": PROMPT, "max_tokens": 12}
    texts = {client.completions.create(**settings, seed=-5).choices[0].text for _ in range(2)}
    assert len(texts) == 1


def test_health_says_how_busy_it_is_and_metrics_count_tokens(server: RunningServer, client: openai.OpenAI) -> None:
    health = server.get("/health").json()
    assert health == {"status": "ok", "running": 0, "max_running": 2, "waiting": 0, "queue_limit": 32}
    before = server.metric('ropewalk_tokens_total{kind="reply"}')
    replies = server.metric("ropewalk_queue_seconds_count")
    client.completions.create(model="demo", prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True})
    assert server.metric('ropewalk_tokens_total{kind="reply"}') == before + 5
    assert server.metric("ropewalk_queue_seconds_count") == replies + 1
    assert server.metric("process_resident_memory_bytes") > 1e7
    assert server.metric('ropewalk_requests_total{endpoint="/v1/completions",status="200"}') > 0
    assert server.get("/metrics").headers["content-type"].startswith("text/plain")


def test_dry_and_xtc_change_a_reply_as_they_change_the_engines(client: openai.OpenAI, alone: Engine) -> None:
    prompt = "for a in b:\n    print(a)\nfor a in b:\n    print(a)\nfor a in"
    settings = {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["%"]}
    more = settings | {"xtc_probability": 0.8, "xtc_threshold": 0.05, "seed": 3}
    for given in ({"temperature": 0}, {"temperature": 0} | settings, {"seed": 3}, more):
        body = {"model": "demo", "prompt": prompt, "max_tokens": 16}
        done = client.completions.create(**body, extra_body=given)
        assert done.choices[0].text == alone.generate(prompt, params(**given, max_new_tokens=16)).text
    plain = alone.generate(prompt, params(temperature=0, max_new_tokens=16)).text
    assert plain != alone.generate(prompt, params(temperature=0, **settings, max_new_tokens=16)).text


def test_the_reply_is_the_rest_of_the_last_message_where_that_is_asked_for(client, alone: Engine) -> None:
    messages = [*TALK, {"role": "assistant", "content": "    with open(path"}]
    done = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=8, temperature=0, extra_body={"continue_final_message": True}
    )
    expected = alone.chat(messages, params(temperature=0, max_new_tokens=8), continue_final_message=True).complete()
    assert done.choices[0].message.content == expected.text
    ids = alone.chat_ids(messages, continue_final_message=True)
    assert alone.tokenizer.decode(ids).endswith("with open(path")
    assert done.usage.prompt_tokens == len(ids)
