"""`ropewalk webui`: install, start and remove the loader in text-generation-webui."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ropewalk.faces.webui.checkout import Checkout


def add_webui_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command and its actions."""
    webui = commands.add_parser("webui", help="the loader in text-generation-webui", description=__doc__)
    actions = webui.add_subparsers(title="actions", required=True, metavar="ACTION")
    install = _add(actions, run_install, "write the extension, and make every start have the loader")
    install.add_argument(
        "--no-startup",
        action="store_true",
        help="write the extension only: --model with --loader ropewalk, and starting with a model saved with this "
        "loader, then need `ropewalk webui run`",
    )
    _add(actions, run_uninstall, "remove both, and their traces")
    _add(actions, run_status, "show what is installed")
    _add(actions, run_demo, "copy the embedded model into its folder of models")
    start = _add(actions, run_run, "start the web UI with the loader", user_data=False)
    start.add_argument("flags", nargs=argparse.REMAINDER, metavar="-- FLAGS", help="flags of server.py, after --")
    for action, text in ((run_enable, "make a plain `python server.py` have the loader"), (run_disable, "undo that")):
        parser = actions.add_parser(_name(action), help=text, description=action.__doc__)
        parser.set_defaults(run=action)


def _add(actions: argparse._SubParsersAction, action, text: str, user_data: bool = True) -> argparse.ArgumentParser:
    parser = actions.add_parser(_name(action), help=text, description=action.__doc__)
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of text-generation-webui, with server.py")
    if user_data:
        for option in ("--user-data-dir", "--model-dir"):
            parser.add_argument(option, type=Path, metavar="FOLDER", help="the same as given to server.py, if any")
    parser.set_defaults(run=action)
    return parser


def _name(action) -> str:
    return action.__name__.removeprefix("run_")


def run_install(args: argparse.Namespace) -> int:
    """Write a short script into the folder of extensions, and the startup file of `ropewalk webui enable`.

    The web UI reads extensions only after --model: without the startup file, the server would exit at
    --loader ropewalk, or at a model saved with this loader. No file of the web UI is changed.
    """
    from ropewalk.faces.webui.extension import install

    checkout = _checkout(args)
    _say(f"wrote {install(checkout)}")
    if args.no_startup:
        _say("no startup file: start with `ropewalk webui run` for --model together with --loader ropewalk")
    elif (other := other_python(checkout)) is not None:
        _say(f"no startup file: the web UI has a Python of its own in {other}, and this is {sys.executable}. Open")
        _say("cmd_linux.sh (cmd_macos.sh, cmd_windows.bat), install ropewalk there, and repeat this command")
    else:
        run_enable(args)
    _say("activate it with --extensions ropewalk, or in the Session tab of the page")
    return 0


def other_python(checkout: Checkout) -> Path | None:
    """The environment that the web UI is started with, if it has one of its own and this Python is not from it."""
    own = checkout.own_python
    return None if own is None or own.resolve() == Path(sys.prefix).resolve() else own


def run_uninstall(args: argparse.Namespace) -> int:
    """Remove the extension, the startup file, and whatever names our loader or its settings in the yaml files: without
    the loader, the web UI would exit at a model that was saved with it."""
    from ropewalk.faces.webui.embedded_model import remove_model
    from ropewalk.faces.webui.extension import uninstall
    from ropewalk.faces.webui.startup_file import disable, startup_file

    checkout = _checkout(args)
    done = uninstall(checkout)
    if disable(startup_file()):
        done.append(f"removed {startup_file()}")
    if (removed := remove_model(checkout)) is not None:
        done.append(removed)
    for line in done or ["nothing was found"]:
        _say(line)
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Show what is installed: the extension, the startup file, files that name the loader, hooks without a target."""
    from ropewalk.faces.webui.extension import mentions
    from ropewalk.faces.webui.startup_file import is_enabled, startup_file

    checkout = _checkout(args)
    _say(f"web UI        {checkout.folder}")
    _say(f"user data     {checkout.user_data}")
    installed = (checkout.extension / "script.py").is_file()
    _say(f"extension     {'installed' if installed else 'not installed'}: {checkout.extension}")
    path = startup_file()
    of_another = path.is_file() and not is_enabled(path)
    state = "of another environment or version" if of_another else "enabled" if path.is_file() else "not enabled"
    _say(f"startup file  {state}: {path}")
    _say(f"this Python   {sys.executable}")
    if (other := other_python(checkout)) is not None:
        _say(f"other Python  the web UI is started with that in {other}")
    for place in mentions(checkout):
        _say(f"named in      {place}")
    missing = missing_names(checkout)
    for line in missing:
        _say(f"missing       {line}")
    if not missing:
        _say("hooks         all find what they attach to")
    return 0


def run_demo(args: argparse.Namespace) -> int:
    """Copy the embedded model into the folder of models. It is small and answers questions about a text."""
    from ropewalk.faces.webui.embedded_model import copy_model
    from ropewalk.files.embedded import EMBEDDED_CONTEXT

    _say(f"wrote {copy_model(_checkout(args))}")
    times = f"{EMBEDDED_CONTEXT.factor:g}"
    _say(
        f"its config.json asks for {EMBEDDED_CONTEXT.method} scaling by {times} and the LoRA "
        f"{EMBEDDED_CONTEXT.adapter}: {times} times the context that it was trained on"
    )
    return 0


def missing_names(checkout: Checkout) -> list[str]:
    """The targets of hooks that this version lacks, one line per concern; a concern is fine if any of its hooks is."""
    from ropewalk.faces.webui.hooks import HOOKS

    complaints: dict[str, list[str]] = {}
    satisfied = set()
    for hook in HOOKS:
        defined = checkout.defined_names(hook.module)
        missing = [f"no module {hook.module}"] if defined is None else [n for n in hook.names if n not in defined]
        if missing:
            complaints.setdefault(hook.concern, []).append(f"{hook.module}: {', '.join(missing)}")
        else:
            satisfied.add(hook.concern)
    return [f"{concern}: {'; '.join(lines)}" for concern, lines in complaints.items() if concern not in satisfied]


def run_run(args: argparse.Namespace) -> int:
    """Start server.py with the loader registered, so that `--model X --loader ropewalk` and its own flags work."""
    from ropewalk.faces.webui.launch import run

    flags = args.flags[1:] if args.flags[:1] == ["--"] else args.flags
    run(args.dir, flags)
    return 0


def run_enable(args: argparse.Namespace) -> int:
    """Write a .pth file into site-packages of this Python: any `python server.py` of the web UI then has the loader."""
    from ropewalk.faces.webui.startup_file import enable, startup_file

    enable(startup_file())
    _say(f"wrote {startup_file()}")
    return 0


def run_disable(args: argparse.Namespace) -> int:
    """Remove the file that `ropewalk webui enable` wrote."""
    from ropewalk.faces.webui.startup_file import disable, startup_file

    _say(f"removed {startup_file()}" if disable(startup_file()) else "it was not enabled")
    return 0


def _checkout(args: argparse.Namespace) -> Checkout:
    from ropewalk.faces.webui.checkout import find_checkout

    return find_checkout(args.dir, args.user_data_dir, args.model_dir)


def _say(text: str) -> None:
    print(text, flush=True)
