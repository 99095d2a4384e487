"""From a checked request to what the engine is asked for: prompts in token ids, settings, adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ropewalk.adapters.request import Request
from ropewalk.base.errors import RequestError
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.errors import ApiError, about, no_cache_folder
from ropewalk.faces.server.model_names import ModelNames
from ropewalk.faces.server.refusals import check_chat_fields, check_completion_fields
from ropewalk.faces.server.schema import (
    MAX_BREAKERS,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    Message,
    SamplingFields,
)
from ropewalk.generate.prompt import checked_prompt
from ropewalk.generate.routing import AUTO
from ropewalk.generate.sampling import SamplingParams, check_stop_tokens
from ropewalk.generate.scheduler.plan import BATCH, INTERACTIVE

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
BANNED = -100.0
MAX_REPLIES = 64  # of one request, which holds a turn until all are written
RENAMED = {"typical_p": "typical"}
OTHER_MEDIA = ("images", "audio", "videos")  # fields of messages in other interfaces
SAME_NAME = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "repetition_range"),
    *("frequency_penalty", "presence_penalty", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "xtc_probability", "xtc_threshold"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One reply to write. echo: the text of the prompt, if the reply begins with it. context_shift: as for
    `Engine.stream`."""

    prompt_ids: list[int]
    params: SamplingParams
    echo: str = ""
    context_shift: bool | int | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What one HTTP request asks for. ignored: fields that mean nothing here. streams, usage: how it is answered.
    priority: as `Engine.stream` takes it. keep: the name under which the prompt is to be kept, if it is."""

    model: str
    choices: tuple[Choice, ...]
    adapters: Request | None
    streams: bool
    wants_usage: bool
    ignored: Sequence[str] = ()
    priority: str = INTERACTIVE
    keep: str | None = None


@dataclass(frozen=True, slots=True)
class Desk:
    """Turns requests into work. defaults: the settings that a request leaves out."""

    engine: Engine
    names: ModelNames
    defaults: SamplingParams

    def completion(self, request: CompletionRequest) -> Work:
        """Continuations of prompts. Raises ApiError or RequestError for what cannot be done, as all methods here do."""
        ignored = check_completion_fields(request)
        tokens = request.max_tokens
        if tokens is None:
            tokens = self.defaults.max_new_tokens or COMPLETION_TOKENS
        params = self._params(request, tokens, request.logprobs)
        prompts = _prompts(request.prompt)
        if len(prompts) * (request.n or 1) > MAX_REPLIES:
            raise ApiError(400, f"{len(prompts)} prompts with n={request.n} are more than {MAX_REPLIES} replies", "n")
        choices = []
        for prompt in prompts:
            with about("prompt"):
                ids = self._checked(self.engine.encode(prompt) if isinstance(prompt, str) else prompt)
            echo = ""
            if request.echo:
                echo = prompt if isinstance(prompt, str) else self.engine.tokenizer.decode(ids)
            shift = request.context_shift
            choices += [Choice(ids, each, echo, shift) for each in _with_seeds(params, request.n or 1)]
        return self._work(request, choices, ignored)

    def chat(self, request: ChatRequest) -> Work:
        """The next turn of a conversation."""
        ignored = check_chat_fields(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        params = self._params(request, self.defaults.max_new_tokens if tokens is None else tokens, logprobs)
        template = self.engine.chat_template
        params = replace(params, stop=tuple(dict.fromkeys(params.stop + template.stop)))
        messages, variables = _messages(request.messages), _variables(request)
        with about("messages"):
            ids, shift, _ = self.engine.chat_prompt(messages, params.max_new_tokens, request.context_shift, **variables)
            ids = self._checked(ids)
        each_params = _with_seeds(params, request.n or 1)
        return self._work(request, [Choice(ids, each, context_shift=shift) for each in each_params], ignored)

    def _work(self, request: SamplingFields, choices: Sequence[Choice], ignored: Sequence[str]) -> Work:
        options = request.stream_options
        if options is not None and not request.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        return Work(
            model=self.names.base if request.model is None else request.model,
            choices=tuple(choices),
            adapters=self._adapters(request.model, choices),
            streams=bool(request.stream),
            wants_usage=bool(options and options.include_usage),
            ignored=ignored,
            priority=_priority(request),
            keep=self._checked_name(request.keep, choices),
        )

    def _adapters(self, model: str | None, choices: Sequence[Choice]) -> Request | None:
        """The adapters of all choices."""
        adapters = self.names.adapters_of(model)
        if adapters == AUTO:
            if any(len(choice.prompt_ids) < 2 for choice in choices):
                message = f"{model} chooses the adapter by the prompt, which needs at least 2 tokens for that"
                raise ApiError(400, message, "model")
        elif adapters is not None:
            with about("model"):
                self.engine.model.adapter_key(adapters)
        return adapters

    def _checked_name(self, name: str | None, choices: Sequence[Choice]) -> str | None:
        """The name that the prompt is to be kept under."""
        if name is None:
            return None
        if self.engine.kept.folder is None:
            raise no_cache_folder(400, "keep")
        if any(choice.prompt_ids is not choices[0].prompt_ids for choice in choices):
            raise ApiError(400, "keep is for one prompt: send the others in requests of their own", "keep")
        try:
            self.engine.kept.check(name, choices[0].prompt_ids)
        except RequestError as error:
            raise ApiError(400, str(error), "keep", "cannot_keep") from error
        return name

    def _params(self, request: SamplingFields, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        given = {name: getattr(request, name) for name in (*SAME_NAME, *RENAMED) if getattr(request, name) is not None}
        given = {RENAMED.get(name, name): value for name, value in given.items()}
        if "seed" in given:
            given["seed"] %= 2**63  # negative seeds are seeds too
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if given.get("top_p") == 0:
            given["top_p"] = 1e-9  # the most likely token alone
        given |= _dry_settings(request)
        if request.logit_bias:
            given["logit_bias"] = self._biases(request.logit_bias)
        with about("stop_token_ids"):
            check_stop_tokens(given.get("stop_token_ids", ()), self.engine.model.config.vocab_size)
        return replace(self.defaults, **given, max_new_tokens=max_tokens, logprobs=logprobs)

    def _biases(self, given: dict[str, float]) -> dict[int, float]:
        """By token id; as in OpenAI's interface -100 bans a token."""
        size = self.engine.model.config.vocab_size
        biases = {}
        for key, value in given.items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < size):
                message = f"logit_bias: {key[:40]!r} is not a token id: the model knows 0 to {size - 1}"
                raise ApiError(400, message, "logit_bias")
            biases[int(key)] = float("-inf") if value == BANNED else value
        if sum(value == float("-inf") for value in biases.values()) == size:
            message = f"logit_bias bans all {size} tokens: leave at least one above {BANNED:g}"
            raise ApiError(400, message, "logit_bias")
        return biases

    def _checked(self, ids: list[int]) -> list[int]:
        return checked_prompt(self.engine.model.config.vocab_size, self.engine.context_size, ids)


