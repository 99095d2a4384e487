"""The command line of `ropewalk serve` for those who have none: replicas, and `serve run ropewalk.cluster:app`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.cluster_options import add_cluster_arguments
from ropewalk.faces.cli.options import fetch_named, flag
from ropewalk.faces.cli.serve import add_serve_command

MODEL = "model"
# What the server in front does alone; all else, such as the limit of a body, is checked by replicas too.
OF_THE_FRONT = ("--host", "--port", "--api-key", "--api-key-file", "--cors-origin", "--allowed-host")


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"ropewalk.cluster: {message}")


def parsed(command_line: Sequence[str]) -> argparse.Namespace:
    """What `ropewalk serve` makes of these arguments, on this machine; models that are given by name are downloaded.

    Raises:
        RequestError: an unknown option, or a value that it does not take.
    """
    commands = _Parser(prog="ropewalk").add_subparsers(parser_class=_Parser)
    parser = add_serve_command(commands)
    add_cluster_arguments(parser)
    args = parser.parse_args(list(command_line))
    fetch_named(args)
    return args


def of_replica(command_line: Sequence[str]) -> list[str]:
    """The options that replicas need: keys are none of them, which Ray would keep with all it knows of a deployment."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_cluster_arguments(parser)
    for name in OF_THE_FRONT:
        parser.add_argument(name, action="append")
    return parser.parse_known_args(list(command_line))[1]


def command_line_of(arguments: Mapping[str, Any]) -> list[str]:
    """The same as arguments of an application of Ray Serve: {"model": FOLDER, "max_seq_len": "2048", ...}.

    The names are those of the options, with _ or -. true stands for an option without a value; a list, in a
    configuration file, for one that is given several times; false and null for one that is left out.

    Raises:
        RequestError: a name that is no option's, as it begins with a dash, or a value that is an object.
    """
    line: list[str] = []
    for name, value in arguments.items():
        if name.startswith("-"):
            raise RequestError(f"{name}: arguments of an application have no dashes in front: write {name.lstrip('-')}")
        for each in value if isinstance(value, list) else [value]:
            line += _one(name, each)
    return line


def _one(name: str, value: Any) -> list[str]:
    if value is None or value is False or value == "false":
        return []
    if isinstance(value, (dict, list)):
        raise RequestError(f"{name}: a text, a number, true or false is needed, got {value!r}")
    if name == MODEL:
        return [str(value)]
    if value is True or value == "true":
        return [flag(name)]
    return [f"{flag(name)}={value}"]
