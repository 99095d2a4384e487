"""Writes small tokenizers of each kind into a folder, trained on a few sentences in a fraction of a second."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A ropewalk is a long straight lane where rope is made.",
    "def read_lines(path):\n    return open(path).read().splitlines()",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, 1234567890.",
] * 20
SPECIAL = ("<unk>", "<s>", "</s>")
LLAMA_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_sentencepiece(folder: Path, collapse_spaces: bool = False, **config: object) -> Path:
    """tokenizer.model like Llama's: byte fallback, a space before the first word, identity normalisation."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=collapse_spaces,
        allow_whitespace_only_pieces=not collapse_spaces,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if config:
        write_config(folder, **config)
    return folder


def write_fallback_json(folder: Path, **config: object) -> Path:
    """tokenizer.json as Llama conversions have it: pieces with U+2581 for spaces, bytes as <0xAB>."""
    bytes_first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=bytes_first, show_progress=False)
    # As in sentencepiece, no piece reaches over the beginning of a word.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.pre_tokenizer = None
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in SPECIAL]
    return _write_json(folder, document, config or LLAMA_CONFIG)


def write_byte_level_json(folder: Path, **config: object) -> Path:
    """tokenizer.json as Qwen and Llama 3 have it: byte-level BPE with chat tokens behind the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    chat_tokens = ("<|begin|>", "<|end|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in chat_tokens])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    document = json.loads(tokenizer.to_str())
    return _write_json(folder, document, config or {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}})


def write_config(folder: Path, name: str = "tokenizer_config.json", **values: object) -> None:
    """One of the JSON files beside a tokenizer."""
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def _write_json(folder: Path, document: dict, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    write_config(folder, **config)
    return folder


WRITERS = {"sentencepiece": write_sentencepiece, "fallback": write_fallback_json, "byte-level": write_byte_level_json}
