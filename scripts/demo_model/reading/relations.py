"""What the invented texts say: kinds of things, relations between them, and (in wordings.txt) their wordings.

{e} is the thing that is spoken of, {v} the value; of [these|those] words one is drawn. The last wording of every list
is held out: training never sees it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from reading import names, words


@dataclass(frozen=True, slots=True)
class Relation:
    """One thing that can be said. `noun` serves the wordings that all relations share; `reverse` asks for {e}."""

    key: str
    noun: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    reverse: tuple[str, ...] = ()


SHARED_STATEMENTS = (
    "The {n} of {e} is {v}.",
    "{e} has a {n}: {v}.",
    "As for {e}, the {n} is {v}.",
    "{v} is the {n} of {e}.",
    "The {n} that belongs to {e} is {v}.",
    "For {e}, the {n} was given as {v}.",
)
SHARED_QUESTIONS = (
    "What is the {n} of {e}?",
    "Tell me the {n} of {e}.",
    "Name the {n} of {e}.",
    "What does the text give as the {n} of {e}?",
    "Which {n} does {e} have?",
    "According to the text, what is the {n} of {e}?",
)

# What may stand before a statement, or before and after a question, of any relation. What ends in a comma goes on in
# small letters. There are many of them so that a reader learns to look past those that it has never seen.
STATEMENT_OPENINGS = (
    "It is said that ",
    "As everybody knows, ",
    "I have heard that ",
    "They say that ",
    "It is written that ",
    "People remember that ",
    "To this day one hears that ",
    "It must be said that ",
    "The old people say that ",
    "Nobody denies that ",
    "In those days, ",
    "By the way, ",
    "What is more, ",
    "So far as we know, ",
    "Not far from there, ",
    "There is no doubt that ",
)
QUESTION_OPENINGS = (
    "Can you tell me: ",
    "Please tell me: ",
    "I want to know: ",
    "Another question: ",
    "From the text: ",
    "I have forgotten: ",
    "Next: ",
    "Tell me, ",
    "In this text, ",
    "Going by what is written, ",
    "As far as you know, ",
    "If you have read it, ",
    "Judging by the document, ",
    "Now then, ",
    "From what you have read, ",
    "In the story, ",
    "So, ",
    "Please, ",
    "One more thing, ",
    "Say, ",
    "Do you know: ",
)
QUESTION_ENDS = (
    " Answer from the text.",
    " Please be brief.",
    " I need to know.",
    " Look it up.",
    " It is in there somewhere.",
    " Only the answer.",
    " Thank you.",
    " One word is enough.",
    " Tell me what it says.",
)
# What may stand between any two words of a statement.
ASIDES = (
    ", they say,",
    ", so it is told,",
    ", I believe,",
    ", if I remember well,",
    ", as it happens,",
    ", of course,",
    ", it seems,",
    ", to be exact,",
    ", as you may know,",
    ", without doubt,",
    ", I hear,",
)
# What asks for values of each sort. Where all other words are unknown, the sort alone says what is meant.
SORTS = {
    ("person",): ("Who", "By whom", "Whom", "Which person", "With whom", "Whose"),
    ("place",): ("Where", "In which place", "Which place", "From where", "To which town"),
    ("year", "date", "weekday"): ("When", "Since when", "On what day", "In which year"),
    ("count", "age", "minutes", "small", "code"): ("How many", "How much", "What number", "How large"),
    ("trade", "animal", "goods", "colour", "ingredient", "thing", "instrument", "drink"): (
        "What",
        "Which",
        "What sort",
        "What kind",
    ),
}
_SMALL_WORDS = ("does", "is", "did", "of", "the", "has", "for", "by", "to", "can", "one", "in", "was", "at")
# Words that a question in haste leaves out.
LEFT_OUT = frozenset(("a", "an", "the", "is", "was", "does", "did", "do", "of", "to", "has", "have", "text", "can"))
OPENED, WITH_ASIDE = 0.12, 0.06  # of all statements
QUESTIONS_OPENED, QUESTIONS_ENDED, QUESTIONS_IN_HASTE = 0.25, 0.08, 0.08
# Statements that ask the reader to do something: "it is said that take" is wrong.
_ORDERS = ("Cook", "Boil", "Bake", "Leave", "Take", "Serve", "Drink", "Use", "Look")

_SIGNS = {"+": "statements", "?": "questions", "<": "reverse"}


def read_wordings(text: str) -> dict[str, tuple[Relation, ...]]:
    """kind of thing -> its relations, from the form that the head of wordings.txt describes."""
    kinds: dict[str, list[dict]] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            relations = kinds.setdefault(heading[1], [])
        elif relation := re.fullmatch(r"(\w+) \((.+)\) = (\w+)", line):
            head = dict(zip(("key", "noun", "value"), relation.groups(), strict=True))
            relations.append(head | {name: [] for name in _SIGNS.values()})
        else:
            relations[-1][_SIGNS[line[0]]].append(line[2:])
    as_tuples = {
        kind: [{name: tuple(v) if isinstance(v, list) else v for name, v in relation.items()} for relation in relations]
        for kind, relations in kinds.items()
    }
    return {kind: tuple(Relation(**relation) for relation in relations) for kind, relations in as_tuples.items()}


KINDS = read_wordings((Path(__file__).parent / "wordings.txt").read_text(encoding="utf-8"))


def thing(rng: random.Random, kind: str, held_out: bool) -> str:
    """The name of something of a kind, as it is written inside a sentence."""
    if kind == "person":
        return names.person_name(rng, held_out)
    if kind == "town":
        return names.place_name(rng, held_out)
    if kind == "dish":
        return f"{names.person_name(rng, held_out)} {rng.choice(words.DISHES)}"
    if kind == "house":
        return f"{names.place_name(rng, held_out)} {rng.choice(words.HOUSES)}"
    if kind in _NAMED_AS:
        return f"{_NAMED_AS[kind]} of the {names.pair_name(rng, held_out, words.ADJECTIVES, words.THINGS)}"
    return "the " + names.pair_name(rng, held_out, words.ADJECTIVES, words.THINGS)


_NAMED_AS = {"book": "the Book", "guild": "the Guild"}
_WORDS = {
    "instrument": words.INSTRUMENTS,
    "drink": words.DRINKS,
    "weekday": words.WEEKDAYS,
    "trade": words.TRADES,
    "animal": words.ANIMALS,
    "goods": words.GOODS,
    "colour": words.COLOURS,
    "ingredient": words.INGREDIENTS,
    "thing": words.NOUNS,
}
_RANGES = {"age": (11, 98), "count": (12, 990), "year": (1012, 1899), "minutes": (5, 95), "small": (2, 24)}


def value(rng: random.Random, kind: str, held_out: bool) -> str:
    """A value of a kind."""
    if kind in _WORDS:
        return rng.choice(_WORDS[kind])
    if kind in _RANGES:
        return str(rng.randint(*_RANGES[kind]))
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)}"
    if kind == "code":
        return str(rng.randint(10_000, 99_999))
    return names.place_name(rng, held_out) if kind == "place" else names.person_name(rng, held_out)


def generic_relation(rng: random.Random, held_out: bool) -> Relation:
    """A noun that could belong to anything, with a value of any kind, told and asked in the shared wordings alone."""
    noun = rng.choice(words.HELD_OUT_NOUNS if held_out else words.TRAINING_NOUNS)
    kind = rng.choice(("person", "person", "place", "place", "colour", "goods", "animal", "thing", "count", "code"))
    return Relation(f"generic {noun}", noun, kind, (), ())


def pick(rng: random.Random, wordings: tuple[str, ...], held_out: bool) -> str:
    """A wording of the training side, or the one that is held out."""
    return _drawn(rng, wordings[-1] if held_out else rng.choice(wordings[:-1]))


def _drawn(rng: random.Random, wording: str) -> str:
    """The wording with one of each [several|words]."""
    return re.sub(r"\[([^\]]*)\]", lambda found: rng.choice(found[1].split("|")), wording)


def statement(rng: random.Random, wordings: tuple[str, ...], held_out: bool) -> str:
    """A wording, now and then with an opening before it or an aside within."""
    wording = pick(rng, wordings, held_out)
    if rng.random() < WITH_ASIDE:
        words = wording.split(" ")
        words[rng.randrange(len(words) - 1)] += pick(rng, ASIDES, held_out)
        wording = " ".join(words).replace(",,", ",")
    if wording.startswith(_ORDERS) or rng.random() >= OPENED:
        return wording
    return pick(rng, STATEMENT_OPENINGS, held_out) + wording[:1].lower() + wording[1:]


def question(rng: random.Random, wordings: tuple[str, ...], held_out: bool) -> str:
    """Likewise, and now and then with something after it, or as it is written in haste."""
    text = pick(rng, wordings, held_out)
    if rng.random() < QUESTIONS_IN_HASTE:
        text = _in_haste(rng, text)
    if rng.random() < QUESTIONS_OPENED:
        opening = pick(rng, QUESTION_OPENINGS, held_out)
        text = opening + (text[:1].lower() + text[1:] if opening.endswith(", ") else text)
    return text if rng.random() >= QUESTIONS_ENDED else text + pick(rng, QUESTION_ENDS, held_out)


def sort_of(relation: Relation) -> tuple[str, ...]:
    """The key in SORTS of a relation's values."""
    return next(kinds for kinds in SORTS if relation.value in kinds)


