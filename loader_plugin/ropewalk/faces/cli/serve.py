"""`ropewalk serve`: its options. The server itself is in `faces/server/launch.py` and needs the extra `server`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.choices import MAX_RUNNING
from ropewalk.base.errors import RequestError, UnsupportedError
from ropewalk.faces.cli.adapter_options import load_adapters
from ropewalk.faces.cli.cache import add_kept_arguments, kept_folder
from ropewalk.faces.cli.loading import load
from ropewalk.faces.cli.options import (
    add_load_arguments,
    add_model_arguments,
    add_shift_argument,
    add_speculation_arguments,
    add_template_argument,
    model_folder,
    shift_option,
    speculation_options,
)
from ropewalk.faces.cli.sampling_options import add_sampling_arguments, sampling_params
from ropewalk.faces.cli.terminal import note
from ropewalk.files.names import shown_name

if TYPE_CHECKING:
    from ropewalk.engine.engine import Engine
    from ropewalk.faces.server.app import AppOptions

PORT = 8080
QUEUE_LIMIT = 64
MOST_BODY_MIB = 1024


def add_serve_command(commands: Any) -> argparse.ArgumentParser:
    """Register the subcommand; returns its parser."""
    from ropewalk.faces.server.limits import MAX_BODY_MIB

    serve = commands.add_parser("serve", help="an OpenAI-compatible server", description=run_serve.__doc__)
    add_model_arguments(serve)
    group = serve.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    group.add_argument("--port", type=int, default=PORT, metavar="N", help=f"port (0: any free one; default: {PORT})")
    group.add_argument("--name", metavar="NAME", help="what clients call the model (default: its folder's name)")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="accept only requests with this key"
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="the same, one key per line; command lines can be seen by others",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help='a website that may use the server ("*": any)',
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help='also answer to this name in the Host header, such as that of a proxy ("*": any); without it, a server on '
        "a loopback address answers to localhost alone, and one on another address to any name",
    )
    group.add_argument(
        "--max-body-size",
        type=float,
        default=MAX_BODY_MIB,
        metavar="MIB",
        help="largest request (default: %(default)s)",
    )
    group.add_argument(
        "--max-running",
        type=int,
        default=MAX_RUNNING,
        metavar="N",
        help="replies that are written at once, and share the memory of the cache (default: %(default)s)",
    )
    group.add_argument(
        "--queue-limit",
        type=int,
        default=QUEUE_LIMIT,
        metavar="N",
        help="requests that may wait (default: %(default)s)",
    )
    add_kept_arguments(group)
    add_template_argument(group)
    add_shift_argument(group, "; requests can say otherwise: context_shift")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="load this LoRA (a PEFT folder) for requests that name it: NAME+FOLDER:WEIGHT; may be repeated",
    )
    add_sampling_arguments(serve)
    add_speculation_arguments(serve)
    add_load_arguments(serve)
    serve.set_defaults(run=run_serve)
    return serve


def run_serve(args: argparse.Namespace) -> int:
    """Serve a model to other programs, through an OpenAI-compatible interface. The sampling options apply to what a
    request leaves out."""
    try:
        from ropewalk.faces.server.launch import serve
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"serving needs the package {error.name}: pip install 'ropewalk[server]'") from error
    return serve(args.host, args.port, lambda: make_engine(args), app_options(args), note)


def app_options(args: argparse.Namespace) -> AppOptions:
    """What the application is told, but for what only the loaded model knows."""
    from ropewalk.faces.server.app import AppOptions

    name = args.name or shown_name(model_folder(args))
    keys, defaults = _api_keys(args), sampling_params(args)
    return AppOptions(
        name,
        (),
        defaults,
        keys,
        tuple(args.cors_origin),
        tuple(args.allowed_host) or None,
        _bytes(args.max_body_size),
        _folders(args),
    )


def make_engine(args: argparse.Namespace) -> Engine:
    """The model, loaded, with all that requests need."""
    from ropewalk.engine.engine import Engine
    from ropewalk.generate.sampling import check_stop_tokens

    if args.queue_limit < 0:
        raise RequestError(f"--queue-limit must be at least 0, got {args.queue_limit}")
    guessing, shift = speculation_options(args), shift_option(args)
    are_chosen = bool(args.adapter)  # by clients, one by one; the embedded model's own serves all who choose none
    model, tokenizer = load(args, to_talk=True)
    check_stop_tokens(args.stop_token_id or (), model.config.vocab_size)  # or no request could be served
    used = load_adapters(args, model)
    if any(weight != 1.0 or instances is not None for _, weight, instances in used):
        raise RequestError("--adapter: serve takes folders alone; clients give weights and instances in a model name")
    engine = Engine(
        model,
        tokenizer,
        args.chat_template,
        args.max_running,
        args.queue_limit,
        context_shift=shift,
        kept_folder=kept_folder(args),
        adapters=None if are_chosen else used,
        **guessing,
    )
    _ = engine.chat_template  # a broken or missing template is better reported here than to a client
    return engine


def _bytes(mebibytes: float) -> int:
    if not 0 < mebibytes <= MOST_BODY_MIB:  # NaN fails too
        raise RequestError(f"--max-body-size must be above 0 and at most {MOST_BODY_MIB} (MiB), got {mebibytes:g}")
    return int(mebibytes * 2**20)


def _folders(args: argparse.Namespace) -> tuple[Path, ...]:
    """The folders that errors may name."""
    given = (
        model_folder(args),
        args.second_folder,
        args.draft_model,
        args.cache_folder,
        *(Path(text) for text in args.adapter),
    )
    return tuple(folder for folder in given if folder is not None)


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = list(args.api_key)
    if args.api_key_file is not None:
        try:
            keys += args.api_key_file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--api-key-file {args.api_key_file} cannot be read: {error}") from error
        if not keys:
            raise RequestError(f"--api-key-file {args.api_key_file} holds no key: write one per line")
    if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise RequestError("--api-key: a key must be printable ASCII without spaces, and not empty")
    return tuple(keys)
