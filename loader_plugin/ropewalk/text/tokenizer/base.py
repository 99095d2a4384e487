"""What every tokenizer does, whatever file it came from: encode, decode, and decode as a stream.

Decoding is our own for both kinds of file: a token stands for some bytes, a text is their concatenation read as UTF-8,
and the space that a tokenizer puts before the first word is dropped. So the pieces of a stream are together exactly the
whole text, at constant cost per token. The libraries' own decoders cannot do that: they look at runs of tokens at once.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.base.errors import RequestError

# Texts that some tokenizers turn into fewer tokens than their bytes would need: collapsed spaces, fused unknown
# characters, letters that are composed or made narrow.
SHRINKING = (" ", "\n", "\u0001", "\U0010fffd", "e\u0301", "\uff41")
PROBE_LENGTH = 4096
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how sentencepiece names the tokens that stand for single bytes


class Tokenizer(ABC):
    """Text to token ids and back.

    source: the file it was read from. vocab_size: one more than the highest id. base_vocab_size: the same without
    added tokens. bos_id, eos_id: None if there is no such token. special_tokens: maps "bos_token" and the like to
    their texts, as chat templates see them. adds_bos: whether a prompt starts with the bos token unless told otherwise.
    special_ids: the tokens that `decode` leaves out. drops_first_space: see the top of the module.
    """

    source: Path
    vocab_size: int
    base_vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special_tokens: Mapping[str, str]
    special_ids: frozenset[int]
    adds_bos: bool
    drops_first_space: bool

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of the text alone; special tokens written out in it are recognised."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for: for a special token its name in UTF-8, for an unknown id none."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token given by its text ("<|im_end|>"), or None."""

    @cached_property
    def longest_token_bytes(self) -> int | None:
        """The most bytes of text that one token stands for; None if that can be more than the bytes of its own text."""
        longest = max(1, *(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size)))
        for text in SHRINKING:
            num_tokens = len(self._encode(text * PROBE_LENGTH))
            if num_tokens * longest < PROBE_LENGTH * len(text.encode()):
                return None
        return longest

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text. Special tokens written out in the text ("</s>") become those tokens.

        add_bos: start with the bos token; None: as the tokenizer's files say (`adds_bos`). It is never added twice.

        Raises:
            RequestError: not a string, or one that cannot be encoded as UTF-8; `add_bos=True` without a bos token.
        """
        if not isinstance(text, str):
            raise RequestError(f"text must be a string, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has an unpaired surrogate at character {error.start}, so it is not valid Unicode"
            ) from error
        if add_bos and self.bos_id is None:
            raise RequestError(f"add_bos=True, but {self.source} declares no bos token")
        ids = self._encode(text)
        wants_bos = self.adds_bos if add_bos is None else add_bos
        if wants_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, token_ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary have no text.

        Raises:
            RequestError: something in `token_ids` is not a token id.
        """
        stream = StreamDecoder(self, skip_special)
        return "".join([*map(stream.push, token_ids), stream.flush()])


class StreamDecoder:
    """Decodes token by token. The pieces, including that of `flush`, are together the text that `decode` gives.

    With `context_ids` (the prompt) the pieces are what the new tokens add to the text of the context: a reply that
    continues it keeps its leading space, and a character begun by its last token is completed.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, context_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        for token_id in context_ids:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while it ends in the middle of a character."""
        if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)) or token_id < 0:
            raise RequestError(f"token ids must be non-negative integers, got {token_id!r}")
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(int(token_id))
        if self._at_start and data:
            self._at_start = False
            if self._tokenizer.drops_first_space and data.startswith(b" "):
                data = data[1:]
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that was begun and never finished."""
        return self._utf8.decode(b"", final=True)


def token_text(value: Any) -> str | None:
    """The text of a token as the JSON files write it: a string, or an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
