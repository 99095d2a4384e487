"""What the invented texts say: kinds of things, relations between them, and the wordings of statements and questions.

{e} is the thing that is spoken of, {v} the value. The last wording of every list is held out: training never sees it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

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

KINDS: dict[str, tuple[Relation, ...]] = {
    "person": (
        Relation(
            "home",
            "home",
            "place",
            (
                "{e} lives in {v}.",
                "{e} has a house in {v}.",
                "The house of {e} stands in {v}.",
                "In {v} lives {e}.",
                "{e} settled in {v} long ago.",
                "You will find {e} living in {v}.",
            ),
            (
                "Where does {e} live?",
                "In which place does {e} live?",
                "Where is the house of {e}?",
                "Where would I find the home of {e}?",
            ),
            ("Who lives in {v}?", "Whose house is in {v}?", "Who has a home in {v}?"),
        ),
        Relation(
            "birthplace",
            "birthplace",
            "place",
            (
                "{e} was born in {v}.",
                "{e} came into the world in {v}.",
                "{v} is where {e} was born.",
                "{e} comes from {v}.",
                "The birth of {e} was in {v}.",
            ),
            (
                "Where was {e} born?",
                "In which place was {e} born?",
                "Where does {e} come from?",
                "Which place saw the birth of {e}?",
            ),
            ("Who was born in {v}?", "Who comes from {v}?", "Whose birthplace is {v}?"),
        ),
        Relation(
            "trade",
            "trade",
            "trade",
            (
                "{e} is a {v}.",
                "{e} works as a {v}.",
                "{e} earns a living as a {v}.",
                "By trade {e} is a {v}.",
                "{e} has been a {v} for years.",
                "Everybody knows {e} the {v}.",
            ),
            (
                "What is the trade of {e}?",
                "What does {e} work as?",
                "What work does {e} do?",
                "How does {e} earn a living?",
            ),
            ("Who is a {v}?", "Who works as a {v}?", "Which person is a {v} by trade?"),
        ),
        Relation(
            "age",
            "age",
            "age",
            (
                "{e} is {v} years old.",
                "{e} is aged {v}.",
                "{e} has lived for {v} years.",
                "At {v} years of age, {e} is well.",
                "{e} turned {v} this year.",
            ),
            (
                "How old is {e}?",
                "What age is {e}?",
                "How many years has {e} lived?",
                "What is the age of {e} in years?",
            ),
            ("Who is {v} years old?", "Who is aged {v}?", "Which person is {v} years of age?"),
        ),
        Relation(
            "spouse",
            "spouse",
            "person",
            (
                "{e} is married to {v}.",
                "{e} married {v}.",
                "{e} and {v} are husband and wife.",
                "{e} has wed {v}.",
                "{e} shares a marriage with {v}.",
            ),
            ("Who is {e} married to?", "Who did {e} marry?", "Who is the spouse of {e}?", "With whom is {e} married?"),
        ),
        Relation(
            "teacher",
            "teacher",
            "person",
            (
                "{e} was taught by {v}.",
                "{v} taught {e} everything.",
                "{e} learned from {v}.",
                "{e} is a pupil of {v}.",
                "{v} gave lessons to {e}.",
            ),
            ("Who taught {e}?", "Who was the teacher of {e}?", "From whom did {e} learn?", "Who gave {e} lessons?"),
            ("Who was taught by {v}?", "Who learned from {v}?", "Who had {v} as a teacher?"),
        ),
        Relation(
            "pet",
            "pet",
            "animal",
            (
                "{e} keeps a {v}.",
                "{e} owns a {v}.",
                "{e} has a tame {v}.",
                "A {v} belongs to {e}.",
                "{e} goes nowhere without a {v}.",
            ),
            (
                "Which animal does {e} keep?",
                "What animal belongs to {e}?",
                "What animal does {e} own?",
                "What kind of animal does {e} have?",
            ),
            ("Who keeps a {v}?", "Who owns a {v}?", "Which person goes about with a {v}?"),
        ),
        Relation(
            "goods",
            "wares",
            "goods",
            (
                "{e} sells {v}.",
                "{e} deals in {v}.",
                "{e} trades in {v}.",
                "At the market {e} sells {v}.",
                "Those who want {v} go to {e}.",
            ),
            (
                "What does {e} sell?",
                "What does {e} deal in?",
                "What goods does {e} trade in?",
                "What can one buy from {e}?",
            ),
            ("Who sells {v}?", "Who deals in {v}?", "From whom can one buy {v}?"),
        ),
        Relation(
            "debt",
            "debt",
            "count",
            (
                "{e} owes {v} coins.",
                "{e} still has to pay {v} coins.",
                "{e} has a debt of {v} coins.",
                "There are {v} coins that {e} must pay.",
                "The unpaid sum of {e} comes to {v} coins.",
            ),
            (
                "How much does {e} owe?",
                "How many coins does {e} owe?",
                "How many coins must {e} pay?",
                "How large is the debt of {e}?",
            ),
            ("Who owes {v} coins?", "Who must pay {v} coins?", "Whose debt is {v} coins?"),
        ),
        Relation(
            "wish",
            "wish",
            "colour",
            (
                "{e} always wears {v}.",
                "{e} dresses in {v}.",
                "{e} likes {v} best of all colours.",
                "The coat of {e} is {v}.",
                "{e} is never seen without something {v}.",
            ),
            (
                "What colour does {e} wear?",
                "Which colour does {e} like?",
                "In which colour does {e} dress?",
                "What is the colour that {e} wears?",
            ),
            ("Who wears {v}?", "Who dresses in {v}?", "Who likes {v}?"),
        ),
    ),
    "ship": (
        Relation(
            "captain",
            "captain",
            "person",
            (
                "{v} commands {e}.",
                "{e} sails under {v}.",
                "{e} is commanded by {v}.",
                "The master of {e} is {v}.",
                "{v} has charge of {e}.",
            ),
            ("Who commands {e}?", "Who is the captain of {e}?", "Under whom does {e} sail?", "Who has command of {e}?"),
            ("Which ship does {v} command?", "Which ship sails under {v}?", "What ship is {v} captain of?"),
        ),
        Relation(
            "port",
            "home port",
            "place",
            (
                "{e} sails from {v}.",
                "{e} lies at {v}.",
                "{e} belongs to the port of {v}.",
                "The harbour of {e} is {v}.",
                "{e} returns to {v} every winter.",
            ),
            (
                "From where does {e} sail?",
                "At which port does {e} lie?",
                "What is the home port of {e}?",
                "Which harbour does {e} belong to?",
            ),
            ("Which ship sails from {v}?", "Which ship lies at {v}?", "Which ship belongs to {v}?"),
        ),
        Relation(
            "cargo",
            "cargo",
            "goods",
            (
                "{e} carries {v}.",
                "{e} is loaded with {v}.",
                "The hold of {e} is full of {v}.",
                "{e} brings {v}.",
                "In the hold of {e} there is {v}.",
            ),
            (
                "What does {e} carry?",
                "What is {e} loaded with?",
                "What cargo does {e} bring?",
                "What is in the hold of {e}?",
            ),
            ("Which ship carries {v}?", "Which ship is loaded with {v}?", "Which ship has {v} in its hold?"),
        ),
        Relation(
            "crew",
            "crew",
            "count",
            (
                "{e} has a crew of {v}.",
                "{v} sailors serve on {e}.",
                "{e} is manned by {v} sailors.",
                "There are {v} hands on {e}.",
                "The crew of {e} numbers {v}.",
            ),
            (
                "How many sailors serve on {e}?",
                "How large is the crew of {e}?",
                "How many hands are on {e}?",
                "What is the number of sailors on {e}?",
            ),
            (
                "Which ship has a crew of {v}?",
                "Which ship is manned by {v} sailors?",
                "On which ship do {v} hands serve?",
            ),
        ),
        Relation(
            "builder",
            "builder",
            "person",
            (
                "{e} was built by {v}.",
                "{v} built {e}.",
                "{v} laid the keel of {e}.",
                "{e} came from the yard of {v}.",
                "It was {v} who made {e}.",
            ),
            ("Who built {e}?", "Who was the builder of {e}?", "From whose yard came {e}?", "Who made {e}?"),
            ("Which ship did {v} build?", "Which ship was built by {v}?", "Which ship came from {v}?"),
        ),
        Relation(
            "launch",
            "launch",
            "year",
            (
                "{e} was launched in {v}.",
                "{e} first sailed in {v}.",
                "In {v} {e} was launched.",
                "{e} has been at sea since {v}.",
                "The launch of {e} took place in {v}.",
            ),
            (
                "When was {e} launched?",
                "In which year was {e} launched?",
                "In what year did {e} first sail?",
                "Since when has {e} been at sea?",
            ),
            ("Which ship was launched in {v}?", "Which ship first sailed in {v}?", "Which ship was at sea in {v}?"),
        ),
    ),
    "town": (
        Relation(
            "mayor",
            "mayor",
            "person",
            (
                "{v} is the mayor of {e}.",
                "{e} is governed by {v}.",
                "{v} rules {e}.",
                "The people of {e} obey {v}.",
                "In {e} it is {v} who decides.",
            ),
            ("Who governs {e}?", "Who rules {e}?", "Who is the mayor of {e}?", "Who decides in {e}?"),
            ("Which town does {v} govern?", "Which place is ruled by {v}?", "Where is {v} mayor?"),
        ),
        Relation(
            "founder",
            "founder",
            "person",
            (
                "{e} was founded by {v}.",
                "{v} founded {e}.",
                "{v} built the first house of {e}.",
                "{e} goes back to {v}.",
                "The first to settle in {e} was {v}.",
            ),
            (
                "Who founded {e}?",
                "By whom was {e} founded?",
                "Who built the first house of {e}?",
                "To whom does {e} go back?",
            ),
            ("Which town did {v} found?", "Which place was founded by {v}?", "Which place goes back to {v}?"),
        ),
        Relation(
            "founded",
            "founding year",
            "year",
            (
                "{e} was founded in {v}.",
                "{e} has stood since {v}.",
                "In {v} {e} was founded.",
                "The first stone of {e} was laid in {v}.",
                "{e} dates from {v}.",
            ),
            (
                "When was {e} founded?",
                "In which year was {e} founded?",
                "Since when has {e} stood?",
                "What year does {e} date from?",
            ),
            ("Which town was founded in {v}?", "Which place has stood since {v}?", "Which place dates from {v}?"),
        ),
        Relation(
            "houses",
            "number of houses",
            "count",
            (
                "{e} has {v} houses.",
                "There are {v} houses in {e}.",
                "{v} houses stand in {e}.",
                "One can count {v} houses in {e}.",
                "The houses of {e} number {v}.",
            ),
            (
                "How many houses are in {e}?",
                "How many houses does {e} have?",
                "How many houses stand in {e}?",
                "What is the number of houses in {e}?",
            ),
            ("Which town has {v} houses?", "Which place has {v} houses?", "Where do {v} houses stand?"),
        ),
        Relation(
            "product",
            "product",
            "goods",
            (
                "{e} is known for its {v}.",
                "{e} lives by its {v}.",
                "The best {v} come from {e}.",
                "People praise the {v} of {e}.",
                "Travellers go to {e} for its {v}.",
            ),
            (
                "What is {e} known for?",
                "What does {e} live by?",
                "What do people praise in {e}?",
                "What do travellers seek in {e}?",
            ),
            ("Which town is known for its {v}?", "Which place lives by its {v}?", "Where do travellers go for {v}?"),
        ),
        Relation(
            "fair",
            "fair",
            "date",
            (
                "The fair of {e} is on {v}.",
                "{e} holds its fair on {v}.",
                "On {v} there is a fair in {e}.",
                "Every year on {v} people meet at the fair of {e}.",
                "The fair of {e} begins on {v}.",
            ),
            (
                "When is the fair of {e}?",
                "On which day is the fair of {e}?",
                "When does {e} hold its fair?",
                "On what date does the fair of {e} begin?",
            ),
            ("Which town has its fair on {v}?", "Where is there a fair on {v}?", "Which fair begins on {v}?"),
        ),
    ),
    "inn": (
        Relation(
            "keeper",
            "keeper",
            "person",
            (
                "{v} keeps {e}.",
                "{e} is kept by {v}.",
                "The owner of {e} is {v}.",
                "{e} belongs to {v}.",
                "{v} is the one who runs {e}.",
            ),
            ("Who keeps {e}?", "Who is the keeper of {e}?", "To whom does {e} belong?", "Who runs {e}?"),
            ("Which inn does {v} keep?", "Which inn belongs to {v}?", "Which inn does {v} run?"),
        ),
        Relation(
            "beds",
            "number of beds",
            "count",
            (
                "{e} has {v} beds.",
                "There are {v} beds in {e}.",
                "{e} has room for {v} guests.",
                "{v} guests can sleep in {e}.",
                "Up to {v} travellers find a bed in {e}.",
            ),
            (
                "How many beds does {e} have?",
                "How many guests can sleep in {e}?",
                "How many beds are in {e}?",
                "For how many guests is there room in {e}?",
            ),
            ("Which inn has {v} beds?", "Which inn has room for {v} guests?", "Where can {v} guests sleep?"),
        ),
        Relation(
            "town",
            "town",
            "place",
            (
                "{e} stands in {v}.",
                "{e} is in {v}.",
                "In {v} there is an inn called {e}.",
                "One finds {e} in {v}.",
                "The walls of {e} rise in {v}.",
            ),
            ("Where is {e}?", "In which place is {e}?", "Where does {e} stand?", "In which town can one find {e}?"),
            ("Which inn is in {v}?", "Which inn stands in {v}?", "Which inn can one find in {v}?"),
        ),
        Relation(
            "price",
            "price",
            "count",
            (
                "A night in {e} costs {v} coins.",
                "{e} asks {v} coins for a night.",
                "To sleep in {e} you pay {v} coins.",
                "For a room {e} takes {v} coins.",
                "Guests of {e} pay {v} coins.",
            ),
            (
                "What does a night in {e} cost?",
                "How much does {e} ask for a night?",
                "How many coins does a room in {e} cost?",
                "What do guests of {e} pay?",
            ),
            ("Which inn asks {v} coins for a night?", "Which inn costs {v} coins?", "Where do guests pay {v} coins?"),
        ),
    ),
    "dish": (
        Relation(
            "ingredient",
            "main ingredient",
            "ingredient",
            (
                "{e} is made with {v}.",
                "For {e} you need {v}.",
                "{v} go into {e}.",
                "{e} calls for {v}.",
                "The best part of {e} is the {v}.",
            ),
            ("What is {e} made with?", "What do you need for {e}?", "What goes into {e}?", "What does {e} call for?"),
            ("Which dish is made with {v}?", "Which dish calls for {v}?", "Which dish needs {v}?"),
        ),
        Relation(
            "minutes",
            "cooking time",
            "minutes",
            (
                "Cook {e} for {v} minutes.",
                "{e} takes {v} minutes.",
                "{e} is ready after {v} minutes.",
                "Leave {e} on the fire for {v} minutes.",
                "{e} needs {v} minutes on the stove.",
            ),
            (
                "How long does {e} take?",
                "For how many minutes do you cook {e}?",
                "After how many minutes is {e} ready?",
                "How many minutes does {e} need?",
            ),
            (
                "Which dish takes {v} minutes?",
                "Which dish is ready after {v} minutes?",
                "Which dish needs {v} minutes?",
            ),
        ),
        Relation(
            "inventor",
            "inventor",
            "person",
            (
                "{e} was invented by {v}.",
                "{v} was the first to cook {e}.",
                "{v} invented {e}.",
                "We owe {e} to {v}.",
                "The recipe of {e} is by {v}.",
            ),
            (
                "Who invented {e}?",
                "Who was the first to cook {e}?",
                "To whom do we owe {e}?",
                "By whom is the recipe of {e}?",
            ),
            ("Which dish did {v} invent?", "Which dish do we owe to {v}?", "Which dish is by {v}?"),
        ),
        Relation(
            "guests",
            "number of guests",
            "small",
            (
                "{e} serves {v} people.",
                "{e} is enough for {v} people.",
                "{v} people can eat from {e}.",
                "This much of {e} feeds {v} people.",
                "With {e} you can feed {v} people.",
            ),
            (
                "How many people does {e} serve?",
                "How many people does {e} feed?",
                "For how many people is {e} enough?",
                "How many people can eat {e}?",
            ),
        ),
    ),
}


def thing(rng: random.Random, kind: str, held_out: bool) -> str:
    """The name of something of a kind, as it is written inside a sentence."""
    if kind == "person":
        return names.person_name(rng, held_out)
    if kind == "town":
        return names.place_name(rng, held_out)
    if kind == "dish":
        return f"{names.person_name(rng, held_out)} {rng.choice(words.DISHES)}"
    return "the " + names.pair_name(rng, held_out, words.ADJECTIVES, words.THINGS)


_WORDS = {
    "trade": words.TRADES,
    "animal": words.ANIMALS,
    "goods": words.GOODS,
    "colour": words.COLOURS,
    "ingredient": words.INGREDIENTS,
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
    kind = rng.choice(("person", "person", "place", "place", "colour", "goods", "animal", "count", "code"))
    return Relation(f"generic {noun}", noun, kind, (), ())


def pick(rng: random.Random, wordings: tuple[str, ...], held_out: bool) -> str:
    """A wording of the training side, or the one that is held out."""
    return wordings[-1] if held_out else rng.choice(wordings[:-1])
