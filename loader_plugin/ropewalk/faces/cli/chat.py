"""`ropewalk chat`: a conversation in the terminal. Each turn computes only what the cache does not hold yet."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ropewalk.adapters.request import Request
from ropewalk.base.choices import ROTATE
from ropewalk.base.errors import ContextLengthError, RequestError, RopewalkError, SavedCacheError
from ropewalk.base.home import home_expanded
from ropewalk.base.memory import format_bytes
from ropewalk.engine.engine import Engine
from ropewalk.faces.cli.adapter_options import load_adapters
from ropewalk.faces.cli.cache import MESSAGES, check_kept, conversation_opening, kept_messages, load_kept
from ropewalk.faces.cli.loading import load
from ropewalk.faces.cli.options import shift_option, speculation_options
from ropewalk.faces.cli.rescale import HELP as RESCALE_HELP
from ropewalk.faces.cli.rescale import parse_rescale
from ropewalk.faces.cli.sampling_options import sampling_params
from ropewalk.faces.cli.terminal import note, progress_bar
from ropewalk.generate.sampling import SamplingParams, check_stop_tokens

HELP = (
    "/reset forgets the conversation, /undo the last turn, /save FILE keeps it for chat --cache FILE, /exit (or "
    f"Ctrl-D) leaves; Ctrl-C stops a reply; {RESCALE_HELP}"
)
REPLY_TOKENS = 512
LONG_PREFILL = 1024


class Conversation:
    """The messages of a chat, cut from the front when they outgrow the context."""

    def __init__(
        self, engine: Engine, params: SamplingParams, system: str | None, adapters: Request | None = None
    ) -> None:
        self.engine = engine
        self.adapters = adapters
        self.params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.messages = []

    def undo(self) -> bool:
        """Forget the last question and its answer; False if there is none."""
        if not self.messages:
            return False
        del self.messages[-2:]
        return True

    def ask(self, text: str) -> str:
        """Stream the reply to stdout; returns a line about its speed."""
        self.messages.append({"role": "user", "content": text})
        try:
            reply, line = self._reply()
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": reply})
        return line

    def save(self, path: Path) -> str:
        """Keep the conversation in a file; returns a line about it."""
        messages = self._opening + self.messages
        with progress_bar("reading", "token", LONG_PREFILL) as progress:
            kept = self.engine.kept.save(
                conversation_opening(self.engine, messages),
                path,
                {"title": "a conversation", MESSAGES: json.dumps(messages)},
                progress=progress,
                adapters=self.adapters,
            )
        return f"{path}: {kept.num_tokens} tokens, {format_bytes(kept.num_bytes)}"

    def resume(self, messages: list[dict[str, str]]) -> None:
        """Go on with these messages; a system text among them replaces the one so far."""
        self._opening = [message for message in messages[:1] if message["role"] == "system"] or self._opening
        self.messages = [message for message in messages if message["role"] != "system"]

    def _reply(self) -> tuple[str, str]:
        if not self.engine.context_shift:
            self._shorten()
        pieces = []
        with _interrupt_sets() as interrupted, progress_bar("reading", "token", LONG_PREFILL) as progress:
            messages = self._opening + self.messages
            stream = self.engine.chat(messages, self.params, interrupted.is_set, progress, self.adapters)
            if stream.dropped_messages:
                note(f"the context is full: left out the {stream.dropped_messages} oldest messages")
            for piece in stream:
                pieces.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        line = "stopped before the prompt was read" if stream.stats is None else stream.stats.describe()
        routed = "" if stream.routing is None else f"{stream.routing.describe()}; "
        return "".join(pieces).strip(), f"{routed}{line}; ended by {stream.finish_reason}"

    def _shorten(self) -> None:
        """Drop the oldest turns until the prompt leaves room for a reply."""
        capacity = self.engine.context_size
        room = min(self.params.max_new_tokens or REPLY_TOKENS, capacity // 4)
        dropped = 0
        while len(self.messages) > 2 and not self._fits(capacity - room):
            del self.messages[:2]
            dropped += 1
        if dropped:
            note(f"the context is full: forgot the {dropped} oldest turns")

    def _fits(self, limit: int) -> bool:
        try:
            return len(self.engine.chat_ids(self._opening + self.messages)) <= limit
        except ContextLengthError:
            return False


def chat_loop(args: argparse.Namespace) -> int:
    """Read lines from stdin and answer them until the end; the exit code."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing in input(); Windows has none)
    if args.cache is not None and args.system is not None:
        raise RequestError("--cache and --system cannot be used together: the file has its own system text")
    check_kept(args, is_talk=True)
    params, guessing = sampling_params(args, max_new_tokens=REPLY_TOKENS), speculation_options(args)
    shift = shift_option(args)
    model, tokenizer = load(args, to_talk=True)
    check_stop_tokens(params.stop_token_ids, model.config.vocab_size)
    adapters = load_adapters(args, model)
    engine = Engine(model, tokenizer, args.chat_template, context_shift=shift, **guessing)
    conversation = Conversation(engine, params, args.system, adapters)
    _ = engine.chat_template  # a broken or missing template is better reported before the first question
    kept = load_kept(engine, args)
    if kept is not None:
        conversation.resume(kept_messages(kept.about, args.cache))
    note(HELP)
    for line in _lines():
        if line.strip() == "/exit":
            break
        if line.strip():
            _answer(conversation, line)
    return 0


