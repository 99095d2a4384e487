"""Templates that come with a model are programs of strangers: each of these ends soon, with an error of ours, and uses
no more time, memory and output than it may, whichever thread renders it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.text.chat import MAX_TEMPLATE, ChatTemplate, load_chat_template
from ropewalk.text.template_process import TemplateLimits
from tokenizer_writer import write_config

ASK = [{"role": "user", "content": "Hello"}]
PATIENCE_S = 20.0  # the limit is 2 s; the rest is for a machine that is busy with other tests
TIME, MEMORY, OUTPUT = (
    "it ran longer than 2 s",
    "it needs more than 512 MiB of memory",
    "more than 4,000,000 characters",
)
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"

LONG = {
    "nested loops": NESTED.replace("BODY", ""),
    "three million turns": NESTED.replace("99999", "1800").replace(
        "BODY", "{% set x = (messages[0].content * 9) | upper | lower %}"
    ),
    "a power that never ends": "{{ 9 ** (9 ** 9) }}",
    "the same from variables": "{% set a = 9 %}{% set b = a ** (a ** a) %}",
    "a remainder of huge numbers": "{% set a = 3 ** 9999999 %}{{ (a * a * a) % (a - 1) > 0 }}",
    "the text of a time": "{{ strftime_now('%c' * 10000000) }}",
    "lines of one letter": "{{ ('x' * 1000000) | wordwrap(1) | length }}",
    "random words": "{{ lipsum(n=1000000) | length }}",
    "replacing again and again": NESTED.replace("BODY", "{% set x = ('ab' * 1000000).replace('a', 'c') %}"),
    "sorting": NESTED.replace("BODY", "{% set x = range(99999) | reverse | sort %}"),
    "searching": NESTED.replace("BODY", "{% set x = 'a' * 99999 ~ 'b' in 'a' * 99999 %}"),
    "macros that call each other twice": "{% macro f(n) %}{% if n %}"
    "{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "a recursive loop": "{% for a in [[[1]]] * 9 recursive %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{{ loop(a) }}{% endfor %}",
}
LARGE = {
    "a repeated text": "{{ 'x' * 10 ** 9 }}",
    "a repeated text of variables": "{% set n = 10 ** 9 %}{% set x = 'x' * n %}",
    "a repeated list": "{{ ([1] * 10 ** 9) | length }}",
    "a wide field of %": "{{ '%1000000000d' % 1 }}",
    "a wide field of format": "{{ '{:>1000000000}'.format(1) }}",
    "a centred text": "{{ 'x' | center(10 ** 9) }}",
    "a justified text": "{{ 'x'.ljust(10 ** 9) }}",
    "an indented text": "{{ 'x' | indent(10 ** 9, true) }}",
    "filled batches": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "indented JSON": "{{ messages | tojson(indent=10 ** 9) }}",
    "a long separator": "{{ [1, 2] | join('x' * 10 ** 9) }}",
    "texts that grow by replacing": "{{ 'a'.replace('', 'b' * 10 ** 5).replace('b', 'c' * 10 ** 5) }}",
    "a text doubled": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a list doubled": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "output kept in a variable": "{% set x %}{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}",
    "tables of bytes": "{{ ('é' * 400000000).encode() | length }}",
    "a shifted number": "{{ 2 ** (10 ** 11) > 1 }}",
}
VERBOSE = {
    "many pieces": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "300 MB": "{% for i in range(300) %}{{ 'x' * 1000000 }}{% endfor %}",
    "one piece": "{{ 'x' * 5000000 }}",
    "the conversation many times": "{% for i in range(99999) %}{{ (messages[0].content * 99) }}{% endfor %}",
}
FAILING = {
    "a number of too many digits": "{% set x = 9 ** 300000 %}{{ x }}",
    "the same, folded while compiling": "{{ 9 ** 300000 }}",
    "the same as a refusal": "{% set x = 9 ** 300000 %}{{ raise_exception(x) }}",
    "a huge range": "{{ range(10 ** 7) | list }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop that calls itself": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "the insides of objects": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the insides by name": "{{ cycler | attr('__init__') }}{{ cycler.__init__.__globals__.os }}",
    "the insides by format": "{{ '{0.__class__.__init__}'.format(messages[0]).x.y }}",
    "other files": "{% include '/etc/passwd' %}",
    "other modules": "{% import 'os' as os %}",
    "an unknown filter": "{{ messages | nothing }}",
    "numbers that are too large": "{{ 2.0 ** 99999 }}",
}
BROKEN = {
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested signs": "{{ " + "-" * 50000 + "1 }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "digits": "{{ " + "9" * 5000 + " }}",
}


def refusal(text: str, **limits: float) -> tuple[str, float]:
    """(the message of the error that rendering ends with, seconds)."""
    template = ChatTemplate(text, "evil", limits=TemplateLimits(**limits))
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        template.render(ASK)
    return str(caught.value), time.monotonic() - started


@pytest.mark.parametrize("name", LONG)
def test_a_template_that_does_not_end_is_ended(name: str) -> None:
    message, seconds = refusal(LONG[name], max_seconds=0.5)
    assert "it ran longer than 0.5 s" in message or MEMORY in message, message
    assert seconds < PATIENCE_S


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_takes_much_memory_is_ended(name: str) -> None:
    message, seconds = refusal(LARGE[name])
    assert MEMORY in message or TIME in message, message
    assert seconds < PATIENCE_S


@pytest.mark.parametrize("name", VERBOSE)
def test_a_template_that_writes_too_much_is_ended(name: str) -> None:
    message, seconds = refusal(VERBOSE[name])
    assert OUTPUT in message, message
    assert seconds < PATIENCE_S


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_an_error_of_ours(name: str) -> None:
    message, seconds = refusal(FAILING[name])
    assert "the chat template of evil failed (" in message
    assert "choose a named one (vicuna, llama-2" in message
    assert len(message) < 1000
    assert seconds < PATIENCE_S


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_be_parsed_is_an_error_of_ours(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="the chat template of evil is not valid jinja2"):
        ChatTemplate(BROKEN[name], "evil")
    assert time.monotonic() - started < PATIENCE_S


def test_a_template_longer_than_any_known_is_refused_unread() -> None:
    with pytest.raises(ConfigError, match="has 262,145 characters, at most 262,144 are accepted"):
        ChatTemplate("x" * (MAX_TEMPLATE + 1), "evil")


def test_a_refusal_as_long_as_a_book_is_cut() -> None:
    message, _ = refusal("{{ raise_exception('no ' * 1000000) }}")
    assert "evil refuses these messages: no no" in message
    assert len(message) < 1000


def test_a_template_is_ended_off_the_main_thread_too() -> None:
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(refusal, [LONG["a power that never ends"], LARGE["a repeated text"]]))
    assert TIME in done[0][0]
    assert MEMORY in done[1][0] or sys.platform != "linux"


def test_other_threads_go_on_while_a_template_hangs() -> None:
    """The hanging step holds the interpreter's lock, but that of another process."""
    waiting = threading.Thread(target=refusal, args=[LONG["a power that never ends"]])
    waiting.start()
    longest, last = 0.0, time.monotonic()
    while waiting.is_alive():
        time.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert longest < 1.5


