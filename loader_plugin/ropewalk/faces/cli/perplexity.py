"""`ropewalk perplexity`: perplexity of a text by context length, or by position within one length."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.adapter_options import add_adapter_arguments
from ropewalk.faces.cli.measuring import (
    add_result_arguments,
    add_text_arguments,
    check_results,
    count_argument,
    lengths,
    measured_text,
    open_model,
    open_record,
    write_results,
)
from ropewalk.faces.cli.options import add_load_arguments, add_model_arguments
from ropewalk.faces.cli.terminal import progress_bar

if TYPE_CHECKING:
    from ropewalk.measure.compare import PositionCurve
    from ropewalk.measure.record import Record
    from ropewalk.measure.settings import OpenSetting

JSON_FIELDS = ("length", "perplexity", "error", "mean_nll", "num_windows", "num_scored", "seconds", "tokens_per_s")
POSITION_FIELDS = ("start", "end", "perplexity", "error", "mean_nll", "num_windows", "num_scored")


def add_perplexity_command(commands: argparse._SubParsersAction) -> None:
    """Register it."""
    parser = commands.add_parser("perplexity", help="perplexity by context length", description=run_perplexity.__doc__)
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--lengths", type=lengths, default="512,1024,2048", metavar="N,N,...", help="context lengths")
    add_position_arguments(parser)
    parser.add_argument("--max-tokens", type=count_argument, metavar="N", help="use at most N tokens of the text")
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    add_result_arguments(parser)
    add_load_arguments(parser)
    add_adapter_arguments(parser, routes=False)
    parser.set_defaults(run=run_perplexity)


def add_position_arguments(parser: argparse.ArgumentParser) -> None:
    """--by-position and --bin."""
    parser.add_argument(
        "--by-position",
        action="store_true",
        help="by position within windows of the longest length, instead of by length",
    )
    parser.add_argument(
        "--bin",
        type=count_argument,
        metavar="N",
        help="positions of a bin, a multiple of 64 (default: a sixteenth of the length)",
    )


def run_perplexity(args: argparse.Namespace) -> int:
    """Perplexity of a text file at several context lengths, or by position in the longest of them."""
    from ropewalk.generate.evaluate import perplexity
    from ropewalk.measure.compare import Curve, curves_csv
    from ropewalk.measure.plots import plot_curves
    from ropewalk.measure.tables import with_error

    check_bin_is_used(args)
    text = measured_text(args)
    check_results(args)
    base, _, token_ids = open_model(args, text, max(args.lengths))
    record = open_record(args, "perplexity", token_ids)
    if args.by_position:
        return _by_position(args, base, token_ids, record)
    kept = record.part("perplexity", base.facts)
    with progress_bar("perplexity", "token") as progress:
        rows = perplexity(
            base.model, token_ids, args.lengths, args.max_tokens, progress, adapters=base.adapters, kept=kept
        )
    curve = Curve("perplexity", base.model.rope.describe(), tuple(rows))
    shown = [
        (
            row.length,
            with_error(row.perplexity, row.error, 4),
            row.num_windows,
            row.num_scored,
            f"{row.tokens_per_s:.1f}",
        )
        for row in rows
    ]
    columns = ("length", "perplexity", "windows", "scored", "tokens/s")
    trained = base.model.rope.original_length
    as_json = _json(rows, JSON_FIELDS) if args.json else None
    write_results(args, columns, shown, curves_csv([curve]), lambda: plot_curves([curve], trained), as_json)
    return 0


def _by_position(args: argparse.Namespace, base: OpenSetting, token_ids: Sequence[int], record: Record) -> int:
    from ropewalk.generate.evaluate import read_windows, tokens_used
    from ropewalk.measure.compare import PositionCurve, TokenCount, positions_csv
    from ropewalk.measure.plots import plot_positions
    from ropewalk.measure.positions import by_position, check_bin, default_bin

    length = max(args.lengths)
    size = default_bin(length) if args.bin is None else args.bin
    check_bin(size, length)
    num_used = tokens_used(len(token_ids), [length], args.max_tokens, base.model.max_seq_len)
    kept = record.part("perplexity", base.facts)
    with progress_bar("perplexity", "token") as progress:
        count = TokenCount(progress, num_used)
        windows = read_windows(base.model, token_ids[:num_used], length, count.add, None, base.adapters, kept)
    curve = PositionCurve("perplexity", base.model.rope.describe(), tuple(by_position(windows, size)))
    columns, rows = position_rows([curve])
    trained = base.model.rope.original_length
    shown = [row[1:] for row in rows]
    as_json = _json(curve.rows, POSITION_FIELDS) if args.json else None
    write_results(args, columns[1:], shown, positions_csv([curve]), lambda: plot_positions([curve], trained), as_json)
    return 0


def _json(rows: Sequence[Any], fields: Sequence[str]) -> str:
    return json.dumps([{name: getattr(row, name) for name in fields} for row in rows], indent=2) + "\n"


def check_bin_is_used(args: argparse.Namespace) -> None:
    """Raises:
    RequestError: --bin without --by-position.
    """
    if args.bin is not None and not args.by_position:
        raise RequestError(f"--bin {args.bin} has no effect without --by-position: give both, or neither")


def position_rows(curves: Sequence[PositionCurve]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The columns and rows of a table by position."""
    from ropewalk.measure.tables import with_error

    rows = [
        (
            curve.name,
            f"{row.start}-{row.end - 1}",
            with_error(row.perplexity, row.error),
            row.num_windows,
            row.num_scored,
        )
        for curve in curves
        for row in curve.rows
    ]
    return ("setting", "positions", "perplexity", "windows", "scored"), rows
