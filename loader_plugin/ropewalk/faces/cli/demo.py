"""`ropewalk demo`: the page in the browser, on a model folder or on the embedded model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ropewalk.base.choices import MAX_RUNNING
from ropewalk.base.errors import RequestError
from ropewalk.base.home import home_expanded
from ropewalk.faces.cli.cache import add_kept_arguments, kept_folder
from ropewalk.faces.cli.options import MODEL_HELP, model_argument
from ropewalk.faces.cli.terminal import note

DATA = Path("~/.ropewalk")
INSTALL = 'the page needs Gradio, which is not installed: pip install "ropewalk[demo]"'


def add_demo_command(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("demo", help="the demo page in the browser", description=run_demo.__doc__)
    parser.add_argument(
        "model", nargs="?", type=model_argument, metavar="MODEL", help=f"{MODEL_HELP} (default: the embedded one)"
    )
    parser.add_argument("--models", type=Path, metavar="DIR", help="folders below DIR may be opened from the page")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, metavar="N", help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--auth", action="append", default=[], metavar="USER:PASSWORD", help="require this login; may be repeated"
    )
    parser.add_argument(
        "--owner",
        action="append",
        default=[],
        metavar="USER",
        help="a user of --auth who may load models and apply layer orders; may be repeated (default: the first)",
    )
    parser.add_argument(
        "--anyone-may-load",
        action="store_true",
        help="every visitor may do that (default without --auth: only the browser that opened the page first)",
    )
    parser.add_argument(
        "--root-path", metavar="PATH", help="path under which a proxy shows the page, such as /ropewalk"
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="DIR", help=f"where conversations are kept (default: {DATA})"
    )
    add_kept_arguments(parser, f"{DATA}/caches, or caches under --data")
    parser.add_argument(
        "--max-running",
        type=int,
        default=MAX_RUNNING,
        metavar="N",
        help="replies written at once (default: %(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    """Serve the demo page until Ctrl-C."""
    try:
        from ropewalk.gradio_demo.model_bar.owner import Owner
        from ropewalk.gradio_demo.serving import Address, serve_demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "gradio":
            raise
        raise RequestError(INSTALL) from error
    for name, folder in (("MODEL", args.model), ("--models", args.models)):
        if folder is not None and not folder.is_dir():
            raise RequestError(f"{name}: {folder} is not a folder")
    if args.max_running < 1:
        raise RequestError(f"--max-running must be at least 1, got {args.max_running}")
    auth = tuple(_user_and_password(text) for text in args.auth)
    address = Address(args.host, args.port, args.root_path, auth, args.open)
    owner = Owner(args.anyone_may_load, _owners(args.owner, [user for user, _ in auth], args.anyone_may_load))
    data = home_expanded(args.data)
    args.cache_folder = args.cache_folder or data / "caches"
    serve_demo(address, args.model, args.models, data, args.max_running, owner, note, kept_folder(args))
    return 0


def _owners(named: list[str], users: list[str], anyone: bool) -> list[str]:
    if named and anyone:
        raise RequestError("--owner and --anyone-may-load cannot be used together: give one of them")
    for name in named:
        if name not in users:
            raise RequestError(f"--owner {name}: give --auth {name}:PASSWORD too, so that users can be told apart")
    return named or users[:1]


def _user_and_password(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not user or not colon or not password:
        raise RequestError("--auth takes USER:PASSWORD, neither of them empty")
    return user, password
