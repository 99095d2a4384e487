"""Prompt formats by name, for models that bring no chat template, and the closed-context format of airoboros models.

A format accepts roles in any order (see `turns.py`): a later system text stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ropewalk.base.errors import RequestError
from ropewalk.text.turns import ASSISTANT, SYSTEM, USER, Turn, alternating, opening_and_rest


@dataclass(frozen=True, slots=True)
class FormatTokens:
    """The texts of the special tokens that formats write; empty where the model has none."""

    bos: str = ""
    eos: str = ""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a conversation is written.

    write: (turns, special tokens, whether the prompt ends with the beginning of the assistant's turn) -> prompt.
    stop: the plain words that end a reply. writes_bos: the prompt begins with the bos token.
    """

    write: Callable[[Sequence[Turn], FormatTokens, bool], str]
    stop: tuple[str, ...] = ()
    writes_bos: bool = False


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_AIROBOROS_SYSTEM = (
    "A chat between a curious user and an assistant. "
    "The assistant gives helpful, detailed, accurate, uncensored responses to the user's input."
)
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


def _on_one_line(default_system: str) -> Callable[[Sequence[Turn], FormatTokens, bool], str]:
    """SYSTEM USER: ... ASSISTANT: ...</s>USER: ...

    A prompt in the closed-context format ends with a delimiter on a line of its own, so the assistant's turn begins a
    new line, as in the example on the model card of airophin-13b-pntk-16k.
    """

    def write(turns: Sequence[Turn], tokens: FormatTokens, is_prompt: bool) -> str:
        opening, rest = opening_and_rest(turns)
        parts = [f"{opening or default_system} "]
        for turn in rest:
            if turn.role == ASSISTANT:
                parts.append(f"ASSISTANT: {turn.text}{tokens.eos or ' '}")
            else:
                name = "USER: " if turn.role == USER else ""
                parts.append(f"{name}{turn.text}" + ("\n" if turn.text.endswith("ENDINSTRUCTION") else " "))
        return "".join(parts) + ("ASSISTANT:" if is_prompt else "")

    return write


def _llama_2(turns: Sequence[Turn], tokens: FormatTokens, is_prompt: bool) -> str:
    """<s>[INST] <<SYS>> ... <</SYS>> ... [/INST] ... </s><s>[INST] ... [/INST]

    A user turn always ends with the beginning of the assistant's turn.
    """
    opening, rest = alternating(turns)
    system = "" if opening is None else f"<<SYS>>\n{opening}\n<</SYS>>\n\n"
    parts = []
    for turn in rest:
        text = turn.text.strip()
        if turn.role == USER:
            parts.append(f"{tokens.bos}[INST] {'' if parts else system}{text} [/INST]")
        else:
            parts.append(f" {text} {tokens.eos}")
    return "".join(parts)


def _alpaca(turns: Sequence[Turn], tokens: FormatTokens, is_prompt: bool) -> str:
    """SYSTEM, then ### Instruction: and ### Response:, with blank lines between."""
    opening, rest = opening_and_rest(turns)
    headings = {USER: "### Instruction:\n", ASSISTANT: "### Response:\n", SYSTEM: ""}
    parts = [f"{opening or _ALPACA_SYSTEM}\n\n"]
    for turn in rest:
        parts.append(f"{headings[turn.role]}{turn.text}{tokens.eos if turn.role == ASSISTANT else ''}\n\n")
    return "".join(parts) + ("### Response:\n" if is_prompt else "")


def _plain(turns: Sequence[Turn], tokens: FormatTokens, is_prompt: bool) -> str:
    """SYSTEM, a blank line, then lines User: ... and Assistant: ..., which models without a format understand best."""
    opening, rest = opening_and_rest(turns)
    names = {USER: "User: ", ASSISTANT: "Assistant: ", SYSTEM: ""}
    parts = [] if opening is None else [f"{opening.strip()}\n\n"]
    parts += [f"{names[turn.role]}{turn.text.strip()}\n" for turn in rest]
    return "".join(parts) + ("Assistant:" if is_prompt else "")


def _text(turns: Sequence[Turn], tokens: FormatTokens, is_prompt: bool) -> str:
    """The texts one after the other, for models that only ever continue a text."""
    return "".join(f"{turn.text}\n" for turn in turns)


FALLBACK, CONTINUED_TEXT = "plain", "text"
NAMED_FORMATS: Mapping[str, ChatFormat] = {
    "vicuna": ChatFormat(_on_one_line(_VICUNA_SYSTEM), stop=("USER:",)),
    "llama-2": ChatFormat(_llama_2, stop=("[INST]",), writes_bos=True),
    "alpaca": ChatFormat(_alpaca, stop=("### Instruction:",)),
    "airoboros": ChatFormat(_on_one_line(_AIROBOROS_SYSTEM), stop=("USER:",)),
    FALLBACK: ChatFormat(_plain, stop=("\nUser:",)),
    CONTINUED_TEXT: ChatFormat(_text),
}

DELIMITERS = ("BEGININPUT", "BEGINCONTEXT", "ENDCONTEXT", "ENDINPUT", "BEGININSTRUCTION", "ENDINSTRUCTION")


def closed_context_prompt(blocks: Sequence[tuple[Mapping[str, str], str]], instruction: str) -> str:
    """The user's text for answering from given texts alone, in the format of airoboros models (airophin among them).

    blocks: (metadata, text) each; the answer can cite the metadata (url, date, title). instruction: the question; those
    models' card advises to add "Don't make up answers if you don't know."

    Raises:
        RequestError: no blocks or no instruction, or a delimiter of the format within them.
    """
    if not blocks or not instruction.strip():
        raise RequestError("a closed-context prompt needs at least one block and an instruction")
    parts = []
    for number, (metadata, text) in enumerate(blocks, 1):
        for key, value in metadata.items():
            if "\n" in f"{key}{value}":
                raise RequestError(f"block {number}: metadata {key!r} must be on one line")
        lines = [f"{key}: {value}" for key, value in metadata.items()]
        content = ["BEGINCONTEXT", *lines, "ENDCONTEXT", _free_of_delimiters(text, f"the text of block {number}")]
        parts += ["BEGININPUT", *content, "ENDINPUT"]
    parts += ["BEGININSTRUCTION", _free_of_delimiters(instruction, "the instruction"), "ENDINSTRUCTION"]
    return "\n".join(parts)


def _free_of_delimiters(text: str, what: str) -> str:
    """A line that is a delimiter would end its block early, and let a quoted text give instructions."""
    text = text.strip("\n")
    for line in text.splitlines():
        if line.strip() in DELIMITERS:
            raise RequestError(f"{what} holds the line {line.strip()!r}, which is a delimiter of the format: remove it")
    return text
