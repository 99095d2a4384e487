"""`ropewalk bench`: how fast a model runs here, beside the limits of this machine."""

from __future__ import annotations

import argparse

from ropewalk.faces.cli.loading import load_without_tokenizer
from ropewalk.faces.cli.measuring import add_result_arguments, check_results, count_argument, lengths, write_results
from ropewalk.faces.cli.options import add_load_arguments, add_model_arguments
from ropewalk.faces.cli.terminal import note, progress_bar

LENGTHS = (128, 512)


def add_bench_command(commands: argparse._SubParsersAction) -> None:
    """Register it."""
    parser = commands.add_parser(
        "bench", help="speeds beside the limits of this machine", description=run_bench.__doc__
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--lengths",
        type=lengths,
        metavar="N,N,...",
        help="of prompts that are read, and decoded after (default: those of "
        f"{','.join(map(str, LENGTHS))} that half of the context holds)",
    )
    parser.add_argument("--rounds", type=count_argument, default=5, metavar="N", help="of each (default: %(default)s)")
    add_result_arguments(parser, record=False)
    add_load_arguments(parser)
    parser.set_defaults(run=run_bench, adapter=[])


def run_bench(args: argparse.Namespace) -> int:
    """Reading prompts and decoding, beside the limits of this machine: reading memory, and products of the kind that
    the model is made of. --plot draws the roofline: how much a token moves and takes, and what the machine allows."""
    from ropewalk.measure.plots import plot_roofline
    from ropewalk.measure.speed import COLUMNS, measure_speeds, speed_rows
    from ropewalk.measure.tables import csv_text

    check_results(args)
    model = load_without_tokenizer(args)
    asked = (
        args.lengths or [length for length in LENGTHS if length < model.max_seq_len // 2] or [model.max_seq_len // 2]
    )
    with progress_bar("measuring", "prompt") as progress:
        found = measure_speeds(model, asked, args.rounds, progress)
    rows = speed_rows(found)
    note(f"{found.machine}, compute {model.backend.compute}; medians of {args.rounds} rounds")
    write_results(args, COLUMNS, rows, csv_text(COLUMNS, rows), lambda: plot_roofline(found))
    return 0
