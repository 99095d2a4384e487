"""What clients may send, as OpenAI documents it, with further settings that other local servers know.

Types are strict: "5" is not a number. A field that is null counts as left out. Fields that are not here are ignored
(and named in the log), except those in `refusals.py`, which would change what the client gets.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_BREAKERS = 64

# A list of wrong items gets one complaint, not one for each item.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """Settings of a streamed reply."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="end with a chunk that holds the usage")


class SamplingFields(BaseModel):
    """What both kinds of requests share. What is left out has the defaults that the server was started with."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, description="BASE, BASE+ADAPTER:WEIGHT+..., BASE+auto; see /v1/models")
    stream: bool | None = Field(None, description="send the reply as it is written")
    stream_options: StreamOptions | None = None
    n: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="number of replies; their seeds are seed, seed + 1, ..."
    )
    max_tokens: int | None = Field(None, ge=0, description="end after this many tokens")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the most likely token")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.001, le=100)
    repetition_range: int | None = Field(None, ge=1, description="tokens that repetition_penalty looks back")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    dry_multiplier: float | None = Field(None, ge=0, le=100, description="DRY: 0 is off, usual is 0.8")
    dry_base: float | None = Field(None, ge=1, le=100)
    dry_allowed_length: int | None = Field(None, ge=1, description="tokens that may be repeated at no cost")
    dry_range: int | None = Field(None, ge=0, description="tokens that DRY looks back; 0: all")
    dry_penalty_last_n: int | None = Field(None, ge=-1, description="the same; -1: all, 0: DRY is off")
    dry_sequence_breakers: str | Annotated[list[StopText], Field(max_length=MAX_BREAKERS)] | None = Field(
        None, description="texts that end a repetition; also as JSON in a string"
    )
    xtc_probability: float | None = Field(None, ge=0, le=1, description="XTC: 0 is off, usual is 0.5")
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id -> added to its logit; -100 bans it"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="the same seed and settings give the same reply")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    priority: int | Literal["interactive", "batch"] | None = Field(
        None, description='"batch", or a number above 0: after all interactive requests'
    )
    service_tier: str | None = Field(None, description='"flex" counts as priority "batch", others as "interactive"')
    keep: str | None = Field(
        None, description="keep what was read of the prompt under this name, so that it need not be read again"
    )
    context_shift: bool | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="at the end of the window, drop the oldest and move the rest down; a number: tokens kept at the "
        "start, at most half of the window (true: the system prompt)",
    )
    user: str | None = Field(None, description="accepted, not used")


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = Field(None, description="begin the reply with the prompt")
    logprobs: int | None = Field(None, ge=0, le=20, description="number of alternatives for each token")


class ContentPart(BaseModel):
    """A piece of a message. Text is all that is read, that of a refusal too; anything else is refused by its type."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(BaseModel):
    """One turn of a conversation. Further fields are passed to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: str = Field(min_length=1)
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    continue_final_message: bool | None = Field(None, description="the reply is the rest of the last message")
    add_generation_prompt: bool | None = Field(None, description="false: the prompt ends before the assistant's turn")
    max_completion_tokens: int | None = Field(None, ge=0, description="as max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="number of alternatives for each token")
    tools: list[dict[str, Any]] | None = Field(None, description="passed to the chat template as they are")
    reasoning_effort: str | None = Field(None, description="passed to the chat template")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="further variables of the chat template")


class EmbeddingsRequest(BaseModel):
    """POST /v1/embeddings, which is refused."""

    model_config = ConfigDict(extra="allow")
