"""Prompt formats by name, for models that bring no chat template, and the closed-context format of airoboros models.

Formats are jinja2 templates like those that models bring; `chat.py` renders them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ropewalk.base.errors import RequestError


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A template, the plain words that end a reply, and whether it writes the bos token itself."""

    template: str
    stop: tuple[str, ...] = ()
    writes_bos: bool = False


def _turns(system: str) -> str:
    """USER: ... ASSISTANT: ... on one line, after a default system text.

    A prompt in the closed-context format ends with a line of its own, and so the assistant's turn begins a line, as in
    the example on the model card of airophin-13b-pntk-16k.
    """
    return (
        "{%- set first = messages[0] -%}"
        "{%- if first['role'] == 'system' -%}{{ first['content'] + ' ' }}{%- else -%}{{ '"
        + system
        + " ' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        "{{ 'USER: ' + message['content'] }}"
        "{{ '\\n' if message['content'].endswith('ENDINSTRUCTION') else ' ' }}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
        "{%- elif not loop.first -%}"
        "{{ raise_exception('only the first message can be the system text') }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    )


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions."
)
_AIROBOROS_SYSTEM = (
    "A chat between a curious user and an assistant. "
    "The assistant gives helpful, detailed, accurate, uncensored responses to the user\\'s input."
)
_LLAMA_2 = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set opening = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set opening = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{ raise_exception('user and assistant must take turns, the user first') }}"
    "{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ bos_token + '[INST] ' + (opening if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{%- else -%}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA = (
    "{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] }}{%- else -%}{{ '" + _ALPACA_SYSTEM + "' }}"
    "{%- endif -%}{{ '\\n\\n' }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{%- elif not loop.first -%}"
    "{{ raise_exception('only the first message can be the system text') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)

NAMED_FORMATS: Mapping[str, ChatFormat] = {
    "vicuna": ChatFormat(_turns(_VICUNA_SYSTEM), stop=("USER:",)),
    "llama-2": ChatFormat(_LLAMA_2, stop=("[INST]",), writes_bos=True),
    "alpaca": ChatFormat(_ALPACA, stop=("### Instruction:",)),
    "airoboros": ChatFormat(_turns(_AIROBOROS_SYSTEM), stop=("USER:",)),
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
