"""Exercises: a text, questions and answers, as the sequence of marked pieces that a model is trained on.

An exercise is a list of pieces (text, weight): what its tokens count in training as tokens of an answer, 0 if they are
none. SYSTEM, USER, ASSISTANT and END are special tokens; an answer starts with a space, and a passage in it stands
without quotation marks, so that each word is the same token as within a text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from reading import documents, names, relations
from reading.documents import TRAINING, Document, Fact, HeldOut

BEGIN, END = "<s>", "</s>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
DELIMITERS = ("BEGININPUT", "BEGINCONTEXT", "ENDCONTEXT", "ENDINPUT", "BEGININSTRUCTION", "ENDINSTRUCTION")
NOT_IN_TEXT = "Not in the text"

Piece = tuple[str, float]


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its only right answer. `kind`: value, reverse, absent, quote or both (value and passage).

    passage: the end of the answer that is quoted.
    """

    text: str
    answer: str
    kind: str
    passage: str = ""


FIRST_WORDS, FIRST_WORDS_WEIGHT = 4, 4.0
QUOTE_ORDERS = (
    "Quote the passage.",
    "Quote the sentence that says so.",
    "Quote it.",
    "Which sentence says so?",
    "Copy the sentence.",
    "Show me the sentence.",
    "Where does it say so?",
    "In the words of the text, please.",
    "Give the line that says so.",
    "Give the passage.",
)
UNKNOWN = 0.1  # of the values that nothing else in the text could be meant by, so many are asked for in unknown words
BOTH_ORDERS = (
    "Answer and quote the passage.",
    "Show the passage as well.",
    "Then quote the passage.",
    "And which sentence says so?",
    "Also copy the sentence.",
    "With the passage, please.",
    "Answer, and show me the sentence.",
    "Include the sentence.",
    "Add the passage.",
)
REVERSE = 0.3  # of the questions that could be asked for the thing


def ask(rng: random.Random, fact: Fact, document: Document, held_out: HeldOut, quotes: float = 0.1) -> Question:
    """A question about a fact: its value, its thing (if no other has that value), or the passage."""
    relation = fact.relation
    reversible = relation.reverse and (relation.key, fact.value) in documents.unique_values(document)
    if reversible and rng.random() < REVERSE:
        wording = relations.question(rng, relation.reverse, held_out.wordings)
        text, answer, kind = wording.format(v=fact.value), fact.entity, "reverse"
    elif held_out == TRAINING and rng.random() < UNKNOWN and _is_alone(fact, document):
        text, answer, kind = relations.unknown_question(rng, relation, fact.entity), fact.value, "value"
    else:
        text, answer, kind = _value_question(rng, fact, held_out), fact.value, "value"
    roll = rng.random()
    if roll < quotes / 2:
        order = relations.pick(rng, QUOTE_ORDERS, held_out.wordings)
        return Question(f"{text} {order}", fact.passage, "quote", fact.passage)
    if roll < quotes:
        order = relations.pick(rng, BOTH_ORDERS, held_out.wordings)
        return Question(f"{text} {order}", f"{answer}. {fact.passage}", "both", fact.passage)
    return Question(text, answer, kind)


def _is_alone(fact: Fact, document: Document) -> bool:
    """Whether the text says nothing else of that sort about that thing."""
    sort = relations.sort_of(fact.relation)
    return sum(f.entity == fact.entity and relations.sort_of(f.relation) == sort for f in document.facts) == 1


def _value_question(rng: random.Random, fact: Fact, held_out: HeldOut) -> str:
    own = fact.relation.questions
    shared = not own or rng.random() < 0.25
    wording = relations.question(rng, relations.SHARED_QUESTIONS if shared else own, held_out.wordings)
    return wording.format(e=fact.entity, n=fact.relation.noun)


def ask_absent(rng: random.Random, document: Document, held_out: HeldOut) -> Question:
    """A question that the text does not answer: of a thing that is not in it, or of what it does not say of one."""
    fact = rng.choice(document.facts)
    if rng.random() < 0.5:
        entity = fact.entity
        while any(entity == other.entity for other in document.facts):
            entity = relations.thing(rng, fact.kind, held_out.names)
        asked = Fact(fact.relation, fact.kind, entity, "", "")
    else:
        others = [other for other in document.facts if other.entity == fact.entity]
        said = {other.relation.noun for other in others}
        unclear = {relations.sort_of(other.relation) for other in others if other.unclear}
        relation = fact.relation
        while relation.noun in said or relations.sort_of(relation) in unclear:
            generic = rng.random() < 0.3
            choices = relations.KINDS[fact.kind]
            relation = relations.generic_relation(rng, held_out.wordings) if generic else rng.choice(choices)
        asked = Fact(relation, fact.kind, fact.entity, "", "")
    return Question(_value_question(rng, asked, held_out), NOT_IN_TEXT, "absent")


