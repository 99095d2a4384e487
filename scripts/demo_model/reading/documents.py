"""Invented documents: a title, facts in sentences or lines, and between them sentences that are never asked about."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from reading import names, relations
from reading.relations import KINDS, Relation


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Which parts of a document come from the side that training never sees."""

    names: bool = False
    wordings: bool = False
    types: bool = False


TRAINING = HeldOut()
UNCLEAR = 0.35  # of the things in a document, so many have one fact in words that nobody knows


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a document says. `passage` is the sentence or line that says it, as it stands in the text.

    unclear: in words that nobody knows, so that only the sort of its value tells what is meant.
    """

    relation: Relation
    kind: str
    entity: str
    value: str
    passage: str
    unclear: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A text and all that can be asked about it. `type` names the document type, for the evaluation's tables."""

    type: str
    text: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Type:
    """How a kind of document is written: which things it speaks of, and how its passages become a text."""

    name: str
    kinds: tuple[str, ...]
    write: Callable[[random.Random, list[list[str]]], str]
    as_lines: bool = False
    generic: float = 0.25


def make_document(rng: random.Random, num_facts: int, held_out: HeldOut = TRAINING, filler: float = 0.15) -> Document:
    """A document of about `num_facts` facts; `filler` is the share of sentences that say nothing that is asked."""
    document_type = rng.choice(HELD_OUT_TYPES if held_out.types else TYPES)
    groups: list[list[Fact]] = []
    taken: set[str] = set()
    while sum(map(len, groups)) < num_facts:
        kind = rng.choice(document_type.kinds)
        entity = relations.thing(rng, kind, held_out.names)
        if entity in taken:
            continue
        taken.add(entity)
        wanted = min(rng.randint(1, 4), num_facts - sum(map(len, groups)))
        groups.append(_facts(rng, document_type, kind, entity, wanted, held_out))
    if not document_type.as_lines and rng.random() < 0.3:  # what belongs together need not stand together
        groups = [[fact] for group in groups for fact in group]
        rng.shuffle(groups)
    passages = [[fact.passage for fact in group] for group in groups]
    if not document_type.as_lines:
        passages = [_with_filler(rng, group, filler) for group in passages]
    return Document(document_type.name, document_type.write(rng, passages), tuple(f for g in groups for f in g))


def _facts(
    rng: random.Random, document_type: Type, kind: str, entity: str, wanted: int, held_out: HeldOut
) -> list[Fact]:
    chosen: dict[str, Relation] = {}
    while len(chosen) < wanted:
        generic = rng.random() < document_type.generic
        relation = relations.generic_relation(rng, held_out.wordings) if generic else rng.choice(KINDS[kind])
        chosen.setdefault(relation.noun, relation)
    unclear = None
    if held_out == TRAINING and not document_type.as_lines and rng.random() < UNCLEAR:
        unclear = _one_of_its_sort(rng, list(chosen.values()))
    facts = []
    for relation in chosen.values():
        value = relations.value(rng, relation.value, held_out.names)
        if document_type.as_lines:
            passage = f"{relation.noun}: {value}"
        elif relation is unclear:
            passage = capitalised(relations.unknown_statement(rng, entity, value))
        else:
            wording = _statement(rng, relation, value, held_out.wordings)
            passage = capitalised(wording.format(e=entity, v=value, n=relation.noun))
        facts.append(Fact(relation, kind, entity, value, passage, relation is unclear))
    if document_type.as_lines:  # one line holds all that is said of a thing
        said = rng.choice(("; ", ", ")).join(fact.passage for fact in facts)
        line = capitalised(entity) + rng.choice((": ", " - ")) + said
        facts = [Fact(f.relation, f.kind, f.entity, f.value, line) for f in facts]
    return facts


def _one_of_its_sort(rng: random.Random, chosen: list[Relation]) -> Relation | None:
    """A relation whose values are of another sort than those of all others, if there is one."""
    counts = Counter(map(relations.sort_of, chosen))
    alone = [relation for relation in chosen if counts[relations.sort_of(relation)] == 1]
    return rng.choice(alone) if alone else None


def _statement(rng: random.Random, relation: Relation, value: str, held_out: bool) -> str:
    """A wording; none begins with a value in small letters, which would stand there with a capital."""
    while True:
        shared = not relation.statements or rng.random() < 0.15
        wording = relations.statement(rng, relations.SHARED_STATEMENTS if shared else relation.statements, held_out)
        if not (wording.startswith("{v}") and value.islower()):
            return wording


def capitalised(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def _with_filler(rng: random.Random, passages: list[str], share: float) -> list[str]:
    result = []
    for passage in passages:
        while rng.random() < share:
            result.append(filler_sentence(rng))
        result.append(passage)
    return result


_SUBJECTS = (
    "The rain", "The wind", "The road", "The old bridge", "The market", "The winter", "The evening", "The harvest",
    "The river", "The moon", "Nobody", "Everyone", "The council", "The fog", "The sea", "The summer", "A stranger",
    "The bell",
)  # fmt: skip
_VERBS = (
    "was quiet", "came late", "lasted long", "was remembered by all", "changed little", "surprised the visitors",
    "was better than before", "gave cause for talk", "was as cold as ever", "kept people awake", "had its own charm",
    "made the days short", "was soon forgotten", "pleased the children",
)  # fmt: skip
_ENDS = (
    "",
    "",
    " that year",
    " again",
    " in those days",
    " as people say",
    " for a while",
    " without any reason",
    " after all",
)


def filler_sentence(rng: random.Random) -> str:
    """A sentence without a fact."""
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)}{rng.choice(_ENDS)}."


