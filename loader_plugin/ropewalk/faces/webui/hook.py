"""What a hook is: one concern, attached to one module of the web UI."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType

from ropewalk.faces.webui.patching import require


@dataclass(frozen=True, slots=True)
class Hook:
    """A concern, the module it attaches to, and the names it needs there.

    change: makes the change; may be called more than once. around: a context that is entered while the module is
    executed, for changes to what the module does at that time.
    """

    concern: str
    module: str
    names: tuple[str, ...]
    change: Callable[[ModuleType], None]
    around: Callable[[], AbstractContextManager[None]] | None = None

    def attach(self, module: ModuleType) -> None:
        """Attach to the module after it has been executed.

        Raises:
            HookError: this version lacks something; the message names it.
        """
        require(module, *self.names)
        self.change(module)
