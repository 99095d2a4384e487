"""Attaching hooks when the web UI imports a module, before anything else can use it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.tracebacks import drop_our_frames

PACKAGES = ("modules.", "extensions.")
# stable-diffusion-webui has a package `modules` too, without this file.
SIGN_OF_WEBUI = "text_generation.py"


class WebuiFinder(MetaPathFinder):
    """Finds what the other finders find, and passes on each module that has hooks once it has been executed.

    hooks_of: the hooks for a module by its name; called for modules of the web UI only. attach_to: called with each
    executed module that has hooks.
    """

    def __init__(self, hooks_of: Callable[[str], list[Hook]], attach_to: Callable[[ModuleType], None]) -> None:
        self._hooks_of = hooks_of
        self._attach_to = attach_to

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of the web UI that has hooks; None for everything else."""
        if not fullname.startswith(PACKAGES) or path is None or not is_webui(fullname, path):
            return None
        hooks = self._hooks_of(fullname)
        if not hooks:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                self._attach_after_execution(spec, hooks)
                return spec
        return None

    def _attach_after_execution(self, spec: ModuleSpec, hooks: list[Hook]) -> None:
        loader = spec.loader
        if loader is None:
            return
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                with ExitStack() as stack:
                    for hook in hooks:
                        if hook.around is not None:
                            stack.enter_context(hook.around())
                    execute(module)
            except BaseException as error:
                drop_our_frames(error)
                raise
            self._attach_to(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]  # this loader serves this module only


def is_webui(fullname: str, path: Sequence[str]) -> bool:
    """True if a module of that name and package path belongs to text-generation-webui."""
    depth = fullname.count(".") - 1
    folders = [Path(entry).parents[depth] if depth else Path(entry).parent for entry in path]
    return any((folder / "modules" / SIGN_OF_WEBUI).is_file() for folder in folders)