def _paragraphs(rng: random.Random, groups: list[list[str]], opening: str, closing: str = "") -> str:
    parts, line = [opening] if opening else [], []
    for group in groups:
        line.extend(group)
        if rng.random() < 0.3:
            parts.append(" ".join(line))
            line = []
    if line:
        parts.append(" ".join(line))
    if closing:
        parts.append(closing)
    return "\n".join(parts)


def _prose(rng: random.Random, groups: list[list[str]]) -> str:
    return " ".join(sentence for group in groups for sentence in group)


def _chronicle(rng: random.Random, groups: list[list[str]]) -> str:
    return _paragraphs(rng, groups, f"Chronicle of {names.place_name(rng, False)}")


def _letter(rng: random.Random, groups: list[list[str]]) -> str:
    reader, writer = names.person_name(rng, False), names.person_name(rng, False)
    opening = f"Dear {reader}, " + rng.choice(
        ("here is the news.", "you asked what has happened.", "I have much to tell.")
    )
    return _paragraphs(rng, groups, opening, f"Yours, {writer}")


def _guide(rng: random.Random, groups: list[list[str]]) -> str:
    opening = rng.choice(("A short guide for travellers", "What a visitor should know", "Notes of a journey"))
    return _paragraphs(rng, groups, opening)


def _recipes(rng: random.Random, groups: list[list[str]]) -> str:
    return _paragraphs(rng, groups, rng.choice(("From the kitchen book", "Dishes of the season", "A cook's notes")))


def _ships(rng: random.Random, groups: list[list[str]]) -> str:
    return _paragraphs(rng, groups, rng.choice(("List of ships", "News from the harbour", "Ships seen this year")))


def _register(rng: random.Random, groups: list[list[str]]) -> str:
    bullet = rng.choice(("", "- ", "* "))
    mark = _mark(rng) if rng.random() < 0.5 else lambda _: bullet
    title = rng.choice(("Register", "List", "Roll", "Inventory", "Names and facts", ""))
    end = rng.choice(("", "", "", ".", ";"))
    lines = (f"{mark(number)}{group[0]}{end}" for number, group in enumerate(groups, 1))
    return "\n".join([*filter(None, (title,)), *lines])


_MARKS = (
    "{n}) ",
    "({n}) ",
    "#{n} ",
    "No. {n}: ",
    "{n}: ",
    "Item {n}: ",
    "Day {n}: ",
    "{n} - ",
    "> ",
    "~ ",
    "Page {n}. ",
)
_HEADS = (
    "Heard today:", "Note:", "Also:", "From the north:", "The traveller writes:", "In short:", "Someone added:",
    "The page says:", "Of another matter:", "Written last night:", "The guard said:", "More news:", "In the evening:",
    "The old book says:", "To be remembered:", "Our neighbour told us:",
)  # fmt: skip


def _mark(rng: random.Random) -> Callable[[int], str]:
    """What stands before each part of a document, by the part's number."""
    if rng.random() < 0.4:
        return lambda _: f"{rng.choice(_HEADS)} "
    form = rng.choice(_MARKS)
    return lambda number: form.format(n=number)


def _notes(rng: random.Random, groups: list[list[str]]) -> str:
    mark, between = _mark(rng), rng.choice(("\n", "\n", "\n\n"))
    title = rng.choice(("", "Notes", "What was said", "From a diary", "Things to remember", "News"))
    parts = (mark(number) + " ".join(group) for number, group in enumerate(groups, 1))
    return between.join([*filter(None, (title,)), *parts])


def _gazette(rng: random.Random, groups: list[list[str]]) -> str:
    return "\n\n".join(f"{number}. " + " ".join(group) for number, group in enumerate(groups, 1))


def _minutes(rng: random.Random, groups: list[list[str]]) -> str:
    heads = ("It was reported:", "The clerk noted:", "The council heard:")
    return "\n".join(["Minutes of the council", *(f"{rng.choice(heads)} " + " ".join(group) for group in groups)])


def _ledger(rng: random.Random, groups: list[list[str]]) -> str:
    return "\n".join(["Ledger", *(f"[{number}] {group[0]}." for number, group in enumerate(groups, 1))])


TYPES = (
    Type("prose", ("person", "person", "town", "ship", "inn", "house"), _prose),
    Type("prose", ("person",), _prose, generic=0.6),
    Type("chronicle", ("town", "person"), _chronicle),
    Type("letter", ("person", "inn", "ship", "house", "book"), _letter),
    Type("guide", ("town", "inn", "house", "guild"), _guide),
    Type("recipes", ("dish", "person"), _recipes),
    Type("ships", ("ship",), _ships),
    Type("notes", ("person", "town", "inn", "ship", "dish", "house", "book", "guild"), _notes),
    Type("notes", ("person", "town"), _notes, generic=0.5),
    Type("register", ("person", "ship", "town", "book"), _register, as_lines=True, generic=0.5),
)
HELD_OUT_TYPES = (
    Type("gazette", ("town", "person", "ship"), _gazette),
    Type("minutes", ("person", "inn", "town"), _minutes),
    Type("ledger", ("person", "dish", "inn"), _ledger, as_lines=True, generic=0.5),
)


def unique_values(document: Document) -> set[tuple[str, str]]:
    """(relation, value) pairs that only one thing has, so that one can ask which."""
    counts = Counter((fact.relation.key, fact.value) for fact in document.facts)
    return {pair for pair, count in counts.items() if count == 1}
