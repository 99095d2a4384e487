"""Why a tour goes as it does, in one line of numbers of the model at hand."""

from __future__ import annotations

from bisect import bisect_right

from ropewalk.rope.rope import Rope
from ropewalk.text.tokenizer.load import Tokenizer
from ropewalk.tour.readers import Readers
from ropewalk.tour.tour import Tour


def why(tour: Tour, readers: Readers, is_scaled: bool, num_tokens: int) -> str:
    """What the answers of one way to read rest on. num_tokens: of the document with its question."""
    trained = readers.plain.rope.original_length
    if not is_scaled:
        if num_tokens <= trained:
            return f"Without scaling, all {num_tokens:,} positions are among the {trained:,} of the model's training."
        return (
            f"Without scaling, positions {trained:,} to {num_tokens - 1:,} are turned by angles that the model never "
            f"saw in its training on {trained:,} tokens: {1 - trained / num_tokens:.0%} of this text."
        )
    learned = "" if tour.adapter is None else f", and the LoRA {tour.adapter} was trained to read them so"
    return (
        f"Trained on {trained:,} tokens, the model reads {num_tokens:,}: {scaling_name(readers.scaled.rope)} brings "
        f"every position back among angles that it knows{learned}."
    )


def trained_part(tour: Tour, tokenizer: Tokenizer, rope: Rope) -> int:
    """How many characters at the start of the document, in whole words, are no more tokens than the training had."""
    document = tour.document
    fits = bisect_right(
        range(len(document)), rope.original_length, key=lambda n: len(tokenizer.encode(document[:n], add_bos=False))
    )
    if fits == len(document):
        return fits
    return max(document.rfind(space, 0, fits) for space in " \n") + 1


def scaling_name(rope: Rope) -> str:
    """ "NTK-by-parts by 8", as people say it."""
    factor = getattr(rope.method, "factor", None)
    names = {"linear": "linear scaling", "ntk-by-parts": "NTK-by-parts scaling", "yarn": "YaRN"}
    name = names.get(rope.method.name, rope.method.name)
    return name if factor is None else f"{name} by {factor:g}"
