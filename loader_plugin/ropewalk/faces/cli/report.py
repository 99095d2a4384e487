"""`ropewalk report`: the long-context section of a model card, with its curves, maps and tables."""

from __future__ import annotations

import argparse
import platform
import shlex
from pathlib import Path

from ropewalk import __version__
from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.measuring import add_text_arguments, lengths, measured_text, names, open_model
from ropewalk.faces.cli.options import add_load_arguments, add_model_arguments
from ropewalk.faces.cli.terminal import note, progress_bar
from ropewalk.files.names import shown_name

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
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="use at most N tokens of the text (default: %(default)s)",
    )
    parser.add_argument("--trials", type=int, default=2, metavar="N", help="per cell of a map (default: %(default)s)")
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

    text = measured_text(args)
    base, tokenizer, token_ids = open_model(args, text, max(args.lengths or [0]) or None)
    chosen = tuple(sorted(set(args.lengths))) if args.lengths else default_lengths(base.model, len(token_ids))
    plan = ReportPlan(chosen, max(args.max_tokens, max(chosen)), args.trials, tuple(args.tasks), _formats(args.formats))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {args.out} cannot be made: {error.strerror or error}") from error
    found = measure_report(base, tokenizer, token_ids, plan, args.out, progress_bar)
    source = Source(
        model=shown_name(base.setting.folder),
        text=str(args.text or args.file or "held_out.txt").rpartition("/")[2],
        num_tokens=len(token_ids),
        command=_command(args, plan),
        versions=f"ropewalk {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )
    write_file(args.out / "report.md", report_text(found, plan, base.model, source))
    note(f"wrote {args.out / 'report.md'}")
    return 0


def _formats(given: list[str]) -> tuple[str, ...]:
    """Checked before anything is measured."""
    from ropewalk.config.cache_format import CacheFormat

    return tuple(str(CacheFormat.parse(name)) for name in given if name)


def _command(args: argparse.Namespace, plan) -> str:
    """What a reader types, with names in place of this machine's paths."""
    words = ["ropewalk", "report"] + ([] if args.model is None else ["MODEL"])
    if args.text or args.file:
        words += ["--text", Path(args.text or args.file).name]
    words += ["--lengths", ",".join(map(str, plan.lengths)), "--max-tokens", str(plan.max_tokens)]
    words += ["--trials", str(plan.trials), "--tasks", ",".join(plan.tasks), "--formats", ",".join(plan.formats)]
    return shlex.join([*words, "--out", "report"])
