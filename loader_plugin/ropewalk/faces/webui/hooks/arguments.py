"""Command-line flags for our settings, and `--loader ropewalk`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.parameters import LOADER, PARAMETERS, Choice, Parameter, name_here
from ropewalk.faces.webui.patching import wrap

NAMESPACES = ("args", "args_defaults", "original_args")


@contextmanager
def flags_added() -> Iterator[None]:
    """Within this context, a parser that knows --loader gets our flags as well before it parses."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_with_ours(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        if "--loader" in self._option_string_actions:
            add_flags(self)
        return parse_args(self, *args, **options)

    argparse.ArgumentParser.parse_args = parse_with_ours  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that the parser lacks, once. Those that it has accept our spellings too, and fractions if ours
    do."""
    known = {action.dest: action for action in parser._actions}
    missing = []
    for item in PARAMETERS:
        action = known.get(name_here(item, known))
        if action is None:
            missing.append(item)
            continue
        if action.type is int and isinstance(item.default, float):
            action.type = float
        for spelling in spellings(item):
            if spelling not in parser._option_string_actions:
                parser._option_string_actions[spelling] = action
    if missing:
        group = parser.add_argument_group(LOADER, "GPTQ models at long context")
        for item in missing:
            _add_flag(group, item)


def _add_flag(group: Any, item: Parameter) -> None:
    closed = isinstance(item.widget, Choice) and not item.widget.is_open
    choices = item.widget.choices if closed else None
    help_text = item.info.replace("%", "%%")
    group.add_argument(*spellings(item), type=type(item.default), default=item.default, choices=choices, help=help_text)


def spellings(item: Parameter) -> tuple[str, ...]:
    """The flags that set it, under its own name and under those that older versions use."""
    names = (item.name, *item.former_names)
    return tuple(dict.fromkeys(f"--{spelled}" for name in names for spelled in (name.replace("_", "-"), name)))


def note_given(shared: ModuleType) -> None:
    """Count flags in our spellings as given; otherwise the defaults of a model would replace their values."""
    provided = getattr(shared, "provided_arguments", [])
    used = {argument.partition("=")[0] for argument in sys.argv[1:]}
    for item in PARAMETERS:
        name = name_here(item, vars(shared.args))
        if name not in provided and used & set(spellings(item)):
            provided.append(name)


def complete_arguments(shared: ModuleType) -> None:
    """Give the parsed arguments our defaults if the parser ran before us, and make the name of our loader valid."""
    for namespace in (getattr(shared, name, None) for name in NAMESPACES):
        if namespace is not None:
            known = vars(namespace)
            for item in PARAMETERS:
                known.setdefault(name_here(item, known), item.default)
    note_given(shared)
    wrap(shared, "fix_loader_name", lambda original: lambda name: LOADER if is_our_name(name) else original(name))
    if is_our_name(loader_flag(shared)):
        for namespace in (shared.args, getattr(shared, "original_args", None)):
            if namespace is not None:
                namespace.loader = LOADER


def is_our_name(name: Any) -> bool:
    """True for any spelling of our loader's name."""
    return isinstance(name, str) and name.lower().replace("-", "").replace("_", "") == LOADER


def loader_flag(shared: ModuleType) -> str | None:
    """What was given as --loader; the web UI keeps it only from v3.15 on."""
    kept = getattr(getattr(shared, "original_args", None), "loader", None)
    if kept is not None:
        return kept
    for position, argument in enumerate(sys.argv[1:], 1):
        if argument.startswith("--loader="):
            return argument.partition("=")[2]
        if argument == "--loader" and position + 1 < len(sys.argv):
            return sys.argv[position + 1]
    return None


HOOKS = (
    Hook(
        "--loader ropewalk and our flags",
        "modules.shared",
        ("args", "fix_loader_name"),
        complete_arguments,
        flags_added,
    ),
)
