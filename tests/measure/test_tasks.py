"""measure/tasks.py: what is hidden stands where it should, and what is asked for is what was hidden."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.base.errors import RequestError
from ropewalk.files.embedded import demo_model_path
from ropewalk.measure.tasks import NAMES, TASKS, make_task
from ropewalk.text.tokenizer.load import load_tokenizer

TOKENIZER = load_tokenizer(demo_model_path())
FILLER = TOKENIZER.encode("The rope is long. It is made of many strands, and they are turned.\n" * 3, add_bos=False)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def text_of(ids) -> str:
    return TOKENIZER.decode(list(ids))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(TASKS.values), st.integers(400, 900), st.integers(0, 3))
def test_context_question_and_answer_have_the_length_together(kind: str, length: int, seed: int) -> None:
    for trial in make_task(kind, TOKENIZER, FILLER, 2, seed).trials(length, DEPTHS):
        for asked in trial.questions:
            assert len(trial.context) + len(asked.ids) + len(asked.answer) == length


@given(st.integers(200, 600), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_a_pass_key_stands_at_its_depth_and_is_asked_for(length: int, depth: float) -> None:
    (trial,) = make_task("keys", TOKENIZER, FILLER, 1).trials(length, [depth])
    (asked,) = trial.questions
    key = text_of(asked.answer).strip()
    context = text_of(trial.context)
    assert key.isdigit() and len(key) == 5 and context.count(key) == 2
    needle = TOKENIZER.encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n", add_bos=False)
    places = [i for i in range(length) if list(trial.context[i : i + len(needle)]) == needle]
    assert places == [round(depth * (len(trial.context) - len(needle)))]


def test_every_depth_has_a_key_of_its_own_with_a_name_of_its_own() -> None:
    for trial in make_task("several", TOKENIZER, FILLER, 3).trials(700, DEPTHS):
        context, keys, named = text_of(trial.context), [], []
        for asked in trial.questions:
            question = text_of(asked.ids).strip()
            name, key = question.rpartition("The pass key of ")[2].split()[0], text_of(asked.answer).strip()
            assert f"The pass key of {name} is {key}." in context and name in NAMES
            keys.append(key)
            named.append(name)
        assert len(set(named)) == len(DEPTHS) == len(set(keys))
        assert [context.index(key) for key in keys] == sorted(context.index(key) for key in keys)


def test_pairs_are_json_and_the_value_asked_for_is_that_of_the_key() -> None:
    for trial in make_task("pairs", TOKENIZER, FILLER, 2).trials(1000, DEPTHS):
        context = text_of(trial.context)
        pairs = json.loads(context[context.index("{") :])
        assert len(pairs) >= 5
        for asked in trial.questions:
            key = re.search('The value of "([0-9a-f-]+)" is', text_of(asked.ids))[1]
            assert pairs[key] == text_of(asked.answer).strip().removeprefix('"')
            assert list(pairs).index(key) == round(asked.depth * (len(pairs) - 1))


@pytest.mark.parametrize("kind", TASKS.values)
def test_trials_are_drawn_from_the_seed_alone(kind: str) -> None:
    again = make_task(kind, TOKENIZER, FILLER, 2, seed=5).trials(600, DEPTHS)
    assert make_task(kind, TOKENIZER, FILLER, 2, seed=5).trials(600, DEPTHS) == again
    assert make_task(kind, TOKENIZER, FILLER, 2, seed=6).trials(600, DEPTHS) != again
    more = {trial.name: trial for trial in make_task(kind, TOKENIZER, FILLER, 3, seed=5).trials(600, DEPTHS)}
    assert all(more[trial.name] == trial for trial in again)


@pytest.mark.parametrize("kind", TASKS.values)
def test_the_shortest_length_holds_the_task(kind: str) -> None:
    task = make_task(kind, TOKENIZER, FILLER, 2)
    for trial in task.trials(task.least(DEPTHS), DEPTHS):
        assert all(len(trial.context) + len(q.ids) + len(q.answer) == task.least(DEPTHS) for q in trial.questions)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("spiral", TOKENIZER, FILLER, 1), "task must be one of keys, several, pairs, got 'spiral'"),
        (("keys", TOKENIZER, [], 1), "needs a filler text"),
        (("keys", TOKENIZER, FILLER, 0), "at least one trial, got 0"),
    ],
)
def test_what_is_no_task_is_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make_task(*arguments)


def test_more_keys_than_names_are_refused() -> None:
    task = make_task("several", TOKENIZER, FILLER, 1)
    with pytest.raises(RequestError, match=f"at most {len(NAMES)} keys"):
        task.trials(4000, [i / 20 for i in range(20)])
