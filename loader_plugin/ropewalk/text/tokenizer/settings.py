"""The small JSON files beside a tokenizer: special tokens, added tokens, whether prompts start with bos.

Read from tokenizer_config.json, special_tokens_map.json and added_tokens.json, each of which may be absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.base.errors import ConfigError
from ropewalk.base.json import read_json_object, shown
from ropewalk.text.tokenizer.base import token_text

MAX_TOKEN_ID = 1 << 24
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that a fine-tune added to the vocabulary, matched as a whole before the text is split into words."""

    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """special_tokens: maps "bos_token" and the like to their texts. adds_bos: None if no file says. added: by token id.

    declares_bos: whether any file mentions the bos token (null means that there is none).
    legacy: the old behaviour of putting a space before the text after every special token (transformers #24565).
    """

    special_tokens: Mapping[str, str]
    declares_bos: bool
    adds_bos: bool | None
    added: Mapping[int, AddedToken]
    legacy: bool


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """Read the settings from the files of `folder`.

    Raises:
        ConfigError: a file is not JSON, or a value in it has the wrong type.
    """
    config_path = folder / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.exists() else {}
    map_path = folder / "special_tokens_map.json"
    named = read_json_object(map_path) if map_path.exists() else {}
    both = {**named, **{key: value for key, value in config.items() if value is not None or key not in named}}
    special = {name: text for name in NAMED_TOKENS if (text := token_text(both.get(name))) is not None}
    return TokenizerSettings(
        special_tokens=special,
        declares_bos="bos_token" in both,
        adds_bos=_optional_flag(config, "add_bos_token", config_path),
        added={**_added_tokens_file(folder, special), **_added_tokens_decoder(config, config_path)},
        legacy=_optional_flag(config, "legacy", config_path) is not False,
    )


def _optional_flag(config: Mapping[str, Any], key: str, path: Path) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{path}: {key} must be true, false or null, found {shown(value)}")
    return value


def _added_tokens_decoder(config: Mapping[str, Any], path: Path) -> dict[int, AddedToken]:
    """`added_tokens_decoder`: {"32000": {"content": "<pad>", "special": true, ...}}."""
    table = config.get("added_tokens_decoder") or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: added_tokens_decoder must be an object, found {shown(table)}")
    added = {}
    for key, value in table.items():
        text = token_text(value)
        if not re.fullmatch(r"[0-9]{1,8}", key) or int(key) > MAX_TOKEN_ID or text is None:
            raise ConfigError(
                f"{path}: added_tokens_decoder must map token ids to objects with content, "
                f"found {shown(key)}: {shown(value)}"
            )
        added[int(key)] = AddedToken(text, isinstance(value, Mapping) and value.get("special") is True)
    return added


def _added_tokens_file(folder: Path, special: Mapping[str, str]) -> dict[int, AddedToken]:
    """added_tokens.json: {"<pad>": 32000}; a token that is also a named special token is special."""
    path = folder / "added_tokens.json"
    if not path.exists():
        return {}
    added = {}
    for text, token_id in read_json_object(path).items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= MAX_TOKEN_ID:
            raise ConfigError(f"{path}: {shown(text)} must be mapped to a token id, found {shown(token_id)}")
        added[token_id] = AddedToken(text, text in special.values())
    return added
