"""What the settings for long context do in a running web UI, through its API: checks as in checks.py."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from checks import GREEDY, MODEL, PROMPT, Refused, Subject
from server import DEMO_MODEL

SHIFTED = re.compile(r"shifted (\d+) instead of reading them again")
AUTOMATIC = re.compile(r"rope_scaling=auto.*2048 positions")
CONTEXT, TURNS = 512, 10


def cache_types_are_as_in_the_list(subject: Subject) -> str:
    """Each rounds in its own way, and a recent window that holds the whole prompt does not round at all."""
    seen: dict[str, float] = {}
    for cache_type in ("fp16", "q8", "q6", "q4", "q8_q4", "q4+256"):
        subject.load(**{subject.noted["context"]: CONTEXT, "cache_type": cache_type})
        choice = subject.complete(PROMPT * 6, logprobs=3, max_tokens=1)
        seen[cache_type] = max(choice["logprobs"]["top_logprobs"][0].values())
    windowed = seen.pop("q4+256")
    assert windowed == seen["fp16"] and len(set(seen.values())) == len(seen), (windowed, seen)
    return ", ".join(f"{name} {math.exp(value):.4f}" for name, value in seen.items()) + ", q4+256 as fp16"


def an_unknown_cache_type_is_refused(subject: Subject) -> str:
    try:
        subject.load(cache_type="q5")
    except Refused as error:
        assert "there is no 'q5'" in str(error) and "q8_q4" in str(error), error
        assert subject.info()["model_name"] == MODEL
        return str(error)[:100]
    raise AssertionError("q5 was accepted")


def a_scaling_is_chosen_for_the_context(subject: Subject) -> str:
    before = len(subject.server.console())
    subject.load(**{subject.noted["context"]: 2048, "rope_method": "auto"})
    said = next((line for line in subject.server.console()[before:].splitlines() if AUTOMATIC.search(line)), None)
    assert said is not None, subject.server.console()[before:]
    assert "ntk-by-parts, factor 4" in said, said
    subject.text(PROMPT * 70)
    prompt, _, _, _, context = subject.replies_on_console()[-1]
    assert prompt > 2 * CONTEXT and context == 2048, subject.replies_on_console()[-1]
    return f"{AUTOMATIC.search(said)[0]}; {prompt} tokens read"


def a_full_window_is_shifted(subject: Subject) -> str:
    """The web UI drops the oldest messages; what is left is moved, with context_shift, and else read again."""
    name, read = subject.noted["context"], {}
    for shift in ("off", "on"):
        subject.load(**{name: CONTEXT, "context_shift": shift})
        start, line = len(subject.server.console()), len(subject.replies_on_console())
        _converse(subject)
        lines = subject.replies_on_console()[line:]
        assert len(lines) == TURNS and max(row[0] for row in lines) < CONTEXT, lines
        read[shift] = sum(prompt - reused for prompt, reused, *_ in lines)
        shifts = SHIFTED.findall(subject.server.console()[start:])
        assert bool(shifts) == (shift == "on"), f"context_shift={shift}: {len(shifts)} shifts"
    subject.load()
    assert read["on"] < 0.6 * read["off"], read
    return f"{TURNS} turns: {read['off']} tokens read, with {len(shifts)} shifts {read['on']}"


def _converse(subject: Subject) -> None:
    """A chat over more than the window."""
    messages: list[dict[str, str]] = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"Question {turn}: what does function {turn * 37} do with a list?"})
        body: dict[str, Any] = {"messages": messages, "mode": "instruct", "max_tokens": 48} | GREEDY
        answer = subject.server.api.post("/v1/chat/completions", **body)
        messages.append(answer["choices"][0]["message"])


def the_demo_answers_about_a_long_document(subject: Subject) -> str:
    """The copy of the embedded model, loaded with no argument, asked what its tour asks."""
    subject.copy.ropewalk("webui", "demo", subject.copy.webui)
    tour = json.loads((DEMO_MODEL / "tour" / "tour.json").read_text(encoding="utf-8"))
    subject.load("ropewalk-demo")
    for question in tour["questions"]:
        answer = _answer(subject, tour["document"], question["text"])
        assert answer == question["answer"], (question, answer)
    prompt, _, _, _, context = subject.replies_on_console()[-1]
    assert prompt > 4 * CONTEXT and context == 8 * CONTEXT, subject.replies_on_console()[-1]
    used = f"the LoRA {tour['adapter']} is used"
    assert used in subject.server.console(), subject.server.console()
    subject.load()
    return f"{len(tour['questions'])} questions right at {prompt} tokens; {used}"


def _answer(subject: Subject, document: str, question: str) -> str:
    messages = [{"role": "user", "content": f"{document.strip()}\n\n{question}"}]
    body: dict[str, Any] = {"messages": messages, "mode": "instruct", "max_tokens": 64} | GREEDY
    return subject.server.api.post("/v1/chat/completions", **body)["choices"][0]["message"]["content"].strip()


CHECKS = (
    cache_types_are_as_in_the_list,
    an_unknown_cache_type_is_refused,
    a_scaling_is_chosen_for_the_context,
    a_full_window_is_shifted,
    the_demo_answers_about_a_long_document,
)
