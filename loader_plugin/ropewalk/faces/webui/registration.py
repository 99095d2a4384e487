"""`register()`: from now on the web UI has our loader. It may be called at any time, any number of times."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.import_hook import WebuiFinder, is_webui
from ropewalk.faces.webui.patching import HookError

logger = logging.getLogger(__name__)


def register() -> None:
    """Attach the hooks: to what the web UI has imported already, and to the rest when it is imported."""
    if not any(isinstance(finder, WebuiFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, WebuiFinder(hooks_of, attach_to))
    modules = sys.modules.get("modules")
    if modules is None or not is_webui("modules.shared", list(modules.__path__)):
        return
    for name in dict.fromkeys(hook.module for hook in _all_hooks()):
        if name in sys.modules:
            attach_to(sys.modules[name])


def hooks_of(module_name: str) -> list[Hook]:
    """The hooks for one module of the web UI."""
    return [hook for hook in _all_hooks() if hook.module == module_name]


def attach_to(module: ModuleType) -> None:
    """Attach the hooks of a module. A failure is logged; the other hooks and the web UI carry on."""
    for hook in hooks_of(module.__name__):
        try:
            hook.attach(module)
        except HookError as error:
            logger.warning("ropewalk: %s is not available in this version of the web UI: %s", hook.concern, error)
        except Exception:  # a host program must survive any mistake of ours
            logger.exception("ropewalk: the hook for %s failed in %s", hook.concern, module.__name__)


def _all_hooks() -> tuple[Hook, ...]:
    from ropewalk.faces.webui.hooks import (
        HOOKS,  # only now: with the startup file, other programs import this module too
    )

    return HOOKS