def _lines() -> Iterator[str]:
    """What is typed, line by line, until the end of input. A person's first Ctrl-C gives up the line and no more."""
    was_interrupted = False
    while True:
        try:
            line = _ask_for_line()
        except EOFError:
            return
        except UnicodeDecodeError:
            note("that line is not UTF-8 text")
            continue
        except KeyboardInterrupt:
            if was_interrupted or not sys.stdin.isatty():
                raise
            was_interrupted = True
            note("\nCtrl-C again, /exit or Ctrl-D leaves")
            continue
        was_interrupted = False
        yield line


def _ask_for_line() -> str:
    """A line from standard input; a person is asked for it, apart from replies that go into a file."""
    is_person, is_shown = sys.stdin.isatty(), sys.stdout.isatty()
    if is_person and not is_shown:
        print("> ", end="", file=sys.stderr, flush=True)
    return input("> " if is_person and is_shown else "")


def _answer(conversation: Conversation, line: str) -> None:
    command = line.strip()
    if command == "/reset":
        conversation.reset()
        note("forgot the conversation")
    elif command == "/undo":
        note("forgot the last turn" if conversation.undo() else "there is nothing to undo")
    elif command.startswith("/save "):
        _tell(lambda: conversation.save(home_expanded(command.removeprefix("/save ").strip())))
    elif command.split()[0] == "/rescale":
        _rescale(conversation.engine, command.removeprefix("/rescale"))
    elif command.startswith("/"):
        note(HELP)
    else:
        _tell(lambda: conversation.ask(line))


def _tell(do: Callable[[], str]) -> None:
    """A line about what was done, or what is wrong with it."""
    try:
        note(do())
    except (RequestError, SavedCacheError) as error:
        note(f"ropewalk: error: {error}")


def _rescale(engine: Engine, text: str) -> None:
    if not text.strip():
        note(f"{engine.model.rope.describe()}. {RESCALE_HELP}")
        return
    try:
        given = parse_rescale(text)
        engine.rescale(**given)
    except RopewalkError as error:
        note(f"ropewalk: error: {error}")
        return
    how = "the conversation was turned to it" if given["mode"] == ROTATE else "the conversation will be read anew"
    note(f"{engine.model.rope.describe()}; {how}")


@contextmanager
def _interrupt_sets() -> Iterator[threading.Event]:
    """While active, Ctrl-C sets the flag instead of raising KeyboardInterrupt."""
    flag = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda number, frame: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
