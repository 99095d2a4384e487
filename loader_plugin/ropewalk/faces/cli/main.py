"""The command `ropewalk`: generate, chat, serve, demo, cache, info, perplexity, compare, retrieval and others.

Results go to stdout, everything about them to stderr. Exit codes: 0, 2 for an error that the message explains, 130
after Ctrl-C, 141 when the reader of stdout has gone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ropewalk import __version__
from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.base.memory import format_bytes
from ropewalk.faces.cli.cache import add_cache_argument, add_cache_command, load_kept, prompt_after
from ropewalk.faces.cli.demo import add_demo_command
from ropewalk.faces.cli.gpu import add_gpu_command
from ropewalk.faces.cli.lab import add_lab_commands
from ropewalk.faces.cli.options import (
    add_adapter_arguments,
    add_load_arguments,
    add_model_arguments,
    add_order_arguments,
    add_sampling_arguments,
    add_shift_argument,
    add_speculation_arguments,
    add_template_argument,
    load,
    load_adapters,
    load_options,
    model_folder,
    note,
    order_options,
    progress_bar,
    read_text,
    sampling_params,
    speculation_options,
)
from ropewalk.faces.cli.serve import add_serve_command
from ropewalk.faces.cli.webui import add_webui_command
from ropewalk.files.embedded import demo_model_path

DEMO_PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n'
GENERATE_TOKENS = 128  # enough to see that it works; --max-new-tokens asks for more
LONG_PREFILL = 1024  # a prompt of fewer tokens is read before a bar would help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(format="ropewalk: %(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.addLevelName(logging.WARNING, "warning")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a character that the terminal lacks becomes a mark, not an error
    try:
        args = _parser().parse_args(arguments)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except RopewalkError as error:
        message = " ".join(str(error).split())
        note(f"ropewalk: error: {message}")
        return 2
    except KeyboardInterrupt:
        note("")
        return 130
    except BrokenPipeError:
        # Python would try to write the rest of the buffer at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run_generate(args: argparse.Namespace) -> int:
    """Stream the continuation of a prompt to stdout, and a line about its speed to stderr."""
    from ropewalk.engine.engine import Engine

    params = sampling_params(args, max_new_tokens=GENERATE_TOKENS)
    prompt, guessing = _prompt(args), speculation_options(args)
    model, tokenizer = load(args, to_talk=True)
    adapters = load_adapters(args, model)
    engine = Engine(model, tokenizer, **guessing)
    kept = load_kept(engine, args)
    ids = engine.encode(prompt) if kept is None else prompt_after(engine, kept, prompt)
    with progress_bar("reading the prompt", "token", LONG_PREFILL) as progress:
        stream = engine.stream(ids, params, progress=progress, adapters=adapters)
        text = prompt if args.echo else ""
        _show(text)
        for piece in stream:
            text = piece
            _show(piece)
    if not text.endswith("\n"):
        _show("\n")
    if stream.routing is not None:
        note(stream.routing.describe())
    if kept is not None:
        known = min(stream.stats.reused_tokens, kept.num_tokens)
        note(f"{args.cache}: {known} of its {kept.num_tokens} tokens were not read again")
    note(f"{stream.stats.describe()}; ended by {stream.finish_reason}")
    return 0


def run_chat(args: argparse.Namespace) -> int:
    """Talk with the model."""
    from ropewalk.faces.cli.chat import chat_loop

    return chat_loop(args)


def run_info(args: argparse.Namespace) -> int:
    """Show what would be loaded."""
    from ropewalk.model.info import model_info

    info = model_info(model_folder(args), options=load_options(args))
    _show(json.dumps(info.to_json(), indent=2) if args.json else info.describe())
    _show("\n")
    return 0


def run_perplexity(args: argparse.Namespace) -> int:
    """Perplexity of a text file at several context lengths."""
    from ropewalk.generate.evaluate import perplexity

    text = read_text(str(_measured_file(args)))
    lengths = args.lengths
    if args.max_seq_len is None and lengths:
        args.max_seq_len = max(lengths)
    model, tokenizer = load(args)
    adapters = load_adapters(args, model)
    token_ids = tokenizer.encode(text, add_bos=False)
    with progress_bar("perplexity", "token") as progress:
        rows = perplexity(model, token_ids, lengths, args.max_tokens, progress, adapters=adapters)
    if args.json:
        fields = ("length", "perplexity", "mean_nll", "num_windows", "num_scored", "seconds", "tokens_per_s")
        _show(json.dumps([{name: getattr(row, name) for name in fields} for row in rows], indent=2) + "\n")
        return 0
    _show(f"{'length':>8} {'perplexity':>12} {'windows':>8} {'scored':>10} {'tokens/s':>10}\n")
    for row in rows:
        _show(
            f"{row.length:8} {row.perplexity:12.4f} {row.num_windows:8} {row.num_scored:10} {row.tokens_per_s:10.1f}\n"
        )
    return 0


def run_export_layers(args: argparse.Namespace) -> int:
    """Write a model with its layers reordered or repeated as a normal checkpoint folder."""
    from ropewalk.model.export.layers import export_layers

    with progress_bar("writing", "tensor") as progress:
        exported = export_layers(args.model, args.out, **order_options(args), progress=progress)
    _show(f"{exported.folder}\n")
    note(f"layers {exported.layer_order}: {exported.num_layers} layers, {format_bytes(exported.num_bytes)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ropewalk", description="GPTQ language models at long context, on CPUs and GPUs"
    )
    parser.add_argument("--version", action="version", version=f"ropewalk {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a text", description=run_generate.__doc__)
    add_model_arguments(generate)
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the text (-: standard input)")
    add_cache_argument(
        generate,
        "start from the text in this file (ropewalk cache save): the prompt goes on after it, unless it begins with it",
    )
    generate.add_argument("--echo", action="store_true", help="show the prompt before its continuation")
    add_sampling_arguments(generate)
    add_speculation_arguments(generate)
    add_load_arguments(generate)
    add_adapter_arguments(generate, routes=True)
    generate.set_defaults(run=run_generate)

    chat = commands.add_parser("chat", help="talk with a model", description=run_chat.__doc__)
    add_model_arguments(chat)
    add_template_argument(chat)
    add_shift_argument(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system text of the conversation")
    add_cache_argument(chat, "go on with the conversation in this file (/save FILE, or ropewalk cache save --system)")
    add_sampling_arguments(chat)
    add_speculation_arguments(chat)
    add_load_arguments(chat)
    add_adapter_arguments(chat, routes=True)
    chat.set_defaults(run=run_chat)

    add_serve_command(commands)

    info = commands.add_parser("info", help="what would be loaded", description=run_info.__doc__)
    add_model_arguments(info)
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=run_info)

    measure = commands.add_parser("perplexity", help="perplexity by context length", description=run_perplexity.__doc__)
    add_model_arguments(measure)
    measure.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="a UTF-8 text (-: standard input; default, without MODEL: the embedded model's held-out text)",
    )
    measure.add_argument("--lengths", type=_lengths, default="512,1024,2048", metavar="N,N,...", help="context lengths")
    measure.add_argument("--max-tokens", type=int, metavar="N", help="use at most N tokens of the text")
    measure.add_argument("--json", action="store_true", help="as JSON")
    add_load_arguments(measure)
    add_adapter_arguments(measure, routes=False)
    measure.set_defaults(run=run_perplexity)

    export = commands.add_parser("export-layers", help="write out a layer order", description=run_export_layers.__doc__)
    export.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    add_order_arguments(export)
    export.set_defaults(run=run_export_layers)
    add_webui_command(commands)
    add_lab_commands(commands)
    add_demo_command(commands)
    add_cache_command(commands)
    add_gpu_command(commands)
    return parser


def _measured_file(args: argparse.Namespace) -> Path:
    """The text that perplexity is measured on; MODEL and FILE may be given in either order, and each may be left out.

    Raises:
        RequestError: a model folder was given, but no text.
    """
    folders = [path for path in (args.model, args.file) if path is not None and path.is_dir()]
    files = [path for path in (args.model, args.file) if path is not None and path not in folders]
    if len(files) == 2:  # neither is a folder: the loader reports the first
        return args.file
    args.model = folders[0] if folders else None
    if files:
        return files[0]
    if folders:
        raise RequestError(f"there is no text to measure on: name a file after {folders[0]} (-: standard input)")
    return demo_model_path() / "held_out.txt"


def _prompt(args: argparse.Namespace) -> str:
    """The prompt given by option; otherwise standard input for a named model, or an example for the embedded one. With
    a kept text there need be none."""
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    if args.cache is not None and sys.stdin.isatty():
        return ""
    if args.model is None and args.cache is None:
        return DEMO_PROMPT
    if sys.stdin.isatty():
        raise RequestError("there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe the text in")
    return read_text("-")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers separated by commas are needed, got {text!r}") from error
