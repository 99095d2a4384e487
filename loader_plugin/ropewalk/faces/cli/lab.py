"""`ropewalk compare` and `ropewalk retrieval`: what RoPE scalings do to a model, as tables and plots."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.adapters.config import find_adapter
from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.adapter_options import add_adapter_arguments
from ropewalk.faces.cli.measuring import (
    STANDARD_OUTPUT,
    add_result_arguments,
    add_text_arguments,
    check_results,
    count_argument,
    depths,
    lengths,
    measured_text,
    names,
    open_model,
    open_record,
    percent,
    write_results,
)
from ropewalk.faces.cli.options import add_load_arguments, add_model_arguments, given_rope_options, model_folder
from ropewalk.faces.cli.perplexity import add_position_arguments, check_bin_is_used, position_rows
from ropewalk.faces.cli.terminal import note, progress_bar
from ropewalk.rope.spellings import AS_LOADED, SCALINGS

if TYPE_CHECKING:
    from ropewalk.measure.record import Record
    from ropewalk.model.model import Model
    from ropewalk.model.variants import Variant

TASK_HELP = (
    "keys: one pass key (default); several: a key at every depth, told apart by names; pairs: values of a JSON object "
    "that fills the context"
)


def add_lab_commands(commands: argparse._SubParsersAction) -> None:
    """Register both commands."""
    compare = commands.add_parser("compare", help="perplexity under several scalings", description=run_compare.__doc__)
    add_model_arguments(compare)
    add_text_arguments(compare)
    compare.add_argument("--lengths", type=lengths, default="512,1024,2048", metavar="N,N,...", help="context lengths")
    compare.add_argument(
        "--scalings",
        type=names,
        metavar="NAME,NAME,...",
        help=f"{AS_LOADED} (with the scaling options above), {', '.join(SCALINGS)}; yarn:8 has a factor of its own "
        f"(default: all, {AS_LOADED} only with such options)",
    )
    compare.add_argument(
        "--factor", type=float, metavar="X", help="factor of each scaling (default: longest / original length)"
    )
    compare.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME",
        help="one more curve: a LoRA, with the RoPE scaling that its folder asks for",
    )
    add_position_arguments(compare)
    compare.add_argument(
        "--recommend",
        action="store_true",
        help="find a scaling for the longest of the lengths: measure methods and factors, and say which to take",
    )
    compare.add_argument(
        "--max-tokens",
        type=count_argument,
        default=32768,
        metavar="N",
        help="use at most N tokens of the text (default: %(default)s)",
    )
    add_result_arguments(compare)
    add_load_arguments(compare)
    compare.set_defaults(run=run_compare, adapter=[])  # the model itself is loaded without adapters

    retrieval = commands.add_parser(
        "retrieval", help="keys found again, by depth and length", description=run_retrieval.__doc__
    )
    add_model_arguments(retrieval)
    add_text_arguments(retrieval)
    retrieval.add_argument(
        "--lengths", type=lengths, default="256,512,1024,2048", metavar="N,N,...", help="context lengths"
    )
    retrieval.add_argument("--task", default="keys", metavar="NAME", help=TASK_HELP)
    retrieval.add_argument("--depths", type=depths, default="0,0.25,0.5,0.75,1", metavar="X,X,...", help="0 to 1")
    retrieval.add_argument(
        "--trials", type=count_argument, default=4, metavar="N", help="of a cell (default: %(default)s)"
    )
    retrieval.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the keys (default: %(default)s)")
    add_result_arguments(retrieval)
    add_load_arguments(retrieval)
    add_adapter_arguments(retrieval, routes=False)
    retrieval.set_defaults(run=run_retrieval)


def run_compare(args: argparse.Namespace) -> int:
    """Perplexity of a text under several RoPE scalings, by context length or by position; or the scaling to take."""
    from ropewalk.measure.compare import compare_perplexity, curves_csv
    from ropewalk.measure.plots import plot_curves
    from ropewalk.measure.tables import with_error

    _settle_scalings(args)
    check_bin_is_used(args)
    text = measured_text(args)
    check_results(args)
    base, _, token_ids = open_model(args, text, max(args.lengths))
    model = base.model
    if args.recommend:
        return _recommend(args, model, token_ids)
    variants = _variants(args, model)
    record = open_record(args, "perplexity", token_ids)
    if args.by_position:
        return _by_position(args, model, token_ids, variants, record)
    with progress_bar("perplexity", "token") as progress:
        curves = compare_perplexity(model, token_ids, args.lengths, variants, args.max_tokens, progress, record=record)
    rows = [(curve.name, *(with_error(row.perplexity, row.error) for row in curve.rows)) for curve in curves]
    columns = ("scaling", *(f"{length:,}" for length in args.lengths))
    trained = model.rope.original_length
    write_results(args, columns, rows, curves_csv(curves), lambda: plot_curves(curves, trained))
    return 0


def _settle_scalings(args: argparse.Namespace) -> None:
    """Make --scalings what it is by default, if it was not given.

    Raises:
        RequestError: options that would have no effect beside each other.
    """
    rope = given_rope_options(args)
    scalings = [option for option in rope if option != "--rope-theta"]  # that one goes with any of them
    if args.recommend:
        unused = {"--scalings": args.scalings, "--lora": args.lora, "--factor": args.factor}
        given = [name for name, value in unused.items() if value not in (None, [])] + rope
        if args.by_position:
            given.append("--by-position")
        if given:
            raise RequestError(f"--recommend chooses what it measures by itself: leave out {' and '.join(given)}")
    elif scalings and args.scalings is not None and AS_LOADED not in args.scalings:
        raise RequestError(
            f"{' and '.join(scalings)} change the model as it is loaded, which is not among the --scalings: add "
            f'"{AS_LOADED}" to them, or leave the options out'
        )
    if args.factor is not None and not 1 <= args.factor < math.inf:  # NaN fails too
        raise RequestError(f"--factor must be at least 1, got {args.factor:g}")
    if args.scalings is None:
        args.scalings = [*([AS_LOADED] if scalings else []), *SCALINGS]


def run_retrieval(args: argparse.Namespace) -> int:
    """Hide keys in a text and ask for them, by length and depth."""
    from ropewalk.measure.plots import plot_retrieval
    from ropewalk.measure.retrieval import cells_csv, retrieval_map
    from ropewalk.measure.tasks import check_tasks, make_task

    check_tasks([args.task])
    text = measured_text(args)
    check_results(args)
    base, tokenizer, token_ids = open_model(args, text, max(args.lengths))
    task = make_task(args.task, tokenizer, token_ids, args.trials, args.seed)
    record = open_record(args, "retrieval", token_ids)
    kept = record.part(args.task, {**base.facts, **task.facts, "depths": args.depths})
    with progress_bar("retrieval", "question") as progress:
        cells = retrieval_map(base.model, task, args.lengths, args.depths, progress, adapters=base.adapters, kept=kept)
    rows = [
        (f"{c.length:,}", percent(c.depth), c.trials, percent(c.found), percent(c.tokens_found),
         "" if c.all_found is None else percent(c.all_found))
        for c in cells
    ]  # fmt: skip
    columns = ("length", "depth", "trials", "found", "tokens found", "all of a context")
    title = f"{args.task}, {base.model.rope.method.name}"
    write_results(args, columns, rows, cells_csv(cells), lambda: plot_retrieval(cells, title))
    return 0


def _recommend(args: argparse.Namespace, model: Model, token_ids: Sequence[int]) -> int:
    from ropewalk.measure.plots import plot_recommendation
    from ropewalk.measure.recommend import RULE, recommend, recommendation_csv, recommendation_rows

    record = open_record(args, "perplexity", token_ids)
    with progress_bar("recommending", "token") as progress:
        found = recommend(model, token_ids, max(args.lengths), args.max_tokens, progress, record=record)
    columns, rows = recommendation_rows(found)
    say = note if args.csv == STANDARD_OUTPUT else print  # a CSV is read by programs
    try:
        write_results(args, columns, rows, recommendation_csv(found), lambda: plot_recommendation(found))
    finally:
        say(f"\n{found.reason}\nThe options: {found.options}")
    note(f"The rule: {RULE}.")
    return 0


def _by_position(
    args: argparse.Namespace, model: Model, token_ids: Sequence[int], variants: Sequence[Variant], record: Record
) -> int:
    from ropewalk.measure.compare import compare_positions, positions_csv
    from ropewalk.measure.plots import plot_positions
    from ropewalk.measure.positions import default_bin

    length = max(args.lengths)
    size = default_bin(length) if args.bin is None else args.bin
    with progress_bar("perplexity", "token") as progress:
        curves = compare_positions(model, token_ids, length, size, variants, args.max_tokens, progress, record=record)
    columns, rows = position_rows(curves)
    trained = model.rope.original_length
    write_results(args, columns, rows, positions_csv(curves), lambda: plot_positions(curves, trained))
    return 0


def _variants(args: argparse.Namespace, model: Model) -> list[Variant]:
    """What --scalings and --lora name."""
    from ropewalk.model.variants import adapter_variant, scaling_variant

    factor = args.factor or max(1.0, max(args.lengths) / model.rope.original_length)
    variants = []
    for given in args.scalings:
        name, colon, own = given.partition(":")
        if colon and name in (AS_LOADED, "none"):
            raise RequestError(f"--scalings {given}: {name} takes no factor")
        by = _factor(given, own) if colon else factor
        variants.append(replace(scaling_variant(model, name, by, args.rope_theta), name=given.replace(":", " ")))
    return variants + [adapter_variant(model, name, _adapter_folder(args, name)) for name in args.lora]


def _factor(given: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(f"--scalings {given}: what follows the colon must be a factor such as 4") from error


def _adapter_folder(args: argparse.Namespace, given: str) -> Path:
    """A folder, or the name of an adapter that comes with the model."""
    folder = find_adapter(model_folder(args), given)
    if folder is None:
        raise RequestError(f"--lora {given}: neither a folder nor an adapter that comes with {model_folder(args)}")
    return folder
