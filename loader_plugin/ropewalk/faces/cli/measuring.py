"""What the commands that measure share: the text, the record to go on from, and where the results go."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.adapter_options import adapter_uses
from ropewalk.faces.cli.loading import load, options_for_adapters
from ropewalk.faces.cli.options import model_folder
from ropewalk.faces.cli.terminal import check_spares, note, read_text
from ropewalk.files.replaced import check_place, check_replaceable
from ropewalk.rope.spellings import AS_LOADED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ropewalk.measure.record import Record
    from ropewalk.measure.settings import OpenSetting

HELD_OUT = "held_out.txt"  # the text that comes with the embedded model
STANDARD_OUTPUT = Path("-")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, after MODEL or by its name."""
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the text; the same as --text")
    parser.add_argument(
        "--text", metavar="FILE", help=f"a UTF-8 text (-: standard input; default: {HELD_OUT} of the model)"
    )


def add_result_arguments(parser: argparse.ArgumentParser, record: bool = True) -> None:
    """Where results go, and (record) what to go on from."""
    group = parser.add_argument_group("results")
    group.add_argument("--csv", type=Path, metavar="FILE", help="write the table there as CSV (-: standard output)")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw it there: .svg, .png or .pdf")
    if record:
        group.add_argument(
            "--record",
            type=Path,
            metavar="FILE",
            help="keep what is measured there as JSON, and go on from it if it exists",
        )


def measured_text(args: argparse.Namespace) -> str:
    """The text to measure on. MODEL and FILE may be given in either order, and each may be left out; `args.model` and
    `args.text` are then what they should have been (None: the model's own text).

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    folders = [path for path in (args.model, args.file) if path is not None and path.is_dir()]
    files = [path for path in (args.model, args.file) if path is not None and path not in folders]
    if len(files) == 2:  # neither is a folder: the loader reports the first
        return read_text(str(args.file))
    if files and args.text is not None and not folders:
        folders, files = files, []  # it cannot be the text: the loader reports it
    args.model = folders[0] if folders else None
    if files and args.text is not None:
        raise RequestError(f"there are two texts, {files[0]} and --text {args.text}: leave one of them out")
    if files:
        args.text = str(files[0])
    if args.text is not None:
        return read_text(args.text)
    if not (model_folder(args) / HELD_OUT).is_file():
        raise RequestError(
            f"there is no text to measure on, and {model_folder(args)} brings no {HELD_OUT}: name a text with "
            "--text FILE (-: standard input)"
        )
    return read_text(str(model_folder(args) / HELD_OUT))


def open_model(args: argparse.Namespace, text: str, max_seq_len: int | None) -> tuple[OpenSetting, Any, list[int]]:
    """(the model with its adapters, its tokenizer, the text's token ids). max_seq_len: unless --max-seq-len says it."""
    from ropewalk.measure.settings import Setting, open_base

    if args.max_seq_len is None:
        args.max_seq_len = max_seq_len
    options = options_for_adapters(args)
    model, tokenizer = load(args, options=options)
    base = open_base(Setting(AS_LOADED, model_folder(args), options, adapter_uses(args)), model)
    return base, tokenizer, tokenizer.encode(text, add_bos=False)


def open_record(args: argparse.Namespace, kind: str, token_ids: Sequence[int]) -> Record:
    """The file of --record, for this text; without the option nothing is written."""
    from ropewalk.measure.record import Record, text_facts

    return Record(args.record, kind, text_facts(token_ids))


def write_results(
    args: argparse.Namespace,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    csv: str,
    plot: Callable[[], Figure],
    shown: str | None = None,
) -> None:
    """The table on the terminal, unless it goes to standard output as CSV or `shown` goes there; and what --csv and
    --plot ask for.

    Raises:
        RequestError: a file cannot be written. The other one is.
    """
    from ropewalk.measure.tables import terminal_table

    if args.csv == STANDARD_OUTPUT:
        print(csv, end="", flush=True)
    else:
        print(terminal_table(columns, rows) if shown is None else shown, end="", flush=True)
    with ExitStack() as both:
        if args.plot is not None:
            both.callback(_draw, plot, args.plot)
        if args.csv not in (None, STANDARD_OUTPUT):
            both.callback(write_text, args.csv, csv)


def _draw(plot: Callable[[], Figure], path: Path) -> None:
    from ropewalk.measure.plots import save_plot

    save_plot(plot(), path)
    note(f"wrote {path}")


def write_text(path: Path, text: str) -> None:
    """Raises:
    RequestError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
    note(f"wrote {path}")


def check_results(args: argparse.Namespace) -> None:
    """Find out before hours of work that results could not be written, or would take the place of the text.

    Raises:
        RequestError: a file cannot be there, or is the text; a plot of another format. UnsupportedError: matplotlib is
            not installed.
    """
    for option in ("csv", "plot", "record"):
        path = getattr(args, option, None)
        if path not in (None, STANDARD_OUTPUT):
            _check_output(f"--{option}", path, check_replaceable if option == "record" else check_place)
            check_spares(f"--{option}", path, getattr(args, "text", None))
    if args.plot is not None:
        from ropewalk.measure.plots import check_plottable

        check_plottable(args.plot)


def _check_output(option: str, path: Path, check: Callable[[Path], None]) -> None:
    try:
        check(path)
    except OSError as error:
        raise RequestError(f"{option} {path} cannot be written: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RequestError(f"{option} {path} cannot be written: there is no permission")


def text_after_options(args: argparse.Namespace, rest: list[str]) -> list[str]:
    """What argparse could not place of `MODEL --option X FILE`: it takes an optional FILE for left out where options
    follow MODEL. Returns what is still without a place."""
    if rest and not rest[0].startswith("-") and getattr(args, "file", rest) is None:
        args.file = Path(rest[0])
        return rest[1:]
    return rest


def names(text: str) -> list[str]:
    """ "none, yarn" as a list."""
    return [part.strip() for part in text.split(",")]


def lengths(text: str) -> list[int]:
    """ "512,1024" as numbers of tokens, for argparse."""
    found = _numbers(text, int)
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f"lengths of at least 2 tokens are needed, got {min(found)}")
    return found


def count_argument(text: str) -> int:
    """A number of things, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 is needed, got {text!r:.40}")
    return int(text)


def depths(text: str) -> list[float]:
    """ "0,0.5,1" as numbers, for argparse."""
    return _numbers(text, float)


def percent(share: float) -> str:
    """A share as people read it."""
    return f"{100 * share:.0f}%"


def _numbers(text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers separated by commas are needed, got {text!r}") from error
