"""The command `ropewalk` with its subcommands.

Results go to stdout, everything about them to stderr. Exit codes: 0, 2 for an error that the message explains (one
line, and below it the place in a text that is meant, if there is one), 130 after Ctrl-C, 141 when the reader of stdout
has gone.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ropewalk import __version__
from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.base.memory import format_bytes
from ropewalk.faces.cli.adapter_options import add_adapter_arguments, load_adapters
from ropewalk.faces.cli.bench import add_bench_command
from ropewalk.faces.cli.cache import add_cache_argument, add_cache_command, check_kept, load_kept, prompt_after
from ropewalk.faces.cli.demo import add_demo_command
from ropewalk.faces.cli.divergence import add_divergence_command
from ropewalk.faces.cli.gpu import add_gpu_command
from ropewalk.faces.cli.lab import add_lab_commands
from ropewalk.faces.cli.list import add_list_commands
from ropewalk.faces.cli.loading import load
from ropewalk.faces.cli.measuring import text_after_options
from ropewalk.faces.cli.options import (
    MODEL_HELP,
    add_load_arguments,
    add_model_arguments,
    add_order_arguments,
    add_shift_argument,
    add_speculation_arguments,
    add_template_argument,
    fetch_named,
    model_argument,
    order_options,
    speculation_options,
)
from ropewalk.faces.cli.perplexity import add_perplexity_command
from ropewalk.faces.cli.replicas import add_replicas
from ropewalk.faces.cli.report import add_report_command
from ropewalk.faces.cli.sampling_options import add_sampling_arguments, sampling_params
from ropewalk.faces.cli.serve import add_serve_command
from ropewalk.faces.cli.streams import discard_output, is_of_output, is_piped, prepare_streams
from ropewalk.faces.cli.terminal import note, progress_bar, read_text
from ropewalk.faces.cli.torchrun import is_under_torchrun, run_under_torchrun
from ropewalk.faces.cli.tour import add_tour_command
from ropewalk.faces.cli.webui import add_webui_command
from ropewalk.text.example import EXAMPLE

GENERATE_TOKENS = 128  # enough to see that it works; --max-new-tokens asks for more
LONG_PREFILL = 1024  # a prompt of fewer tokens is read before a bar would help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    prepare_streams()
    logging.basicConfig(format="ropewalk: %(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.addLevelName(logging.WARNING, "warning")
    try:
        return run_under_torchrun(lambda: _parse(arguments), _run) if is_under_torchrun() else _run(_parse(arguments))
    except RopewalkError as error:
        note(f"ropewalk: error: {error}")
        return 2
    except KeyboardInterrupt:
        note("")
        return 130
    except BrokenPipeError:
        discard_output()
        return 141
    except OSError as error:
        if not is_of_output(error):
            raise
        discard_output()
        note(f"ropewalk: error: standard output cannot be written: {error.strerror or error}")
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    rest = text_after_options(args, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.command_line = tuple(sys.argv[1:] if arguments is None else arguments)
    return args


def _run(args: argparse.Namespace) -> int:
    """A command, from its options to its exit code."""
    fetch_named(args)
    code = args.run(args)
    sys.stdout.flush()
    return code


def run_generate(args: argparse.Namespace) -> int:
    """Stream the continuation of a prompt to stdout, and a line about its speed to stderr."""
    from ropewalk.engine.engine import Engine

    params = sampling_params(args, max_new_tokens=GENERATE_TOKENS)
    prompt, guessing = _prompt(args), speculation_options(args)
    check_kept(args)
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

    add_replicas(add_serve_command(commands))

    add_list_commands(commands)
    add_perplexity_command(commands)
    export = commands.add_parser("export-layers", help="write out a layer order", description=run_export_layers.__doc__)
    export.add_argument("model", type=model_argument, metavar="MODEL", help=MODEL_HELP)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    add_order_arguments(export)
    export.set_defaults(run=run_export_layers)
    add_webui_command(commands)
    add_lab_commands(commands)
    add_divergence_command(commands)
    add_report_command(commands)
    add_demo_command(commands)
    add_tour_command(commands)
    add_cache_command(commands)
    add_gpu_command(commands)
    add_bench_command(commands)
    return parser


def _prompt(args: argparse.Namespace) -> str:
    """The prompt given by option, or on standard input; without either an example for the embedded model. With a kept
    text there need be none."""
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    if args.cache is not None and sys.stdin.isatty():
        return ""
    if args.model is None and args.cache is None:
        return (read_text("-") if is_piped() else "") or EXAMPLE
    if sys.stdin.isatty():
        raise RequestError("there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe the text in")
    return read_text("-")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
