"""tokenizer.json, through the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from ropewalk.base.errors import ConfigError, UnsupportedError, brief
from ropewalk.base.json import read_json_object, shown
from ropewalk.text.tokenizer.base import BYTE_TOKEN, Tokenizer
from ropewalk.text.tokenizer.settings import TokenizerSettings

REPLACING_DECODERS = ("Metaspace", "Replace")
DECODERS = ("ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json. Its truncation and padding, meant for training, are not applied."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        self.source = path
        document = read_json_object(path)
        self._library = _library_tokenizer(path, document)
        self._decoder = TokenDecoder(document.get("decoder"), path)
        added = self._library.get_added_tokens_decoder()
        vocab = self._library.get_vocab(with_added_tokens=True)
        self._tokens = {token_id: token for token, token_id in vocab.items()}
        self._added = {token_id: self._decoder.added_bytes(token.content) for token_id, token in added.items()}
        self.vocab_size = max(self._tokens, default=-1) + 1
        self.base_vocab_size = max((token_id for token_id in self._tokens if token_id not in added), default=-1) + 1
        self.special_tokens = settings.special_tokens
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.drops_first_space = self._decoder.drops_first_space
        first_id = self._bos_of_post_processor()
        self.bos_id = self._named("bos_token")
        if self.bos_id is None and not settings.declares_bos:
            self.bos_id = first_id
        self.eos_id = self._named("eos_token")
        self.adds_bos = settings.adds_bos if settings.adds_bos is not None else first_id is not None

    def _encode(self, text: str) -> list[int]:
        with _named_errors(self.source):
            return self._library.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokens.get(token_id)
        return b"" if token is None else self._decoder.token_bytes(token)

    def id_of(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.id_of(text)

    def _bos_of_post_processor(self) -> int | None:
        """The special token that the file's post-processor puts first, if any."""
        with _named_errors(self.source):
            ids = self._library.encode("a", add_special_tokens=True).ids
        plain = self._encode("a")
        return ids[0] if ids and ids[0] in self.special_ids and ids[:1] != plain[:1] else None


class TokenDecoder:
    """The `decoder` of a tokenizer.json as a map from one token to its bytes.

    Raises:
        UnsupportedError: a decoder whose result for a token depends on its neighbours (WordPiece, CTC).
    """

    def __init__(self, decoder: Any, path: Path) -> None:
        self._steps = _flatten(decoder, path)
        kinds = [step["type"] for step in self._steps]
        for kind in kinds:
            if kind not in DECODERS:
                raise UnsupportedError(
                    f"{path}: decoder type {shown(kind)} is not supported; accepted are {', '.join(DECODERS)}"
                )
        # Without a decoder the library joins tokens with spaces.
        self._joined_by_space = not kinds
        self.drops_first_space = self._joined_by_space or any(_drops_first_space(step) for step in self._steps)
        self._byte_level = _byte_of_character() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [_replacement(step, path) for step in self._steps if step["type"] in REPLACING_DECODERS]

    def token_bytes(self, token: str) -> bytes:
        """What a token of the vocabulary stands for."""
        if self._byte_level is not None:
            found = [self._byte_level.get(character) for character in token]
            return token.encode() if None in found else bytes(found)
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return (" " + token if self._joined_by_space else token).encode()

    def added_bytes(self, token: str) -> bytes:
        """What an added token stands for: in a byte-level vocabulary its own text, otherwise as for any token."""
        return token.encode() if self._byte_level is not None else self.token_bytes(token)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """The library raises bare Exceptions, and its panics are BaseExceptions: both mean a file that it cannot handle."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError(
            f"{path} is not a tokenizer that the tokenizers library can use ({brief(error)}): download it again, "
            "or update the library if the file is newer"
        ) from error


def _library_tokenizer(path: Path, document: Mapping[str, Any]) -> LibraryTokenizer:
    with _named_errors(path):
        library = LibraryTokenizer.from_str(json.dumps(document))
    library.no_truncation()
    library.no_padding()
    return library


def _flatten(decoder: Any, path: Path) -> list[Mapping[str, Any]]:
    """The steps of a decoder, sequences flattened; the library has accepted the file, so their keys are there."""
    if decoder is None:
        return []
    if not isinstance(decoder, Mapping) or not isinstance(decoder.get("type"), str):
        raise ConfigError(f"{path}: decoder must be an object with a type, found {shown(decoder)}")
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder.get("decoders") or [] for step in _flatten(part, path)]


def _drops_first_space(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True) is not False
    return step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0


def _replacement(step: Mapping[str, Any], path: Path) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step.get("replacement", "▁"), " "
    pattern = step.get("pattern")
    if not isinstance(pattern, Mapping) or not isinstance(pattern.get("String"), str) or not pattern["String"]:
        raise UnsupportedError(f"{path}: a Replace decoder must have a String pattern, found {shown(pattern)}")
    return pattern["String"], str(step.get("content", ""))


def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level BPE uses for bytes: printable bytes as themselves, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + position): byte for position, byte in enumerate(others)}
