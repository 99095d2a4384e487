"""The model that reads: what an exercise asks can be answered, nothing leaks, and training is what the engine runs."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import ropewalk
from ropewalk.files.embedded import demo_model_path
from ropewalk.text.chat import load_chat_template
from ropewalk.text.tokenizer.load import load_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "demo_model"
sys.path.insert(0, str(SCRIPTS))

from reading import (  # noqa: E402
    by_hand,
    curriculum,
    documents,
    evaluate,
    exercises,
    export,
    extend,
    names,
    relations,
    train,
    trials,
    words,
)
from reading.documents import TRAINING, HeldOut  # noqa: E402
from reading.history import Fall, read_history  # noqa: E402
from reading.network import Network, Shape, transformers_state  # noqa: E402
from reading.vocabulary import Encoder, train_tokenizer  # noqa: E402

TINY = Shape(num_layers=2, hidden=64, intermediate=96, num_heads=2, num_kv_heads=1, head_dim=32)
ALL = HeldOut(names=True, wordings=True, types=True)


@pytest.fixture(scope="module")
def proto() -> bytes:
    return train_tokenizer((), num_exercises=300)


@pytest.fixture(scope="module")
def encoder(proto: bytes) -> Encoder:
    return Encoder(proto)


@pytest.mark.parametrize("side", [TRAINING, ALL])
def test_every_fact_stands_in_its_document_and_its_question_names_what_is_asked(side: HeldOut) -> None:
    rng = random.Random(1)
    for _ in range(200):
        document = documents.make_document(rng, rng.randint(1, 12), side)
        for fact in document.facts:
            assert fact.passage in document.text
            assert fact.value in fact.passage
            question = exercises.ask(rng, fact, document, side)
            if question.kind == "value":
                assert fact.entity in question.text and question.answer == fact.value
            elif question.kind == "reverse":
                assert fact.value in question.text and question.answer == fact.entity


def every_drawing(wordings: Sequence[str]) -> Iterator[str]:
    """The wordings with every choice of their [alternative|words]."""
    for wording in wordings:
        parts = re.split(r"\[([^\]]*)\]", wording)
        for words_of_one in itertools.product(*(part.split("|") for part in parts[1::2])):
            yield "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::2], words_of_one, fillvalue="")))


def test_alternative_words_are_all_drawn() -> None:
    rng = random.Random(1)
    drawn = {relations.pick(rng, ("[Who|Which person] lives in {v}?", "held out"), False) for _ in range(40)}
    assert drawn == {"Who lives in {v}?", "Which person lives in {v}?"}


@pytest.mark.parametrize("side", [TRAINING, ALL])
def test_a_question_without_an_answer_asks_what_the_document_does_not_say(side: HeldOut) -> None:
    rng = random.Random(2)
    for _ in range(200):
        document = documents.make_document(rng, 6, side)
        question = exercises.ask_absent(rng, document, side)
        assert question.answer == exercises.NOT_IN_TEXT
        answerable = [
            wording.format(e=fact.entity, n=fact.relation.noun)
            for fact in document.facts
            for wordings in (fact.relation.questions, relations.SHARED_QUESTIONS)
            for wording in every_drawing(wordings)
        ]
        assert question.text not in answerable


def test_a_reverse_question_has_one_answer() -> None:
    rng = random.Random(3)
    asked = 0
    for _ in range(300):
        document = documents.make_document(rng, 20)
        for fact in document.facts:
            question = exercises.ask(rng, fact, document, TRAINING, quotes=0)
            if question.kind == "reverse":
                asked += 1
                same = [f for f in document.facts if (f.relation.key, f.value) == (fact.relation.key, fact.value)]
                assert same == [fact]
    assert asked > 100


def name_in(thing: str) -> str:
    """Of "the Book of the Grey Heron", "the Grey Heron", "Mardun soup", "Belwick Hall": what is on a side."""
    if thing.startswith("the "):
        return re.sub(r"^the (?:(?:Book|Guild) of the )?", "", thing)
    return re.sub(rf" (?:{'|'.join((*words.DISHES, *words.HOUSES))})$", "", thing)


def test_training_never_sees_a_held_out_name_wording_or_type() -> None:
    held_out_wordings = [relations.SHARED_QUESTIONS[-1], relations.SHARED_STATEMENTS[-1]]
    held_out_wordings += [
        relations.QUESTION_OPENINGS[-1],
        relations.STATEMENT_OPENINGS[-1],
        relations.QUESTION_ENDS[-1],
    ]
    for kind in relations.KINDS.values():
        for relation in kind:
            for wordings in (relation.statements, relation.questions, relation.reverse):
                held_out_wordings += wordings[-1:]
    patterns = [re.sub(r"\\\{.\\\}", r"[\\w ]+", re.escape(wording)) for wording in held_out_wordings]
    found = re.compile("|".join(rf"(?:^|[.?] |\n){pattern}" for pattern in patterns))
    rng = random.Random(4)
    types = set()
    for _ in range(400):
        document = documents.make_document(rng, 8, TRAINING)
        types.add(document.type)
        for fact in document.facts:
            assert not names.is_held_out(name_in(fact.entity)), fact.entity
            assert found.search(fact.passage) is None, fact.passage
        for question in exercises.questions_about(rng, document, TRAINING, 0.2, 0.0):
            assert found.search(question.text) is None, question.text
    assert not types & {held_out.name for held_out in documents.HELD_OUT_TYPES}


def test_the_held_out_side_is_made_of_held_out_names() -> None:
    rng = random.Random(5)
    assert all(names.is_held_out(names.person_name(rng, True)) for _ in range(100))
    assert all(names.is_held_out(names.place_name(rng, True)) for _ in range(100))


def test_a_syllable_is_a_piece_and_a_digit_another(encoder: Encoder) -> None:
    rng = random.Random(6)
    lengths = sorted(len(encoder.encode(f" {names.place_name(rng, True)}")) for _ in range(500))
    assert sum(lengths[:400]) / 400 < 2.2  # the others are loose ones, and what the vocabulary missed
    assert len(encoder.encode(" 48213")) == 6  # the space is one


def test_the_engine_s_tokenizer_and_template_give_what_was_trained_on(
    proto: bytes, encoder: Encoder, tmp_path: Path
) -> None:
    (tmp_path / "source.model").write_bytes(proto)
    export.write_tokenizer(encoder, tmp_path / "source.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    template = load_chat_template(tmp_path, tokenizer.special_tokens)
    rng = random.Random(7)
    for style in ("plain", "closed", "system"):
        document = documents.make_document(rng, 5)
        questions = exercises.questions_about(rng, document, TRAINING, 0.2, 0.2)[:2]
        pieces = exercises.conversation(rng, document.text, questions, style)
        opened = pieces[1][0] if style != "system" else pieces[2][0]
        messages = [{"role": "user", "content": opened.removeprefix(exercises.USER).removesuffix(exercises.ASSISTANT)}]
        if style == "system":
            messages.insert(0, {"role": "system", "content": document.text})
        prompt = template.render(messages)
        trained = "".join(text for text, _ in pieces)
        assert trained.startswith(prompt)
        assert tokenizer.encode(prompt, add_bos=False) == encoder.encode(prompt)


def test_a_batch_depends_on_seed_and_step_alone_and_answers_weigh_most(encoder: Encoder) -> None:
    phase = replace(curriculum.PHASES[-2], rows=4)
    library = np.arange(3, 2000, dtype=np.uint16)
    first, again, other = (curriculum.make_batch(phase, encoder, library, 1, step) for step in (7, 7, 8))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.weights, again.weights)
    assert not torch.equal(first.ids, other.ids)
    assert first.ids.shape == (4, phase.length + 1)
    assert first.is_answer.any() and not first.is_answer.all()
    assert (first.weights[first.is_answer] >= 1).all() and (first.weights[~first.is_answer] < 1).all()
    ends = first.ids[:, 1:][first.is_answer]
    assert (ends == encoder.special[exercises.END]).sum() > 8


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(encoder: Encoder, tmp_path: Path) -> None:
    phases = (replace(curriculum.PHASES[1], rows=2, until=300.0), replace(curriculum.PHASES[1], rows=1, until=1e9))
    library = np.arange(3, 2000, dtype=np.uint16)

    def run(folder: Path, stop_at: float) -> Network:
        folder.mkdir(exist_ok=True)
        options = argparse.Namespace(
            run=folder, seed=1, threads=2, stop_at=stop_at, decay_from=700.0, decay_tokens=600.0
        )
        torch.manual_seed(0)
        network = Network(replace(TINY, context=128))
        train.Trainer(options, encoder, library, network, train.optimizers_of(network), phases).run()
        return network

    whole = run(tmp_path / "whole", float("inf"))
    run(tmp_path / "parts", 600)
    parts = run(tmp_path / "parts", float("inf"))
    for (name, first), second in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_a_history_names_each_stretch_over_which_the_rate_fell(tmp_path: Path) -> None:
    """One that was announced and not reached is none; one that goes on after a stop is one; one may be cut short."""
    inf = float("inf")
    starts = {0: (inf, 4.0), 10: (40.0, 20.0), 20: (20.0, 20.0), 30: (20.0, 20.0), 40: (0.0, 80.0), 50: (0.0, 60.0)}
    lines = []
    for tokens, (first, over) in starts.items():
        options = {"decay_from": first, "decay_tokens": over}
        lines.append({"time": "01-01 00:00:00", "step": tokens, "tokens": tokens, "event": "start", "options": options})
        lines.append({"time": "01-01 01:00:00", "step": tokens + 10, "tokens": tokens + 10})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    history = read_history(tmp_path / "log.jsonl")
    assert (history.tokens, history.hours) == (60, 6.0)
    last = Fall(50, 60.0, pytest.approx(1 / 6))
    assert history.falls == (Fall(20.0, 40.0, 1.0), Fall(40, 50, 0.5, left=0.375), last)


def test_a_run_can_begin_with_the_weights_of_a_model(tmp_path: Path) -> None:
    network = Network(TINY)
    torch.save({"network": network.state_dict()}, tmp_path / "checkpoint.pt")
    export.write_float(tmp_path / "checkpoint.pt", tmp_path / "out", TINY)
    for (name, first), second in zip(
        network.named_parameters(), train.network_of(tmp_path / "out").parameters(), strict=True
    ):
        assert torch.equal(first, second), name


def test_the_network_computes_what_transformers_computes() -> None:
    network = Network(TINY)
    model = LlamaForCausalLM(TINY.config()).eval()
    assert model.load_state_dict(transformers_state(network), strict=False).missing_keys == ["lm_head.weight"]
    ids = torch.randint(TINY.vocab, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(network.logits(network(ids)), model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_evaluation_counts_what_the_exported_model_says(proto: bytes, encoder: Encoder, tmp_path: Path) -> None:
    """The trial asks for what the network itself would say, and for something else."""
    network = Network(TINY)
    torch.save({"network": network.state_dict()}, tmp_path / "checkpoint.pt")
    export.write_float(tmp_path / "checkpoint.pt", tmp_path / "out", TINY)
    model = ropewalk.load_model(tmp_path / "out", compute="exact", backend="reference")
    context, asked = encoder.encode("<s><|user|>Mardun lives in Belwick.\n\n"), encoder.encode("Where?<|assistant|>")
    with torch.no_grad():
        said = int(network.logits(network(torch.tensor([[*context, *asked]]))[0, -1]).argmax())
    right = trials.Asked(tuple(asked), (said,), "value", 0.5, "prose")
    wrong = trials.Asked(tuple(asked), (said - 1,), "value", 0.9, "prose")
    trial = trials.Trial(tuple(context), (wrong, right))
    outcomes = list(evaluate.outcomes_of(model, trial, 128, said, None))
    assert [outcome.exact for outcome in outcomes] == [False, True]
    numbers = evaluate.summary(outcomes)["128"]
    assert numbers["answered"] == {"share": 0.5, "questions": 2}
    assert numbers["false refusals"]["share"] == 1.0
    assert (numbers["depth 0.4"]["share"], numbers["depth 0.8"]["share"]) == (1.0, 0.0)


@pytest.mark.parametrize("length", [256, 700])
def test_trials_fill_their_length_and_no_more(encoder: Encoder, length: int) -> None:
    rng = random.Random(8)
    for trial in (
        trials.document_trial(rng, encoder, length, ALL),
        trials.key_value_trial(rng, encoder, length),
        trials.pass_key_trial(rng, encoder, length, 0.5),
    ):
        longest = max(len(trial.context) + len(asked.ids) + len(asked.answer) for asked in trial.asked)
        assert 0.9 * (length - trials.RESERVE) < longest <= length, trial.asked[0].type


def test_a_lora_of_the_training_is_the_same_in_the_engine(tmp_path: Path) -> None:
    folder = demo_model_path()
    scaling = extend.rope_scaling("linear", 4)
    network = extend.Adapted(folder, scaling, 4)
    with torch.no_grad():
        for parameter in network.changes.values():
            parameter.normal_(std=0.02)
            parameter.copy_(parameter.half())
    extend.save_adapter(network, scaling, tmp_path / "lora")
    model = ropewalk.load_model(folder, 2048, compute="exact", cache_type="fp32", rope_scaling=scaling)
    model.load_adapter(tmp_path / "lora", "lora")
    ids = torch.randint(3, 2000, (60,))
    with torch.no_grad():
        expected = network.logits(network(ids[None])[0])
        got = model.forward(ids.tolist(), model.new_cache(64), "all", seq_len=2048, adapters="lora")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


def test_a_text_by_hand_has_its_questions_and_all_answers_that_count() -> None:
    source = "# about\n\nAnna lives\nin Leeds.\n? Who?\n= Anna | she\n? Where?\n= Leeds\n\nTom.\n? Who?\n= Tom\n"
    assert by_hand.read_texts(source) == [
        ("Anna lives in Leeds.", [("Who?", ("Anna", "she")), ("Where?", ("Leeds",))]),
        ("Tom.", [("Who?", ("Tom",))]),
    ]
    assert by_hand.Answered("Who?", ("Anna", "she"), "anna.").right
    assert not by_hand.Answered("Who?", ("Anna", "she"), "Anna and Tom").right


def test_a_pass_key_hidden_in_code_is_asked_for_as_the_measure_does_it(encoder: Encoder) -> None:
    phase = replace(curriculum.PHASES[-1], rows=1, mix=(("hidden", 1.0),))
    batch = curriculum.make_batch(phase, encoder, np.full(3000, 7, dtype=np.uint16), 1, 1)
    (ids,), (answers,) = batch.ids.tolist(), batch.is_answer.tolist()
    said = encoder.model.decode([token for token, is_answer in zip(ids[1:], answers, strict=True) if is_answer])
    text = encoder.model.decode(ids)
    assert len(said) == 5 and text.endswith(f"\nThe pass key is {said}")
    assert f"\nThe pass key is {said}. Remember it. {said} is the pass key.\n" in text


def test_unknown_words_ask_only_for_what_nothing_else_could_be_meant_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "UNKNOWN", 1.0)
    monkeypatch.setattr(relations, "unknown_question", lambda *_: "unknown")
    rng = random.Random(8)
    document = documents.make_document(rng, 30)
    counts = Counter((fact.entity, relations.sort_of(fact.relation)) for fact in document.facts)
    assert {1, 2} <= set(counts.values())
    for fact in document.facts:
        asked = {exercises.ask(rng, fact, document, TRAINING, quotes=0.0).text for _ in range(20)}
        assert ("unknown" in asked) == (counts[fact.entity, relations.sort_of(fact.relation)] == 1)


def test_a_question_in_unknown_words_names_the_thing_and_the_sort() -> None:
    rng = random.Random(9)
    relation = next(relation for relation in relations.KINDS["person"] if relation.key == "birthplace")
    for _ in range(20):
        text = relations.unknown_question(rng, relation, "Mardun")
        assert "Mardun" in text and text.startswith(relations.SORTS["place",]) and text.endswith("?")


@pytest.mark.parametrize("before", ("", "Mardun. "))
def test_the_first_words_of_a_quoted_passage_count_more(before: str) -> None:
    passage = "The harbour of the Grey Heron is Belwick."
    pieces = exercises.answer_pieces(exercises.Question("Where?", before + passage, "quote", passage))
    assert "".join(text for text, _ in pieces) == f" {before}{passage}{exercises.END}"
    assert [text for text, weight in pieces if weight > 1] == [" The harbour of the"]
    assert all(text.startswith(" ") for text, _ in pieces), "each word is to be the token that it is in the text"


def test_a_short_passage_counts_more_as_a_whole() -> None:
    pieces = exercises.answer_pieces(exercises.Question("What?", "Oats.", "quote", "Oats."))
    assert pieces == [(" Oats.", exercises.FIRST_WORDS_WEIGHT), (exercises.END, 1)]


def test_an_unclear_statement_is_the_only_one_of_its_sort_and_nothing_of_that_sort_is_called_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[documents.Fact] = []
    monkeypatch.setattr(exercises, "_value_question", lambda _rng, fact, _side: asked.append(fact) or "asked")
    rng = random.Random(10)
    unclear = 0
    for _ in range(60):
        document = documents.make_document(rng, 20)
        sorts = Counter((fact.entity, relations.sort_of(fact.relation)) for fact in document.facts)
        taken = {(f.entity, relations.sort_of(f.relation)) for f in document.facts if f.unclear}
        assert all(sorts[pair] == 1 for pair in taken)
        unclear += len(taken)
        for entity, sort in taken:
            one_thing = replace(document, facts=tuple(f for f in document.facts if f.entity == entity))
            asked.clear()
            for _ in range(10):
                exercises.ask_absent(rng, one_thing, TRAINING)
            assert len(asked) == 10
            assert all(relations.sort_of(fact.relation) != sort for fact in asked if fact.entity == entity)
    assert unclear > 50


def test_what_is_held_out_is_never_unclear() -> None:
    rng = random.Random(11)
    for side in trials.SIDES.values():
        assert not any(fact.unclear for _ in range(20) for fact in documents.make_document(rng, 20, side).facts)
