"""`ropewalk cache`: read a text once and keep it in a file; say what such a file is. And --cache of other commands."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.base.home import home_expanded
from ropewalk.base.memory import format_bytes
from ropewalk.faces.cli.adapter_options import add_adapter_arguments, load_adapters
from ropewalk.faces.cli.loading import load
from ropewalk.faces.cli.options import (
    add_load_arguments,
    add_model_arguments,
    add_template_argument,
    model_argument,
    model_folder,
    size_argument,
)
from ropewalk.faces.cli.terminal import check_spares, note, progress_bar, read_text

if TYPE_CHECKING:
    from ropewalk.engine.engine import Engine
    from ropewalk.engine.kept import Kept
    from ropewalk.engine.kept_folder import KeptFolder
    from ropewalk.model.saved.file import SavedFile
    from ropewalk.text.chat import Message

MESSAGES = "messages"  # what a conversation is kept under, in JSON
FIRST_TOKENS = 48  # of a file, to show its first words


def add_cache_command(commands: Any) -> None:
    """Register the subcommands."""
    cache = commands.add_parser(
        "cache", help="read a text once, and keep it in a file", description="Keys and values in files."
    )
    kinds = cache.add_subparsers(title="commands", required=True, metavar="COMMAND")

    save = kinds.add_parser("save", help="read a text and keep it", description=run_save.__doc__)
    add_model_arguments(save)
    save.add_argument("file", type=Path, metavar="TEXTFILE", help="a UTF-8 text (-: standard input)")
    save.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write (.safetensors)")
    save.add_argument(
        "--system",
        action="store_true",
        help="as the system text of a conversation, for chat --cache (default: as the beginning of a text, for "
        "generate --cache)",
    )
    add_template_argument(save)
    add_load_arguments(save)
    add_adapter_arguments(save, routes=False)
    save.set_defaults(run=run_save)

    show = kinds.add_parser("show", help="what a file holds", description=run_show.__doc__)
    show.add_argument("file", type=Path, metavar="FILE", help="a saved cache")
    show.add_argument(
        "--model",
        type=model_argument,
        metavar="MODEL",
        help="the model, to show the first words",
    )
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(run=run_show)


def add_cache_argument(group: Any, what: str) -> None:
    """--cache FILE."""
    group.add_argument("--cache", type=Path, metavar="FILE", help=what)


def add_kept_arguments(group: Any, default: str = "none are kept") -> None:
    """--cache-folder and its size, for the commands that keep prompts by themselves. default: where, for people."""
    group.add_argument(
        "--cache-folder",
        type=Path,
        metavar="DIR",
        help=f"where texts that are to be read once are kept, and found again after a restart (default: {default})",
    )
    group.add_argument(
        "--cache-folder-size",
        type=size_argument,
        metavar="SIZE",
        help="how much it may hold, such as 10GiB; what was not used for the longest time goes first (default: 32GiB)",
    )


def kept_folder(args: argparse.Namespace) -> KeptFolder | None:
    """The folder that --cache-folder names.

    Raises:
        ConfigError: it cannot be used. RequestError: a size without a folder.
    """
    from ropewalk.engine.kept_folder import MOST_BYTES, KeptFolder

    if args.cache_folder is None:
        if args.cache_folder_size is not None:
            raise RequestError("--cache-folder-size needs --cache-folder DIR")
        return None
    size = MOST_BYTES if args.cache_folder_size is None else args.cache_folder_size
    return KeptFolder(home_expanded(args.cache_folder), size)


def run_save(args: argparse.Namespace) -> int:
    """Read a text once and keep its keys and values in a file, from which `generate --cache` and `chat --cache` start
    without reading it again."""
    from ropewalk.engine.engine import Engine
    from ropewalk.model.saved.write import check_writable

    check_writable(args.out)
    text = read_text(str(args.file))
    if not text.strip():
        raise RequestError(f"{args.file} holds no text")
    check_spares("--out", args.out, args.file)
    model, tokenizer = load(args, to_talk=True)
    adapters = load_adapters(args, model)
    engine = Engine(model, tokenizer, args.chat_template)
    about = {"title": args.file.name}
    ids = engine.encode(text)
    if args.system:
        messages = [{"role": "system", "content": text}]
        ids, about = conversation_opening(engine, messages), about | {MESSAGES: json.dumps(messages)}
    started = time.perf_counter()
    with progress_bar("reading", "token") as progress:
        kept = engine.kept.save(ids, args.out, about, progress=progress, adapters=adapters)
    seconds = time.perf_counter() - started
    note(f"{args.out}: {kept.num_tokens} tokens, {format_bytes(kept.num_bytes)}, in {seconds:.1f} s")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Show what a saved cache is: model, tokens, RoPE, format, size; and its first words, where the tokenizer of the
    model is at hand."""
    from ropewalk.model.saved.read import open_saved

    saved = open_saved(args.file)
    facts = _facts(saved, args)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def check_kept(args: argparse.Namespace, is_talk: bool = False) -> None:
    """Whether --cache names a saved cache, before a model is loaded. is_talk: it has to hold a conversation.

    Raises:
        SavedCacheError: missing, damaged, or something else. RequestError: no conversation.
    """
    from ropewalk.model.saved.read import open_saved

    if args.cache is None:
        return
    saved = open_saved(args.cache)
    if is_talk:
        kept_messages(saved.description.about, args.cache)


