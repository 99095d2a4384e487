"""Invented names: syllables joined, so that nothing can be known by heart and a name is two or three tokens.

One in ten is loose: any letters that can be spoken, so that a reader learns to copy what its tokenizer cuts in bits, as
it does with the names of the world.
Every name belongs to one side for good: one in ten (by the hash of its spelling) is never seen in training.
"""

from __future__ import annotations

import random
import zlib

from reading.words import word_list

HELD_OUT_ONE_IN = 10
LOOSE = 0.1

_ONSETS = word_list(
    """
    b br c d dr f g gr h j k l m n p r s st t th tr v w z
    """
)
_FIRST_RIMES = word_list(
    """
    al an ar el en er il in or ul
    """
)
LAST_SYLLABLES = word_list(
    """
    ba bas bek beth bin bor bran da dak das del den der dis dok dor dra dun fa fas fen fin for ga gas gen gil
    gon gor ka kas kel ken kil kin kor la las len lin lo lok los lun ma mas mek men mer min mir mon mor na nak
    nas nel nes nik nin nor nos pa pas pel pin por ra rak ras rek rel ren ret rik ril rin ris rok ron ros sa sek
    sel sen ser sin sk son sor ta tak tas tek tel ten ter tin tis tok tor tos va vas vek ven vik vin vor wen win
    za zan zek zel zin zor
    """
)
_MIDDLE_SYLLABLES = word_list(
    """
    a e i o de la li ma mi na ne ra re ri ro sa se ta te vi
    """
)
PLACE_ENDINGS = word_list(
    """
    bury by cross dale den fell field ford gate ham haven hill holm ley mere mill moor mouth ness port ridge
    stead stow thorpe ton vale well wick wood worth
    """
)

_LOOSE_ONSETS = ("", *word_list("b br c ch d f g gr h j k l m n p ph r s sh st t th v w y z"))
_LOOSE_MIDDLES = word_list("b ch d f g j k l ll ld m mm n nd nn p ph r rr rt s sh ss st t th tt v w z")
_LOOSE_VOWELS = word_list("a a a a e e e e i i i o o o u u ai au ea ia ie io")
_LOOSE_CODAS = ("", "", *word_list("b ck d f g l ll m n nn r rd s ss t tt x z"))

FIRST_SYLLABLES = tuple(
    (onset + rime).capitalize()
    for number, onset in enumerate(_ONSETS)
    for index, rime in enumerate(_FIRST_RIMES)
    if (number + index) % 2 == 0  # half of them: 120 pieces of the vocabulary
)


def is_held_out(name: str) -> bool:
    """Whether a name is kept for evaluation."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def person_name(rng: random.Random, held_out: bool) -> str:
    """Two syllables, sometimes three: "Mardun", "Zelirok"."""
    return _on_side(rng, held_out, _person)


def place_name(rng: random.Random, held_out: bool) -> str:
    """Like a person's name, or with an ending of places: "Belwick"."""
    return _on_side(rng, held_out, _place)


def pair_name(rng: random.Random, held_out: bool, firsts: tuple[str, ...], seconds: tuple[str, ...]) -> str:
    """Two words that meet for the first time: "Grey Heron"."""
    return _on_side(rng, held_out, lambda r: f"{r.choice(firsts)} {r.choice(seconds)}")


def unknown_word(rng: random.Random) -> str:
    """A word that means nothing, with an ending that words have: "grezanned"."""
    return _loose(rng).lower() + rng.choice(("", "", "ed", "s", "ing"))


def _on_side(rng: random.Random, held_out: bool, draw) -> str:
    while True:
        name = draw(rng)
        if is_held_out(name) == held_out:
            return name


def _person(rng: random.Random) -> str:
    if rng.random() < LOOSE:
        return _loose(rng)
    middle = rng.choice(_MIDDLE_SYLLABLES) if rng.random() < 0.15 else ""
    return rng.choice(FIRST_SYLLABLES) + middle + rng.choice(LAST_SYLLABLES)


def _place(rng: random.Random) -> str:
    if rng.random() < LOOSE:
        return _loose(rng)
    ending = rng.choice(PLACE_ENDINGS) if rng.random() < 0.7 else rng.choice(LAST_SYLLABLES)
    return rng.choice(FIRST_SYLLABLES) + ending


def _loose(rng: random.Random) -> str:
    first = rng.choice(_LOOSE_ONSETS) + rng.choice(_LOOSE_VOWELS)
    more = (rng.choice(_LOOSE_MIDDLES) + rng.choice(_LOOSE_VOWELS) for _ in range(rng.choice((1, 1, 2))))
    return (first + "".join(more) + rng.choice(_LOOSE_CODAS)).capitalize()
