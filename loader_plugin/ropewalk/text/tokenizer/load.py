"""From a model folder to its tokenizer.

tokenizer.json is preferred if both kinds of file are there: it is what transformers uses, it holds the tokens that
a fine-tune added, and it keeps runs of spaces that some tokenizer.model files collapse. The exception is a
tokenizer.json that loses text, which quantisers have written by saving a sentencepiece vocabulary with byte-level
rules: its words come back without their spaces. That is found by encoding and decoding a short text, and
tokenizer.model is used instead.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ropewalk.base.errors import ConfigError
from ropewalk.base.json import require_folder
from ropewalk.files.local import local_folder
from ropewalk.text.tokenizer.base import StreamDecoder, Tokenizer
from ropewalk.text.tokenizer.json import JsonTokenizer
from ropewalk.text.tokenizer.sentencepiece import SentencePieceTokenizer
from ropewalk.text.tokenizer.settings import read_tokenizer_settings

__all__ = ["StreamDecoder", "Tokenizer", "check_tokenizer_fits", "load_tokenizer"]

logger = logging.getLogger(__name__)

PROBE = "The answer is 42, of course.\nNext line"


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, or of a name on the hub: tokenizer.json, or tokenizer.model.

    The top of the module says which.

    Raises:
        ConfigError: the folder or both files are missing, or a file is damaged.
        UnsupportedError: a tokenizer.json whose decoder is not implemented.
    """
    if not isinstance(folder, (str, Path)):
        raise ConfigError(f"the tokenizer folder must be a path, got {type(folder).__name__}")
    folder = local_folder(folder, weights=False)
    require_folder(folder, "tokenizer and config.json")
    json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    settings = read_tokenizer_settings(folder)
    if not json_path.exists() and not model_path.exists():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"{folder} has no tokenizer: tokenizer.json or tokenizer.model is needed (found: {found}); copy it from "
            "the model that this one was quantised from"
        )
    if not json_path.exists():
        return SentencePieceTokenizer(model_path, settings)
    tokenizer = JsonTokenizer(json_path, settings)
    if keeps_text(tokenizer):
        return tokenizer
    if model_path.exists():
        other = SentencePieceTokenizer(model_path, settings)
        if keeps_text(other):
            logger.warning("%s loses text when encoding; using %s", json_path, model_path.name)
            return other
    logger.warning("%s changes text when encoding: %r comes back as %r", json_path, PROBE, _round_trip(tokenizer))
    return tokenizer


def check_tokenizer_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that belongs to another model.

    Added tokens beyond the model's vocabulary only cause a warning: many folders from 2023 have a pad token that their
    embeddings lack, and no prompt needs it.

    Raises:
        ConfigError: the tokenizer's own vocabulary is larger than the model's.
    """
    if tokenizer.base_vocab_size > vocab_size:
        raise ConfigError(
            f"{tokenizer.source} has {tokenizer.base_vocab_size} tokens, but the model has only {vocab_size} "
            "(vocab_size of its config.json): it belongs to another model"
        )
    if tokenizer.vocab_size > vocab_size:
        logger.warning(
            "%s has added tokens with ids up to %d, but the model knows only ids 0 to %d: prompts that use them fail",
            tokenizer.source,
            tokenizer.vocab_size - 1,
            vocab_size - 1,
        )


def keeps_text(tokenizer: Tokenizer) -> bool:
    """Whether encoding and decoding a plain English text gives the same text back."""
    return _round_trip(tokenizer) == PROBE


def _round_trip(tokenizer: Tokenizer) -> str:
    return tokenizer.decode(tokenizer.encode(PROBE, add_bos=False))