def _priority(request: SamplingFields) -> str:
    """How urgent it is, in our words, vLLM's numbers (lower ones first, 0 by default) or OpenAI's service tiers."""
    if request.priority is not None:
        if isinstance(request.priority, str):
            return request.priority
        return BATCH if request.priority > 0 else INTERACTIVE
    return BATCH if request.service_tier == "flex" else INTERACTIVE


def _prompts(prompt: Any) -> list[str | list[int]]:
    """A text, token ids, or several of either."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _with_seeds(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The settings of n replies, which differ in their seeds."""
    if params.seed is None:
        return [params] * n
    return [replace(params, seed=(params.seed + number) % 2**63) for number in range(n)]


def _dry_settings(request: SamplingFields) -> dict[str, Any]:
    """The settings of DRY that servers spell differently: how far it looks back, and what ends a repetition."""
    found: dict[str, Any] = {}
    if request.dry_range is not None:
        found["dry_range"] = request.dry_range or None
    if request.dry_penalty_last_n is not None:
        found["dry_range"] = request.dry_penalty_last_n if request.dry_penalty_last_n > 0 else None
        if request.dry_penalty_last_n == 0:
            found["dry_multiplier"] = 0.0
    breakers = request.dry_sequence_breakers
    if breakers is not None:
        found["dry_sequence_breakers"] = _breakers_in(breakers) if isinstance(breakers, str) else tuple(breakers)
    return found


def _breakers_in(text: str) -> tuple[str, ...]:
    """A JSON list in a string, with or without its brackets, as text-generation-webui takes it."""
    try:
        values = json.loads(text if text.lstrip().startswith("[") else f"[{text}]")
    except (ValueError, RecursionError):
        values = None
    if values is None or len(values) > MAX_BREAKERS or not all(isinstance(value, str) and value for value in values):
        message = f"dry_sequence_breakers: a list of up to {MAX_BREAKERS} texts is needed, got {text[:100]!r}"
        raise ApiError(400, message, "dry_sequence_breakers")
    return tuple(values)


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [_message(message, f"messages.{number}") for number, message in enumerate(messages)]


def _message(message: Message, place: str) -> dict[str, Any]:
    """As chat templates expect it: text in one piece, "system" for OpenAI's newer "developer", arguments as objects."""
    plain = message.model_dump(exclude_none=True)
    for name in OTHER_MEDIA:
        if plain.get(name):
            raise _only_text(f"{place}.{name}", name)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if isinstance(message.content, list):
        plain["content"] = "\n".join(_text_of(part, f"{place}.content") for part in message.content)
    for call in plain.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _object_or_text(function["arguments"])
    return plain


def _text_of(part: ContentPart, place: str) -> str:
    if part.type not in ("text", "refusal"):
        raise _only_text(place, part.type)
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise ApiError(400, f"{place}: a part of type {part.type} needs its {part.type}", place)
    return text


def _only_text(place: str, kind: str) -> ApiError:
    message = f"this model reads text only, and {place} holds {kind[:40]!r}: leave it out, or describe it in words"
    return ApiError(400, message, place, "unsupported_content")


def _object_or_text(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _variables(request: ChatRequest) -> dict[str, Any]:
    """How the conversation is written, and what else the chat template sees.

    Raises:
        ApiError: a name that the server sets itself; a last message to be both continued and answered.
    """
    variables = dict(request.chat_template_kwargs or {})
    for name in ("messages", "add_generation_prompt", "continue_final_message", "tools", "reasoning_effort"):
        if name in variables:
            raise ApiError(400, f"chat_template_kwargs: {name} cannot be set here", "chat_template_kwargs")
    if request.tools and (request.model_extra or {}).get("tool_choice") != "none":
        variables["tools"] = request.tools
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    if request.continue_final_message and request.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot be used together: set one of them"
        raise ApiError(400, message, "continue_final_message")
    if request.continue_final_message:
        variables["continue_final_message"] = True
    elif request.add_generation_prompt is not None:
        variables["add_generation_prompt"] = request.add_generation_prompt
    return variables
