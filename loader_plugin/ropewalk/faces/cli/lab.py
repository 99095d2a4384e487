"""`ropewalk compare` and `ropewalk retrieval`: what RoPE scalings do to a model, as tables and plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.adapters.config import find_adapter
from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.options import (
    add_adapter_arguments,
    add_load_arguments,
    add_model_arguments,
    load,
    load_adapters,
    model_folder,
    note,
    progress_bar,
    read_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELD_OUT = "held_out.txt"  # the text that comes with the embedded model


def add_lab_commands(commands: argparse._SubParsersAction) -> None:
    """Register both commands."""
    compare = commands.add_parser("compare", help="perplexity under several scalings", description=run_compare.__doc__)
    _add_common(compare, "512,1024,2048")
    compare.add_argument(
        "--scalings",
        type=_names,
        default="none,linear,ntk,dynamic,yarn",
        metavar="NAME,NAME,...",
        help="as loaded, none, linear, ntk, dynamic, ntk-by-parts, yarn",
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
    compare.add_argument(
        "--max-tokens",
        type=int,
        default=32768,
        metavar="N",
        help="use at most N tokens of the text (default: %(default)s)",
    )
    compare.set_defaults(run=run_compare, adapter=[])  # the model itself is loaded without adapters

    retrieval = commands.add_parser(
        "retrieval", help="pass keys by depth and length", description=run_retrieval.__doc__
    )
    _add_common(retrieval, "256,512,1024,2048")
    retrieval.add_argument("--depths", type=_depths, default="0,0.25,0.5,0.75,1", metavar="X,X,...", help="0 to 1")
    retrieval.add_argument("--trials", type=int, default=4, metavar="N", help="keys per cell (default: %(default)s)")
    retrieval.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the keys (default: %(default)s)")
    add_adapter_arguments(retrieval, routes=False)
    retrieval.set_defaults(run=run_retrieval)


def run_compare(args: argparse.Namespace) -> int:
    """Perplexity of a text by context length under several RoPE scalings, as CSV; with --plot also as a picture."""
    from ropewalk.measure.compare import compare_perplexity, curves_csv
    from ropewalk.measure.plots import plot_curves
    from ropewalk.model.variants import adapter_variant, scaling_variant

    model, tokenizer, token_ids = _model_and_text(args)
    factor = args.factor or max(1.0, max(args.lengths) / model.rope.original_length)
    variants = [scaling_variant(model, name, factor) for name in args.scalings]
    variants += [adapter_variant(model, name, _adapter_folder(args, name)) for name in args.lora]
    with progress_bar("perplexity", "token") as progress:
        curves = compare_perplexity(model, token_ids, args.lengths, variants, args.max_tokens, progress)
    _write(args, curves_csv(curves), lambda: plot_curves(curves))
    return 0


def run_retrieval(args: argparse.Namespace) -> int:
    """Hide pass keys in a text and ask for them, as CSV by length and depth; with --plot also as a picture."""
    from ropewalk.measure.plots import plot_retrieval
    from ropewalk.measure.retrieval import cells_csv, make_probes, retrieval_map

    model, tokenizer, token_ids = _model_and_text(args)
    adapters = load_adapters(args, model)
    probes = make_probes(tokenizer, args.trials, args.seed)
    with progress_bar("retrieval", "cell") as progress:
        cells = retrieval_map(model, token_ids, probes, args.lengths, args.depths, progress, adapters=adapters)
    _write(args, cells_csv(cells), lambda: plot_retrieval(cells, model.rope.method.name))
    return 0


def _add_common(parser: argparse.ArgumentParser, lengths: str) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--text", metavar="FILE", help=f"UTF-8 text (-: standard input; default: {HELD_OUT} of the model)"
    )
    parser.add_argument("--lengths", type=_lengths, default=lengths, metavar="N,N,...", help="context lengths")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there (default: standard output)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there: .svg, .png or .pdf")
    add_load_arguments(parser)


def _model_and_text(args: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    path = args.text or str(model_folder(args) / HELD_OUT)
    if args.text is None and not Path(path).is_file():
        raise RequestError(f"{model_folder(args)} brings no {HELD_OUT}: name a text with --text FILE")
    text = read_text(path)
    if args.max_seq_len is None:
        args.max_seq_len = max(args.lengths)
    model, tokenizer = load(args)
    return model, tokenizer, tokenizer.encode(text, add_bos=False)


def _adapter_folder(args: argparse.Namespace, given: str) -> Path:
    """A folder, or the name of an adapter that comes with the model."""
    folder = find_adapter(model_folder(args), given)
    if folder is None:
        raise RequestError(f"--lora {given}: neither a folder nor an adapter that comes with {model_folder(args)}")
    return folder


def _write(args: argparse.Namespace, table: str, plot: Callable[[], Figure]) -> None:
    if args.csv is None:
        print(table, end="", flush=True)
    else:
        try:
            args.csv.write_text(table, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{args.csv} cannot be written: {error.strerror or error}") from error
    if args.plot is not None:
        from ropewalk.measure.plots import save_plot

        save_plot(plot(), args.plot)
        note(f"wrote {args.plot}")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _lengths(text: str) -> list[int]:
    return _numbers(text, int)


def _depths(text: str) -> list[float]:
    return _numbers(text, float)


def _numbers(text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers separated by commas are needed, got {text!r}") from error
