"""tokenizer.model, through the sentencepiece library."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from ropewalk.base.errors import ConfigError, brief
from ropewalk.base.json import read_small_file
from ropewalk.text.tokenizer.base import BYTE_TOKEN, Tokenizer
from ropewalk.text.tokenizer.settings import AddedToken, TokenizerSettings

SPACE = "▁"
# A serialized ModelProto followed by this is the same model with normalizer_spec.add_dummy_prefix = false: concatenated
# protocol buffers merge (field 3, two bytes: field 3 = 0). The library has no call for it.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model, with the tokens that the JSON files beside it add."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        self.source = path
        data = read_small_file(path)
        self._model = _processor(data, path)
        self._model_without_prefix = self._model if settings.legacy else _processor(data + NO_DUMMY_PREFIX, path)
        self.base_vocab_size = self._model.vocab_size()
        self._pieces = _pieces(self._model, path)
        self._added = {i: t for i, t in settings.added.items() if i >= self.base_vocab_size}
        self.vocab_size = max(self._added, default=self.base_vocab_size - 1) + 1
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id(), "unk_token": self._model.unk_id()}
        own = {name: self._pieces[token_id] for name, token_id in ids.items() if token_id >= 0}
        self.special_tokens = {**own, **settings.special_tokens}
        self._marked = self._marked_tokens(settings.added)
        self._split = _splitter(self._marked)
        self.special_ids = self._special_ids(settings.added)
        self.bos_id = self._named("bos_token")
        self.eos_id = self._named("eos_token")
        self.adds_bos = self.bos_id is not None if settings.adds_bos is None else settings.adds_bos
        self.drops_first_space = "".join(self._model.encode("a", out_type=str)).startswith(SPACE)
        self._bytes = [self._piece_bytes(token_id) for token_id in range(self.base_vocab_size)]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        model = self._model
        for part in self._split(text):
            if part in self._marked:
                ids.append(self._marked[part])
                model = self._model_without_prefix
            elif part:
                ids.extend(model.encode(part))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < len(self._bytes):
            return self._bytes[token_id]
        added = self._added.get(token_id)
        return b"" if added is None else added.text.encode()

    def id_of(self, token: str) -> int | None:
        if token in self._marked:
            return self._marked[token]
        token_id = self._model.piece_to_id(token)
        return token_id if self._pieces[token_id] == token else None

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.id_of(text)

    def _marked_tokens(self, added: Mapping[int, AddedToken]) -> dict[str, int]:
        """Tokens that are matched in text as a whole: added, control and named ones."""
        pieces = {piece: token_id for token_id, piece in enumerate(self._pieces)}
        controls = {piece: i for piece, i in pieces.items() if self._model.is_control(i) or self._model.is_unknown(i)}
        named = {text: pieces[text] for text in self.special_tokens.values() if text in pieces}
        return {**controls, **named, **{token.text: token_id for token_id, token in added.items()}}

    def _special_ids(self, added: Mapping[int, AddedToken]) -> frozenset[int]:
        named = {self._marked[text] for text in self.special_tokens.values() if text in self._marked}
        own = {i for i in range(self.base_vocab_size) if self._model.is_control(i) or self._model.is_unknown(i)}
        return frozenset(named | own | {token_id for token_id, token in added.items() if token.special})

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        if self._model.is_byte(token_id) and (match := BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode()


def _processor(data: bytes, path: Path) -> SentencePieceProcessor:
    if data.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
    try:
        processor = SentencePieceProcessor()
        if data:
            processor.load_from_serialized_proto(data)
        empty = not data or processor.vocab_size() == 0
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a sentencepiece model ({brief(error)}): download it again") from error
    if empty:
        raise ConfigError(f"{path} is not a sentencepiece model (it is empty): download it again")
    return processor


def _pieces(processor: SentencePieceProcessor, path: Path) -> list[str]:
    """The text of every piece."""
    try:
        return [processor.id_to_piece(token_id) for token_id in range(processor.vocab_size())]
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is damaged: a piece is not UTF-8 text ({brief(error)}); download it again"
        ) from error


def _splitter(marked: dict[str, int]) -> Callable[[str], list[str]]:
    """A function that splits a text at the marked tokens and keeps them as separate parts; the longest match wins."""
    names = sorted(marked, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})").split if names else lambda text: [text]
