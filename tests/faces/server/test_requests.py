"""faces/server/requests.py, model_names.py: what a request means, without a network."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_model import FakeModel
from ropewalk.adapters.request import AdapterUse, format_request
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.errors import ApiError
from ropewalk.faces.server.model_names import ModelNames
from ropewalk.faces.server.requests import Desk, Work
from ropewalk.faces.server.schema import ChatRequest, CompletionRequest
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.chat import ChatTemplate
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json

TEMPLATE = "{{ tools }}|{{ reasoning_effort }}|{{ mood }}|{% for m in messages %}{{ m }}{% endfor %}"
NAMES = ModelNames("base", ("storm", "my+poet"))
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path_factory.mktemp("tokenizer")))
    template = ChatTemplate(TEMPLATE, "test", stop=("END",))
    engine = Engine(FakeModel(tokenizer.vocab_size, capacity=1024), tokenizer, template)
    return Desk(engine, NAMES, SamplingParams(temperature=0.3, stop=("Q:",)))


def completion(desk: Desk, **fields) -> Work:
    return desk.completion(CompletionRequest.model_validate({"prompt": "x"} | fields))


def chat(desk: Desk, **fields) -> Work:
    return desk.chat(ChatRequest.model_validate({"messages": TALK} | fields))


def prompt_of(desk: Desk, work: Work) -> str:
    return desk.engine.tokenizer.decode(work.choices[0].prompt_ids)


def test_what_is_left_out_or_null_takes_the_defaults(desk: Desk) -> None:
    params = completion(desk, top_p=None).choices[0].params
    assert params == SamplingParams(temperature=0.3, stop=("Q:",), max_new_tokens=16)
    assert chat(desk).choices[0].params.max_new_tokens is None
    assert chat(desk, max_tokens=5, max_completion_tokens=7).choices[0].params.max_new_tokens == 7


def test_stops_of_the_chat_template_come_besides_those_of_the_request(desk: Desk) -> None:
    assert chat(desk).choices[0].params.stop == ("Q:", "END")
    assert chat(desk, stop="A:").choices[0].params.stop == ("A:", "END")
    assert chat(desk, stop=["A:", "END"]).choices[0].params.stop == ("A:", "END")


def test_off_is_spelled_in_several_ways(desk: Desk) -> None:
    assert completion(desk, top_k=-1).choices[0].params.top_k == 0
    assert completion(desk, top_p=0).choices[0].params.top_p < 1e-6
    assert completion(desk, logit_bias={}).choices[0].params.logit_bias == {}
    biased = completion(desk, logit_bias={"7": -100, "8": 2}).choices[0].params.logit_bias
    assert biased == {7: float("-inf"), 8: 2.0}


def test_tools_effort_and_other_variables_are_handed_to_the_template(desk: Desk) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    work = chat(desk, tools=[tool], reasoning_effort="low", chat_template_kwargs={"mood": "calm"})
    assert prompt_of(desk, work).startswith(f"{[tool]}|low|calm|")
    assert prompt_of(desk, chat(desk, tools=[tool], tool_choice="none")).startswith("None|||")


def test_messages_reach_the_template_as_templates_know_them(desk: Desk) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    odd = {"id": "2", "type": "function", "function": {"name": "add", "arguments": "not json"}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, odd]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    text = prompt_of(desk, chat(desk, messages=messages)).split("|", 3)[3]
    assert text.startswith("{'role': 'system', 'content': 'a\\nb'}")
    assert "'arguments': {'a': 1}" in text and "'arguments': 'not json'" in text
    assert "'tool_call_id': '1'" in text and "'content': None" not in text


def test_so_many_replies_that_the_turn_would_never_end_are_refused(desk: Desk) -> None:
    assert len(completion(desk, prompt=["x"] * 8, n=8).choices) == 64
    with pytest.raises(ApiError) as refused:
        completion(desk, prompt=["x"] * 8, n=9)
    assert refused.value.message == "8 prompts with n=9 are more than 64 replies"


def test_fields_that_mean_nothing_here_are_named(desk: Desk) -> None:
    assert completion(desk, metadata={}, zeal=1).ignored == ["metadata", "zeal"]
    assert chat(desk, response_format={"type": "text"}, store=True).ignored == ["store"]


def test_seeds_of_several_replies_count_up_and_stay_in_range(desk: Desk) -> None:
    seeds = [choice.params.seed for choice in completion(desk, n=3, seed=2**63 - 2).choices]
    assert seeds == [2**63 - 2, 2**63 - 1, 0]
    assert [choice.params.seed for choice in completion(desk, n=2).choices] == [None, None]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES.adapters), st.floats(-4, 4, width=16)), max_size=2, unique_by=lambda x: x[0]
    )
)
def test_every_sum_of_loaded_adapters_is_a_model(chosen: list[tuple[str, float]]) -> None:
    uses = tuple(AdapterUse(name, weight) for name, weight in chosen)
    model = "+".join(["base", *([format_request(uses)] if uses else [])])
    assert (NAMES.adapters_of(model) or ()) == uses


def test_the_list_of_models_holds_what_can_be_asked_for() -> None:
    assert NAMES.listed == ["base", "base+storm", 'base+"my+poet"', "base+auto"]
    assert all(NAMES.adapters_of(name) is not None for name in NAMES.listed[1:])
    assert ModelNames("base").listed == ["base"]
    with pytest.raises(ApiError):
        ModelNames("base").adapters_of("base+auto")


def test_a_base_name_may_contain_a_plus_sign() -> None:
    names = ModelNames("l+storm", ("storm",))
    assert names.adapters_of("l+storm") is None
    assert names.adapters_of("l+storm+storm") == (AdapterUse("storm"),)


def refused(make, desk: Desk, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(desk, **fields)
    return caught.value


@pytest.mark.parametrize(
    ("name", "neutral", "wanted"),
    [
        ("mirostat", 0, 2),
        ("mirostat_mode", 0, 1),
        ("tfs", 1, 0.9),
        ("tfs_z", 1.0, 0.9),
        ("top_a", 0, 0.2),
        ("eta_cutoff", 0, 3),
        ("epsilon_cutoff", 0.0, 3),
        ("smoothing_factor", 0, 0.3),
        ("dynamic_temperature", False, True),
        ("dynatemp_range", 0, 0.5),
        ("nsigma", -1, 1.5),
        ("top_n_sigma", 0, 1.5),
        ("penalty_alpha", 0, 0.6),
        ("no_repeat_ngram_size", 0, 3),
        ("encoder_repetition_penalty", 1, 1.1),
        ("guidance_scale", 1, 1.5),
        ("cfg_scale", 1.0, 2),
        ("negative_prompt", "", "bad"),
        ("grammar", "", "root ::= x"),
        ("grammar_string", "", "root ::= x"),
        ("json_schema", {}, {"type": "object"}),
        ("guided_json", None, {"type": "object"}),
        ("guided_choice", [], ["a"]),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("do_sample", True, False),
        ("num_beams", 1, 4),
        ("best_of", 1, 2),
        ("use_beam_search", False, True),
        ("min_tokens", 0, 5),
        ("ban_eos_token", False, True),
        ("skip_special_tokens", True, False),
        ("banned_strings", [], ["no"]),
        ("prompt_logprobs", None, 1),
    ],
)
def test_settings_that_are_not_done_are_refused_by_name_and_accepted_where_they_do_nothing(
    desk: Desk, name, neutral, wanted
) -> None:
    for make in (completion, chat):
        make(desk, **{name: neutral})
        error = refused(make, desk, **{name: wanted})
        assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
        assert error.message.startswith(f"{name} is not supported: ")


@pytest.mark.parametrize(
    ("spelling", "name", "value", "other", "nothing"),
    [
        ("repeat_penalty", "repetition_penalty", 1.2, 1.3, 1.0),
        ("rep_pen_range", "repetition_range", 64, 32, 0),
        ("n_predict", "max_tokens", 20, 30, -1),
        ("stopping_strings", "stop", ["x"], ["y"], []),
        ("typical", "typical_p", 0.5, 0.6, 1),
    ],
)
def test_another_spelling_must_not_say_something_else(desk: Desk, spelling, name, value, other, nothing) -> None:
    completion(desk, **{spelling: nothing})
    completion(desk, **{spelling: value, name: value})
    for besides in ({}, {name: other}):
        error = refused(completion, desk, **{spelling: value}, **besides)
        assert error.message == f"{spelling} is called {name} here: use that name"


def test_dry_and_xtc_are_settings_of_a_request(desk: Desk) -> None:
    given = {
        "dry_multiplier": 0.8,
        "dry_base": 2,
        "dry_allowed_length": 3,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
    }
    params = completion(desk, **given, dry_range=64, dry_sequence_breakers=["a", "b"]).choices[0].params
    assert {name: getattr(params, name) for name in given} == given
    assert (params.dry_range, params.dry_sequence_breakers) == (64, ("a", "b"))
    assert chat(desk, **given, dry_range=0).choices[0].params.dry_range is None


@pytest.mark.parametrize(("last_n", "multiplier", "span"), [(-1, 0.8, None), (0, 0.0, None), (99, 0.8, 99)])
def test_dry_looks_back_as_llama_cpp_counts_it(desk: Desk, last_n: int, multiplier: float, span: int | None) -> None:
    params = completion(desk, dry_multiplier=0.8, dry_penalty_last_n=last_n).choices[0].params
    assert (params.dry_multiplier, params.dry_range) == (multiplier, span)


def test_breakers_of_dry_may_be_json_in_a_text(desk: Desk) -> None:
    for text in ('["\\n", ":"]', '"\\n", ":"'):
        params = completion(desk, dry_sequence_breakers=text).choices[0].params
        assert params.dry_sequence_breakers == ("\n", ":")
    for text in ("a, b", "[1]", '[""]', "[" * 5000, "{}x"):
        assert refused(completion, desk, dry_sequence_breakers=text).param == "dry_sequence_breakers"


def test_the_last_message_goes_on_where_that_is_asked_for(desk: Desk) -> None:
    messages = [*TALK, {"role": "assistant", "content": "Once upon"}]
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}", "test")
    other = Desk(Engine(desk.engine.model, desk.engine.tokenizer, template), NAMES, SamplingParams())
    assert prompt_of(other, chat(other, messages=messages)).endswith("assistant: Once upon;")
    for more in ({}, {"add_generation_prompt": False}):
        work = chat(other, messages=messages, continue_final_message=True, **more)
        assert prompt_of(other, work).endswith("assistant: Once upon")
    both = refused(chat, other, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert both.param == "continue_final_message" and "cannot be used together" in both.message
    hidden = {"continue_final_message": True}
    assert "continue_final_message cannot be set here" in refused(chat, other, chat_template_kwargs=hidden).message


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
        ({"content": [{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]}, "input_audio"),
        ({"content": [{"type": "file", "file": {"file_id": "x"}}]}, "file"),
        ({"content": [{"type": "video_url", "video_url": {}}]}, "video_url"),
        ({"content": "what is this", "images": ["aGk="]}, "images"),
    ],
)
def test_content_other_than_text_gets_a_sentence(desk: Desk, message, kind) -> None:
    error = refused(chat, desk, messages=[*TALK, {"role": "user"} | message])
    assert error.code == "unsupported_content" and error.param.startswith("messages.1")
    assert error.message.startswith("this model reads text only, and messages.1.") and repr(kind) in error.message


def test_a_part_of_text_needs_its_text(desk: Desk) -> None:
    error = refused(chat, desk, messages=[{"role": "user", "content": [{"type": "text"}]}])
    assert error.message == "messages.0.content: a part of type text needs its text"