def test_messages_cannot_make_a_fair_template_run_on() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content * m.times }}{% endfor %}", "fair")
    for times, limit in ((10**8, OUTPUT), (10**12, MEMORY)):
        with pytest.raises(RequestError, match=limit):
            template.render([{"role": "user", "content": "x" * (1 if times < 10**9 else 9), "times": times}])
    many = [{"role": "user", "content": "x" * 100_000, "times": 1}] * 100
    with pytest.raises(RequestError, match=OUTPUT):
        template.render(many)


def test_a_template_that_was_ended_can_be_asked_again() -> None:
    text = "{% for m in messages %}{{ m.content * m.times }}"
    text += "{% if m.hang %}{% set x = m.hang ** (m.hang ** m.hang) %}{% endif %}{% endfor %}"
    template = ChatTemplate(text, "moody", limits=TemplateLimits(max_seconds=1.0))
    for extra, message in (({"times": 10**7}, OUTPUT), ({"times": 1, "hang": 9}, "longer than 1 s")):
        with pytest.raises(RequestError, match=message):
            template.render([{"role": "user", "content": "x", **extra}])
        assert template.render([{"role": "user", "content": "x", "times": 3}]) == "xxx"


def test_several_threads_share_one_template() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "shared")
    texts = [f"text {number} " * 50 for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: template.render([{"role": "user", "content": text}]), texts)) == texts