def load_kept(engine: Engine, args: argparse.Namespace) -> Kept | None:
    """The file of --cache, in memory, with a line about it on stderr; None without the option."""
    if args.cache is None:
        return None
    with progress_bar("loading the cache", "page") as progress:
        kept = engine.kept.load(args.cache, progress)
    note(f"{args.cache}: {kept.num_tokens} tokens, {format_bytes(kept.num_bytes)}")
    return kept


def prompt_after(engine: Engine, kept: Kept, prompt: str | None) -> list[int]:
    """The tokens of a prompt that goes on after a kept text. A prompt that begins with that text is taken as it is."""
    if not prompt:
        return kept.token_ids
    if prompt.startswith(engine.tokenizer.decode(kept.token_ids)):
        return engine.encode(prompt)
    return [*kept.token_ids, *engine.encode(prompt, add_bos=False)]


def conversation_opening(engine: Engine, messages: Sequence[Message]) -> list[int]:
    """The tokens that a conversation has before the next question, whatever that is."""
    from ropewalk.engine.kept import opening

    def asked(question: str) -> list[int]:
        return engine.chat_ids([*messages, {"role": "user", "content": question}])

    return opening(asked("A"), asked("Z"))


def kept_messages(about: Mapping[str, str], path: Path) -> list[dict[str, str]]:
    """The conversation that a file holds. about: what was saved with it.

    Raises:
        RequestError: it holds none.
    """
    try:
        messages = json.loads(about[MESSAGES])
        if all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages):
            return messages
    except (KeyError, TypeError, ValueError):
        pass
    raise RequestError(
        f"{path} holds a text and no conversation: continue it with ropewalk generate --cache, or save the text as the "
        "beginning of one with ropewalk cache save --system"
    )


def _facts(saved: SavedFile, args: argparse.Namespace) -> dict[str, Any]:
    description = saved.description
    facts = description.facts
    adapters = dict.fromkeys(use.name for segment in description.segments for use in segment.adapters)
    found = {
        "file": str(saved.path),
        "title": description.about.get("title", ""),
        "kind": "a conversation" if MESSAGES in description.about else "a text",
        "tokens": description.num_tokens,
        "begins": _first_words(saved, args),
        "model": f"{description.model} ({facts.get('family')}, {facts.get('num_layers')} layers)",
        "layer order": facts.get("layer order"),
        "adapters": ", ".join(adapters),
        "RoPE": description.rope.removeprefix("RoPE scaling: "),
        "cache type": facts.get("cache type"),
        "arithmetic": facts.get("arithmetic"),
        "size": format_bytes(saved.num_bytes),
        "ropewalk": description.ropewalk,
    }
    return {name: value for name, value in found.items() if value not in ("", None)}


def _first_words(saved: SavedFile, args: argparse.Namespace) -> str:
    """As text, if the tokenizer is that of the model in the file; nothing if none is at hand."""
    from ropewalk.text.tokenizer.load import load_tokenizer

    folder = model_folder(args)
    if args.model is None and folder.name != saved.description.model:
        return ""
    try:
        tokenizer = load_tokenizer(folder)
    except RopewalkError as error:
        note(f"ropewalk: warning: the first words are not shown: {error}")
        return ""
    if max(saved.token_ids) >= tokenizer.vocab_size:
        note(f"ropewalk: warning: the first words are not shown: {folder} has the tokenizer of another model")
        return ""
    return repr(tokenizer.decode(saved.token_ids[:FIRST_TOKENS]))
