"""The messages of ropewalk go where the web UI's own messages go; the web UI silences every other logger."""

from __future__ import annotations

import logging
from types import ModuleType

from ropewalk.faces.webui.hook import Hook


def share_console(logging_colors: ModuleType) -> None:
    """Give the logger of our package the handlers and the level of the web UI's logger."""
    theirs, ours = logging_colors.logger, logging.getLogger("ropewalk")
    ours.handlers = theirs.handlers
    ours.setLevel(theirs.getEffectiveLevel())
    ours.propagate = False


HOOKS = (Hook("messages on the console", "modules.logging_colors", ("logger",), share_console),)