def test_one_rendering_leaves_nothing_to_the_next() -> None:
    template = ChatTemplate("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ mood }}", "x")
    assert template.render(ASK, mood="calm") == "1calm"
    assert template.render(ASK) == "1"


@pytest.mark.parametrize("text", ["a\nb\r\n\u2028\x00", "é😀", "\ud800 alone", "{{ 7 * 7 }}", '"\\'])
def test_every_text_comes_through_unchanged(text: str) -> None:
    assert ChatTemplate("{{ messages[0].content }}", "x").render([{"role": "user", "content": text}]) == text


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", {"a": object()}])
def test_variables_that_are_no_plain_data_are_refused(value: object) -> None:
    template = ChatTemplate("{{ mood }}", "x")
    with pytest.raises(RequestError, match="the variables of a chat template must be plain data"):
        template.render(ASK, mood=value)
    assert template.render(ASK, mood=[1, None]) == "[1, None]"


def worker_of(template: ChatTemplate) -> subprocess.Popen[bytes]:
    return template._process._worker._process


def test_the_process_ends_with_its_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "x")
    template.render(ASK)
    worker = worker_of(template)
    assert worker.poll() is None
    del template
    gc.collect()
    assert worker.poll() is not None


def test_a_process_that_somebody_ended_is_started_again() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "x")
    template.render(ASK)
    worker = worker_of(template)
    worker.kill()
    worker.wait()
    assert template.render(ASK) == "Hello"
    assert worker_of(template) is not worker


def test_no_process_is_left_behind_by_a_program_that_ends(tmp_path: Path) -> None:
    program = (
        "from ropewalk.text.chat import ChatTemplate\n"
        "t = ChatTemplate('{{ messages[0].content }}', 'x'); t.render([{'role': 'user', 'content': 'a'}])\n"
        "print(t._process._worker._process.pid, flush=True)\n"
        "import os, sys; sys.argv[1] == 'abruptly' and os._exit(0)\n"
    )
    for how in ("fairly", "abruptly"):
        done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
        until = time.monotonic() + PATIENCE_S
        while is_running(int(done.stdout)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_running(int(done.stdout)), how


def is_running(pid: int) -> bool:
    """A zombie has ended too: without an init process, nobody may have waited for it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc").exists()


def test_the_process_holds_neither_torch_nor_ropewalk() -> None:
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); print(' '.join(sys.modules))"
    from ropewalk.text import template_worker

    done = subprocess.run(
        [sys.executable, "-I", "-c", program, template_worker.__file__], capture_output=True, text=True, check=True
    )
    assert "jinja2" in done.stdout.split()
    assert not {"torch", "ropewalk", "numpy"} & set(done.stdout.split())


def test_errors_do_not_tell_where_the_folder_lies(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "my-model"
    folder.mkdir(parents=True)
    write_config(folder, chat_template="{{ 9 ** 300000 }}")
    with pytest.raises(RequestError, match=r"the chat template of my-model/tokenizer_config\.json failed") as caught:
        load_chat_template(folder, {}).render(ASK)
    assert str(tmp_path) not in str(caught.value)
    assert json.dumps(str(caught.value))