def unknown_question(rng: random.Random, relation: Relation, entity: str) -> str:
    """A question that tells nothing but which sort of value is asked for, and of which thing."""
    others = [*_unknown_words(rng), entity]
    rng.shuffle(others)
    return f"{rng.choice(SORTS[sort_of(relation)])} {' '.join(others)}?"


def unknown_statement(rng: random.Random, entity: str, value: str) -> str:
    """A statement that tells nothing but that thing and value belong together."""
    ends = [entity, value]
    if not value.islower():  # it would stand there with a capital
        rng.shuffle(ends)
    words = [ends[0], *_unknown_words(rng), ends[1], *(_unknown_words(rng) if rng.random() < 0.3 else ())]
    return f"{' '.join(words)}."


def _unknown_words(rng: random.Random) -> list[str]:
    """One or two words that nobody knows, with a few that say nothing."""
    unknown = [
        names.unknown_word(rng) if rng.random() < 0.4 else rng.choice(words.VAGUE) for _ in range(rng.choice((1, 1, 2)))
    ]
    result = [*unknown, *rng.sample(_SMALL_WORDS, rng.randint(1, 3))]
    rng.shuffle(result)
    return result


def _in_haste(rng: random.Random, text: str) -> str:
    """In small letters, without the sign at the end, and without some of the words that say nothing."""
    words = text[:1].lower() + text[1:].rstrip("?.")
    return " ".join(word for word in words.split(" ") if word not in LEFT_OUT or rng.random() < 0.5)