def questions_about(
    rng: random.Random, document: Document, held_out: HeldOut, absent: float, quotes: float
) -> list[Question]:
    """Every fact once in random order, and in between a share of questions that the text does not answer."""
    result = []
    for fact in rng.sample(document.facts, len(document.facts)):
        while rng.random() < absent:
            result.append(ask_absent(rng, document, held_out))
        result.append(ask(rng, fact, document, held_out, quotes))
    return result


def conversation(rng: random.Random, text: str, questions: list[Question], style: str = "") -> list[Piece]:
    """The pieces of a conversation about a text. style: "plain", "closed" or "system"; drawn at random if empty."""
    style = style or rng.choice(("plain", "plain", "closed", "closed", "system"))
    pieces: list[Piece] = [(BEGIN, 0)]
    for number, question in enumerate(questions):
        asked = question.text
        if number == 0:
            asked = opening(rng, text, asked, style)
        elif style == "closed" and rng.random() < 0.3:
            asked = f"BEGININSTRUCTION\n{asked}\nENDINSTRUCTION"
        if number == 0 and style == "system":
            pieces.append((f"{SYSTEM}{text}", 0))
        pieces.append((f"{USER}{asked}{ASSISTANT}", 0))
        pieces.extend(answer_pieces(question))
    return pieces


def answer_pieces(question: Question) -> list[Piece]:
    """The answer and its end. The first words of a passage count more: which they are is what is hard to find."""
    answer = f" {question.answer}{END}"
    if not question.passage:
        return [(answer, 1)]
    start = len(answer) - len(f" {question.passage}{END}")
    words = question.passage.split(" ")
    middle = start + sum(len(word) + 1 for word in words[:FIRST_WORDS])
    parts = ((answer[:start], 1), (answer[start:middle], FIRST_WORDS_WEIGHT), (answer[middle:], 1))
    return [part for part in parts if part[0]]


def opening(rng: random.Random, text: str, question: str, style: str) -> str:
    """The first user turn: the text, unless it is the system's, and the first question."""
    if style == "system":
        return question
    if style == "plain":
        return f"{question}\n\n{text}" if rng.random() < 0.1 else f"{text}\n\n{question}"
    metadata = ""
    if rng.random() < 0.4:
        metadata = f"title: {names.place_name(rng, False)}\n"
        if rng.random() < 0.5:
            metadata += f"date: {relations.value(rng, 'year', False)}\n"
    return (
        f"BEGININPUT\nBEGINCONTEXT\n{metadata}ENDCONTEXT\n{text}\nENDINPUT\n"
        f"BEGININSTRUCTION\n{question}\nENDINSTRUCTION"
    )


def about_a_document(
    rng: random.Random, num_facts: int, rounds: int = 1, absent: float = 0.1, quotes: float = 0.1, filler: float = 0.15
) -> list[Piece]:
    """A training document with every fact asked, `rounds` times over in other words."""
    document = documents.make_document(rng, num_facts, TRAINING, filler)
    questions = [q for _ in range(rounds) for q in questions_about(rng, document, TRAINING, absent, quotes)]
    return conversation(rng, document.text, questions)


def key_values(rng: random.Random, num_pairs: int, held_out: HeldOut = TRAINING) -> tuple[str, list[Question]]:
    """Lines "name: value", and a question for each."""
    value_kind = rng.choice(("person", "place", "code", "count", "goods"))
    form = rng.choice(("{k}: {v}", "{k} = {v}", "{k} {v}", "The value of {k} is {v}."))
    asked = rng.choice(("{k}?", "What is the value of {k}?", "Value of {k}?"))
    between = rng.choice(("\n", "\n", " ", ", "))
    pairs: dict[str, str] = {}
    while len(pairs) < num_pairs:
        pairs[names.person_name(rng, held_out.names)] = relations.value(rng, value_kind, held_out.names)
    text = between.join(form.format(k=k, v=v) for k, v in pairs.items())
    keys = rng.sample(list(pairs), len(pairs))
    return text, [Question(asked.format(k=key), pairs[key], "key") for key in keys]


PASS_KEYS = (
    ("The pass key is {v}. Remember it. {v} is the pass key.", "What is the pass key?"),
    ("The code of the gate is {v}.", "What is the code of the gate?"),
    ("There is a number to keep in mind: {v}.", "Which number should you keep in mind?"),
    ("The secret number is {v}.", "What is the secret number?"),
)


def pass_key(rng: random.Random, num_sentences: int, depth: float | None = None) -> tuple[str, list[Question]]:
    """Sentences that say nothing, one that hides a number among them, and the question for it."""
    statement, question = rng.choice(PASS_KEYS)
    number = relations.value(rng, "code", False)
    sentences = [documents.filler_sentence(rng) for _ in range(num_sentences)]
    place = round((rng.random() if depth is None else depth) * num_sentences)
    sentences.insert(place, statement.format(v=number))
    return " ".join(sentences), [Question(question, number, "pass key")]


def copying(rng: random.Random, num_words: int) -> list[Piece]:
    """The same invented words over and over: the fastest way to learn to look back."""
    line = " ".join(names.person_name(rng, False) for _ in range(num_words))
    return [(BEGIN, 0), (f" {line}\n", 0), (f" {line}\n" * 12, 1)]
