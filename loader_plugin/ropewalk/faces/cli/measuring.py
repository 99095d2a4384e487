"""What the commands that measure share: the text, the record to go on from, and where the results go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.adapter_options import adapter_uses
from ropewalk.faces.cli.loading import load, options_for_adapters
from ropewalk.faces.cli.options import model_folder
from ropewalk.faces.cli.terminal import note, read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ropewalk.measure.record import Record
    from ropewalk.measure.settings import OpenSetting

HELD_OUT = "held_out.txt"  # the text that comes with the embedded model


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
    """The text to measure on. MODEL and FILE may be given in either order, and each may be left out; `args.model` is
    then what it should have been.

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
    if files or args.text is not None:
        return read_text(str(files[0]) if files else args.text)
    if not (model_folder(args) / HELD_OUT).is_file():
        raise RequestError(
            f"there is no text to measure on, and {model_folder(args)} brings no {HELD_OUT}: name a text with "
            "--text FILE (-: standard input)"
        )
    return read_text(str(model_folder(args) / HELD_OUT))


def open_model(args: argparse.Namespace, text: str, max_seq_len: int | None) -> tuple[OpenSetting, Any, list[int]]:
    """(the model with its adapters, its tokenizer, the text's token ids). max_seq_len: unless --max-seq-len says it."""
    from ropewalk.measure.settings import Setting, open_base
    from ropewalk.model.variants import AS_LOADED

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
) -> None:
    """The table on the terminal, unless it goes to standard output as CSV; and what --csv and --plot ask for."""
    from ropewalk.measure.tables import terminal_table

    if args.csv == Path("-"):
        print(csv, end="", flush=True)
    else:
        print(terminal_table(columns, rows), end="", flush=True)
    if args.csv not in (None, Path("-")):
        write_text(args.csv, csv)
    if args.plot is not None:
        from ropewalk.measure.plots import save_plot

        save_plot(plot(), args.plot)
        note(f"wrote {args.plot}")


def write_text(path: Path, text: str) -> None:
    """Raises:
    RequestError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
    note(f"wrote {path}")


def check_plot(args: argparse.Namespace) -> None:
    """Find out before hours of work that a plot could not be drawn.

    Raises:
        RequestError: a name of another format. UnsupportedError: matplotlib is not installed.
    """
    if args.plot is not None:
        from ropewalk.measure.plots import check_plottable

        check_plottable(args.plot)


def names(text: str) -> list[str]:
    """ "none, yarn" as a list."""
    return [part.strip() for part in text.split(",")]


def lengths(text: str) -> list[int]:
    """ "512,1024" as numbers, for argparse."""
    return _numbers(text, int)


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
