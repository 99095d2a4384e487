"""What a request's prompt begins with, as a chain of hashes: the key by which a request is routed.

    text   |  block 0  |  block 1  |  block 2  | rest, too short to matter
    chain     h(0)        h(0 1)      h(0 1 2)

The hash of a block covers all that stands before it, so two requests have equal entries exactly as far as their prompts
begin alike, to a block. The text is that of the messages, before any chat template: nobody here has a tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

BLOCK_BYTES = 128  # some 32 tokens: less than that is read anew in less time than it takes to think about it
MOST_BLOCKS = 8192  # a megabyte of text, longer than any context here; what follows does not change where it goes
_BETWEEN = b"\x1f"  # no text of a message ends like the beginning of the next

Chain = tuple[int, ...]


def prefix_chain(fields: Mapping[str, Any]) -> Chain:
    """The chain of a request to /v1/chat/completions or /v1/completions; empty if the prompt is shorter than a block.

    fields: its body as JSON gives it, not yet checked: what is not as it should be counts as absent.
    """
    chain: list[int] = []
    digest = hashlib.blake2b(digest_size=8)
    rest = b""
    for piece in _pieces(fields):
        rest += piece + _BETWEEN
        end = len(rest) - len(rest) % BLOCK_BYTES
        for start in range(0, end, BLOCK_BYTES):
            digest.update(rest[start : start + BLOCK_BYTES])
            chain.append(int.from_bytes(digest.digest(), "big"))
            if len(chain) == MOST_BLOCKS:
                return tuple(chain)
        rest = rest[end:]
    return tuple(chain)


def _pieces(fields: Mapping[str, Any]) -> Iterator[bytes]:
    """What the prompt is made of, in the order in which templates write it."""
    model = fields.get("model")
    yield _bytes(model if isinstance(model, str) else "")  # pages under other adapters are other pages
    if "messages" not in fields:
        yield from _prompt(fields.get("prompt"))
        return
    if fields.get("tools"):
        yield _json(fields["tools"])  # templates put them before the first turn
    messages = fields["messages"]
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            content = message.get("content")
            yield _bytes(str(message.get("role")))
            yield _bytes(content) if isinstance(content, str) else _json(content)
            if message.get("tool_calls"):
                yield _json(message["tool_calls"])


def _prompt(prompt: Any) -> Iterator[bytes]:
    """A text, token ids, or the first of several of either."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        yield _bytes(prompt)
    elif isinstance(prompt, list):
        yield _json(prompt)[1:-1]  # without brackets: a longer list begins like a shorter one


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
