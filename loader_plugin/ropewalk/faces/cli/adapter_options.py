"""--adapter and --adapters, and the adapters that they name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.options import model_folder
from ropewalk.faces.cli.terminal import note

if TYPE_CHECKING:
    from ropewalk.model.variants import AdapterUse


def add_adapter_arguments(parser: argparse.ArgumentParser, routes: bool) -> None:
    """Which LoRAs are used. routes: the command has a prompt by which one can be chosen."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER[:WEIGHT][@INSTANCES]",
        help="use this LoRA (a PEFT folder, or the name of one that comes with the model), on these layer instances "
        "only (such as 10-11); may be repeated: all are added up",
    )
    if routes:
        group.add_argument(
            "--adapters",
            choices=("all", "auto"),
            default="all",
            help="auto: the one that fits the prompt best, or none",
        )


def adapter_uses(args: argparse.Namespace) -> tuple[AdapterUse, ...]:
    """The adapters that --adapter names, for those who load them themselves."""
    from ropewalk.model.variants import AdapterUse

    given = [_adapter_option(args, text) for text in args.adapter]
    names = adapter_names(list(dict.fromkeys(folder for folder, _, _ in given)))
    return tuple(
        AdapterUse(names[folder], folder, 1.0 if weight is None else weight, instances)
        for folder, weight, instances in given
    )


def load_adapters(args: argparse.Namespace, model: Any) -> str | list[tuple[str, float, tuple[int, ...] | None]]:
    """Load the adapters that --adapter names; returns the `adapters` for requests. A folder given twice is loaded once.

    Raises:
        RequestError: an invalid weight or invalid instances, or either of them with --adapters auto; a folder twice
            for the same instances. Other errors as for `Model.load_adapter`.
    """
    from ropewalk.adapters.request import checked_request

    auto = getattr(args, "adapters", "all") == "auto"
    if auto and not args.adapter:
        raise RequestError(
            "--adapters auto chooses among adapters, and none are given: name each with --adapter FOLDER"
        )
    given = [_adapter_option(args, text) for text in args.adapter]
    names = adapter_names(list(dict.fromkeys(folder for folder, _, _ in given)))
    for text, (_, weight, instances) in zip(args.adapter, given, strict=True):
        if auto and not weight is instances is None:
            raise RequestError(
                f"--adapter {text}: --adapters auto runs each with weight 1 on all layers: give folders alone"
            )
    chosen = [(names[folder], 1.0 if weight is None else weight, instances) for folder, weight, instances in given]
    checked_request(chosen)
    for folder, name in names.items():
        model.load_adapter(folder, name)
    return "auto" if auto else chosen


def scaling_of_adapters(args: argparse.Namespace) -> Mapping[str, Any] | None:
    """The RoPE scaling that the adapters given were trained for, with a line about it on stderr."""
    from ropewalk.adapters.config import rope_of_adapters

    scaling = rope_of_adapters(_adapter_option(args, text)[0] for text in args.adapter)
    if scaling is not None:
        note(f"RoPE scaling as the adapter asks: --rope-scaling '{json.dumps(scaling)}'")
    return scaling


def adapter_names(folders: list[Path]) -> dict[Path, str]:
    """Each folder's last part, or as many parts as tell it from the others. Clients of the server see these names."""
    parts = {folder: [part for part in folder.parts if part != folder.anchor] for folder in folders}
    names = {}
    for folder in folders:
        others = [parts[other] for other in folders if other != folder]
        count = next((n for n in range(1, len(parts[folder])) if parts[folder][-n:] not in [o[-n:] for o in others]), 0)
        names[folder] = "/".join(parts[folder][-count:])
    return names


def _adapter_option(args: argparse.Namespace, text: str) -> tuple[Path, float | None, tuple[int, ...] | None]:
    """FOLDER[:WEIGHT][@INSTANCES]. A folder's name may contain : and @: the longest folder that exists is taken."""
    from ropewalk.adapters.config import find_adapter
    from ropewalk.adapters.request import parse_suffix

    ends = [*(i for i in range(text.rfind("/") + 1, len(text)) if text[i] in ":@"), len(text)]
    found = ((find_adapter(model_folder(args), text[:end]), end) for end in reversed(ends))
    missing = (Path(text[: ends[0]]), ends[0])
    folder, end = next(((folder, end) for folder, end in found if folder is not None), missing)
    return folder, *parse_suffix(text, end, "--adapter")
