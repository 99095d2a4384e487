"""`ropewalk report`: the long-context section of a model card, with its curves, maps and tables."""

from __future__ import annotations

import argparse
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk import __version__
from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.measuring import (
    HELD_OUT,
    add_text_arguments,
    count_argument,
    lengths,
    measured_text,
    names,
    open_model,
)
from ropewalk.faces.cli.options import add_load_arguments, add_model_arguments, given_rope_options
from ropewalk.faces.cli.terminal import note, progress_bar
from ropewalk.files.names import shown_name

if TYPE_CHECKING:
    from ropewalk.measure.report import ReportPlan

MAX_TOKENS = 32768


def add_report_command(commands: argparse._SubParsersAction) -> None:
    """Register it."""
    parser = commands.add_parser(
        "report", help="the long-context section of a model card", description=run_report.__doc__
    )
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for report.md and what it shows")
    parser.add_argument(
        "--lengths",
        type=lengths,
        metavar="N,N,...",
        help="context lengths (default: up to what the checkpoint covers, or four times its original length)",
    )
    parser.add_argument(
        "--max-tokens",
        type=count_argument,
        metavar="N",
        help=f"use at most N tokens of the text (default: {MAX_TOKENS}, or the longest of the lengths)",
    )
    parser.add_argument(
        "--trials", type=count_argument, default=2, metavar="N", help="of a cell (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks", type=names, default="keys,pairs", metavar="NAME,...", help="of retrieval (default: %(default)s)"
    )
    parser.add_argument(
        "--formats",
        type=names,
        default="q8,q6,q4,q8_q4,q4+256",
        metavar="NAME,...",
        help="of the cache, beside fp16 (default: %(default)s)",
    )
    add_load_arguments(parser)
    parser.set_defaults(run=run_report, adapter=[])


def run_report(args: argparse.Namespace) -> int:
    """Write the long-context section of a model card: perplexity by length and position under the scalings that make
    sense, retrieval maps, cache formats, memory, and the settings to take. Run it again to go on where it ended."""
    import torch

    from ropewalk.measure.report import ReportPlan, default_lengths, measure_report, write_file
    from ropewalk.measure.report_text import Source, report_text

    formats = _checked_formats(args)
    text, running = measured_text(args), _running(args)
    _make_folder(args.out)
    base, tokenizer, token_ids = open_model(args, text, max(args.lengths or [0]) or None)
    chosen = tuple(sorted(set(args.lengths))) if args.lengths else default_lengths(base.model, len(token_ids))
    plan = ReportPlan(chosen, _most_tokens(args, max(chosen)), args.trials, tuple(args.tasks), formats)
    found = measure_report(base, tokenizer, token_ids, plan, args.out, progress_bar)
    source = Source(
        model=shown_name(base.setting.folder),
        text=_name(args.text),
        num_tokens=len(token_ids),
        command=_command(args, plan, running),
        versions=f"ropewalk {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )
    write_file(args.out / "report.md", report_text(found, plan, base.model, source))
    note(f"wrote {args.out / 'report.md'}")
    return 0


def _checked_formats(args: argparse.Namespace) -> tuple[str, ...]:
    """Those of --formats, after a look at what could be wrong with the options before anything is measured."""
    from ropewalk.config.cache_format import CacheFormat
    from ropewalk.measure.tasks import check_tasks

    check_tasks(args.tasks)
    rope = given_rope_options(args)
    if rope:
        raise RequestError(f"a report chooses the scalings that it measures by itself: leave out {' and '.join(rope)}")
    return tuple(str(CacheFormat.parse(name)) for name in args.formats if name)


def _most_tokens(args: argparse.Namespace, longest: int) -> int:
    if args.max_tokens is not None and args.max_tokens < longest:
        raise RequestError(f"--max-tokens must be at least the longest length, {longest}, got {args.max_tokens}")
    return args.max_tokens or max(MAX_TOKENS, longest)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {out} cannot be made: {error.strerror or error}") from error


def _name(text: str | None) -> str:
    """What a text is called, without this machine's paths. text: as `measured_text` leaves it."""
    return {None: HELD_OUT, "-": "standard input"}.get(text) or Path(text).name


def _running(args: argparse.Namespace) -> list[str]:
    """The options of loading and running that were given, as they are typed, with names in place of paths."""
    parser = argparse.ArgumentParser(add_help=False)
    add_model_arguments(parser)
    add_load_arguments(parser)
    words = []
    for action in parser._actions:
        value = getattr(args, action.dest)
        if action.option_strings and value != action.default:
            words += [action.option_strings[0], shown_name(value) if isinstance(value, Path) else str(value)]
    return words


def _command(args: argparse.Namespace, plan: ReportPlan, running: list[str]) -> str:
    """What a reader types, with names in place of this machine's paths."""
    words = ["ropewalk", "report"] + ([] if args.model is None else ["MODEL"])
    if args.text is not None:
        words += ["--text", args.text if args.text == "-" else Path(args.text).name]
    words += ["--lengths", ",".join(map(str, plan.lengths)), "--max-tokens", str(plan.max_tokens)]
    words += ["--trials", str(plan.trials), "--tasks", ",".join(plan.tasks), "--formats", ",".join(plan.formats)]
    return shlex.join([*words, *running, "--out", "report"])
