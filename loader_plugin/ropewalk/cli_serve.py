"""`ropewalk serve`: its options. What they start is in `server/launch.py`, which needs the extra `server`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ropewalk.cli_options import add_load_arguments, add_model_arguments, add_sampling_arguments
from ropewalk.errors import UnsupportedError

QUEUE_LIMIT = 64


def add_serve_command(commands: Any) -> None:
    """Register the subcommand."""
    serve = commands.add_parser("serve", help="an OpenAI-compatible server", description=run_serve.__doc__)
    add_model_arguments(serve)
    group = serve.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    group.add_argument("--port", type=int, default=8080, metavar="N", help="port (0: any free one; default: 8080)")
    group.add_argument("--name", metavar="NAME", help="what clients call the model (default: its folder's name)")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help="accept only requests with it")
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="the same, a key per line: other users see command lines"
    )
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help='a web page that may use it ("*": any)'
    )
    group.add_argument(
        "--caches",
        type=int,
        metavar="N",
        help="conversations kept computed, and replies written at a time (default: a few, in half of the free memory)",
    )
    group.add_argument(
        "--queue-limit", type=int, default=QUEUE_LIMIT, metavar="N", help=f"requests that may wait ({QUEUE_LIMIT})"
    )
    group.add_argument(
        "--chat-template", metavar="NAME", help="vicuna, llama-2, alpaca or airoboros (default: model's)"
    )
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="load this LoRA (a PEFT folder) for requests that name it: NAME+FOLDER:WEIGHT; may be repeated",
    )
    add_sampling_arguments(serve)
    add_load_arguments(serve)
    serve.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Serve a model to other programs, through the interface that they know from OpenAI. The sampling options are for
    what a request leaves out."""
    try:
        from ropewalk.server.launch import serve
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"serving needs the package {error.name}: pip install 'ropewalk[server]'") from error
    return serve(args)
