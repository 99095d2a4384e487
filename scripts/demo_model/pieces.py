"""Training of tokenizers: sentencepiece BPE that loses nothing of a text."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # as in Llama's; no padding


def train_pieces(lines: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """A sentencepiece model proto. options: of the trainer besides.

    Runs of spaces are kept (indentation), digits are split, and whatever has no piece falls back to bytes.
    """
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=proto,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=100_000,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return proto.getvalue()
