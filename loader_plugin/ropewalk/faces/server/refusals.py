"""Fields that this server does not implement and that would change the reply: refused by name instead of ignored.

Programs send all settings that they know, most of them with values that do nothing; those are accepted. The names are
those of OpenAI, vLLM, llama.cpp, text-generation-webui, KoboldCpp, Aphrodite and Ollama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.faces.server.errors import ApiError
from ropewalk.faces.server.schema import ChatRequest, CompletionRequest, SamplingFields


@dataclass(frozen=True, slots=True)
class Refusal:
    """allowed: values that ask for nothing special. reason: what to do instead."""

    reason: str
    allowed: Callable[[Any], bool] = lambda value: False


def _is(*neutral: Any) -> Callable[[Any], bool]:
    """Exactly these values; 0, 0.0 and False count as the same."""
    return lambda value: value in neutral


def _all_of(names: str, refusal: Refusal) -> dict[str, Refusal]:
    return dict.fromkeys(names.split(), refusal)


def _at_most_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= 0


_SAMPLERS = "this sampler is not implemented; temperature, top_p, min_p, typical_p, DRY and XTC are"
_NO_GRAMMAR = "replies are not constrained to a format here; ask for it in the prompt"
_ONE_PATH = "replies are drawn token by token; ask for n of them"
_ENDS = "replies end where the model ends them; ignore_eos goes on to max_tokens"
_TWO_PROMPTS = "there is no guidance by a second prompt here"
_OTHER_TEXT = "the prompt is taken as it is"

_ANYWHERE: dict[str, Refusal] = {
    **_all_of("mirostat mirostat_mode top_a eta_cutoff epsilon_cutoff smoothing_factor", Refusal(_SAMPLERS, _is(0))),
    **_all_of("dynamic_temperature dynatemp_range dynatemp_min dynatemp_max skew", Refusal(_SAMPLERS, _is(0))),
    **_all_of("penalty_alpha no_repeat_ngram_size", Refusal(_SAMPLERS, _is(0))),
    **_all_of("tfs tfs_z encoder_repetition_penalty repetition_decay", Refusal(_SAMPLERS, _is(1))),
    **_all_of("nsigma top_n_sigma", Refusal(_SAMPLERS, _at_most_zero)),
    **_all_of("adaptive_target", Refusal(_SAMPLERS, _at_most_zero)),
    **_all_of("guidance_scale cfg_scale", Refusal(_TWO_PROMPTS, _is(1))),
    "negative_prompt": Refusal(_TWO_PROMPTS, _is("")),
    **_all_of("grammar grammar_string guided_grammar guided_regex", Refusal(_NO_GRAMMAR, _is(""))),
    **_all_of("json_schema guided_json structured_outputs", Refusal(_NO_GRAMMAR, _is("", {}))),
    **_all_of("guided_choice", Refusal(_NO_GRAMMAR, _is([]))),
    "response_format": Refusal(_NO_GRAMMAR, _is({"type": "text"})),
    "do_sample": Refusal("use temperature 0 for the most likely tokens", _is(True)),
    **_all_of("num_beams best_of", Refusal("all replies are returned; ask for n of them", _is(1))),
    "use_beam_search": Refusal(_ONE_PATH, _is(False)),
    **_all_of("min_tokens min_new_tokens min_length", Refusal(_ENDS, _is(0))),
    "ban_eos_token": Refusal("use ignore_eos", _is(False)),
    "include_stop_str_in_output": Refusal("a stop text is not part of the reply", _is(False)),
    "skip_special_tokens": Refusal("special tokens are not part of the reply's text", _is(True)),
    **_all_of("add_bos_token add_special_tokens", Refusal("bos is added where the model wants it", _is(True))),
    **_all_of("custom_token_bans banned_tokens", Refusal("ban tokens with logit_bias", _is("", []))),
    **_all_of("banned_strings bad_words allowed_token_ids", Refusal("ban tokens with logit_bias", _is("", []))),
    "truncate_prompt_tokens": Refusal(_OTHER_TEXT, _at_most_zero),
    "prompt_logprobs": Refusal("use echo and logprobs of /v1/completions", lambda value: False),
    "prompt_embeds": Refusal("prompts are text or token ids"),
}
_COMPLETIONS: dict[str, Refusal] = {
    "suffix": Refusal("text is continued at its end only", _is("")),
    **_all_of("images image_data multimodal_data", Refusal("this model reads text only", _is([]))),
}
_CHAT: dict[str, Refusal] = {
    "echo": Refusal("the reply holds only new text", _is(False)),
    "functions": Refusal("this is the old form; use tools, which are passed to the chat template", _is([])),
    "function_call": Refusal("calls are not forced; leave it out", _is("auto", "none")),
    "tool_choice": Refusal('calls are not forced; use "auto" or "none"', _is("auto", "none")),
    "modalities": Refusal("replies are text", _is(["text"])),
    "audio": Refusal("replies are text"),
    "web_search_options": Refusal("there is no web search here"),
    "chat_template": Refusal("the template is chosen when the server is started, with --chat-template"),
    "documents": Refusal("put them into the messages", _is([])),
}
# Other spellings of existing fields: accepted if they say the same, or nothing.
_SPELLINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("repeat_penalty", "rep_pen"), ("repetition_penalty", _is(1))),
    **dict.fromkeys(
        ("repeat_last_n", "rep_pen_range", "repetition_penalty_range"), ("repetition_range", _at_most_zero)
    ),
    **dict.fromkeys(("max_new_tokens", "n_predict", "num_predict", "max_length"), ("max_tokens", _at_most_zero)),
    **dict.fromkeys(("stopping_strings", "custom_stopping_strings", "stop_sequence"), ("stop", _is("", []))),
    "typical": ("typical_p", _is(1)),
    "sampler_seed": ("seed", _at_most_zero),
}


def check_completion_fields(request: CompletionRequest) -> list[str]:
    """The names of the fields that are ignored.

    Raises:
        ApiError: one must not be ignored.
    """
    return _check(request, _ANYWHERE | _COMPLETIONS)


def check_chat_fields(request: ChatRequest) -> list[str]:
    """As `check_completion_fields`, for a conversation."""
    return _check(request, _ANYWHERE | _CHAT)


def _check(request: SamplingFields, refusals: Mapping[str, Refusal]) -> list[str]:
    extra = {name: value for name, value in (request.model_extra or {}).items() if value is not None}
    for name, value in extra.items():
        refusal = refusals.get(name)
        if name == "best_of" and value == request.n:
            continue  # all of them are returned
        if refusal is not None and not refusal.allowed(value):
            raise ApiError(400, f"{name} is not supported: {refusal.reason}", name, "unsupported_parameter")
        if name in _SPELLINGS:
            ours, does_nothing = _SPELLINGS[name]
            if not does_nothing(value) and value != getattr(request, ours):
                raise ApiError(400, f"{name} is called {ours} here: use that name", name, "unsupported_parameter")
    return sorted(name for name in request.model_extra or {} if name not in refusals)
