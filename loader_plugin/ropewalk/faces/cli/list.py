"""`ropewalk list` and `ropewalk info`: which models are here, and what one of them is."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.base.errors import RequestError, RopewalkError
from ropewalk.base.memory import format_bytes
from ropewalk.faces.cli.options import add_model_arguments, load_options, model_folder
from ropewalk.faces.cli.terminal import note

if TYPE_CHECKING:
    from ropewalk.model.listing import ListedModel

HEADINGS = ("MODEL", "FAMILY", "WEIGHTS", "SIZE", "CONTEXT", "LOADS")


def add_list_commands(commands: argparse._SubParsersAction) -> None:
    """Register both."""
    info = commands.add_parser("info", help="what a model is, and what would be loaded", description=run_info.__doc__)
    add_model_arguments(info)
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=run_info, by_name=True)
    listing = commands.add_parser("list", help="the models that are here", description=run_list.__doc__)
    listing.add_argument(
        "folders", nargs="*", type=Path, metavar="DIR", help="folders of models (default: the cache of the hub)"
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=run_list)


def run_info(args: argparse.Namespace) -> int:
    """Show what would be loaded; of a folder that cannot be loaded, what it is and what would run it. Of a model on the
    hub, only the small files and the headers of the weights are downloaded."""
    from ropewalk.model.identify import identify
    from ropewalk.model.info import model_info

    folder = model_folder(args)
    try:
        info = model_info(folder, options=load_options(args))
    except RopewalkError as error:
        known = identify(folder, error) if isinstance(folder, Path) and not _loads_as_it_is(folder) else None
        if known is not None:
            about = {"folder": str(folder), "what": known.what, "runs_with": known.runs_with}
            facts = {**about, "loads": False, "reason": str(error)}
            lines = f"folder     {folder}\nwhat       {known.what}\nruns with  {known.runs_with}"
            print(json.dumps(facts, indent=2) if args.json else lines, flush=True)
        raise
    print(json.dumps(info.to_json(), indent=2) if args.json else info.describe(), flush=True)
    return 0


def _loads_as_it_is(folder: Path) -> bool:
    """Whether a folder would be loaded without any option: then what is wrong is an option, and not the folder."""
    from ropewalk.model.info import model_info

    try:
        model_info(folder)
    except RopewalkError:
        return False
    return True


def run_list(args: argparse.Namespace) -> int:
    """List the models in folders, or in the cache of the hub: family, bits, groups, size, context, and whether each
    would load."""
    from ropewalk.model.listing import list_cache, list_folder

    logging.getLogger("ropewalk").setLevel(logging.ERROR)  # what is odd about a model is for `info` to say
    if args.folders:
        for folder in args.folders:
            if not folder.is_dir():
                raise RequestError(f"{folder} is not a folder: name one that holds models")
        found = [model for folder in args.folders for model in list_folder(folder)]
        places = ", ".join(map(str, args.folders))
    else:
        from huggingface_hub import constants

        places = constants.HF_HUB_CACHE
        found = list(list_cache(Path(places)))
    if args.json:
        print(json.dumps([model.to_json() for model in found], indent=2), flush=True)
    elif found:
        print(_table(found), flush=True)
    else:
        note(f"there are no models in {places}")
    return 0


def _table(found: list[ListedModel]) -> str:
    rows = [HEADINGS, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ((cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _row(model: ListedModel) -> tuple[str, ...]:
    context = "" if model.context is None else f"{model.context:,}"
    loads = "yes" if model.loads else "no"
    return (model.name, model.family or "", model.weights, format_bytes(model.size_bytes), context, loads)
