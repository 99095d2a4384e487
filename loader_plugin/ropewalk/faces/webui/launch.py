"""Starting the web UI with our loader registered before its first line runs."""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ropewalk.base.errors import ConfigError
from ropewalk.faces.webui.registration import register
from ropewalk.faces.webui.tracebacks import drop_our_frames


def run(webui: Path, flags: Sequence[str]) -> None:
    """Run `server.py` of this folder in this process, as `python server.py FLAGS` there would, until it ends.

    Raises:
        ConfigError: the folder is not one of text-generation-webui.
    """
    webui = webui.resolve()
    if not (webui / "server.py").is_file() or not (webui / "modules" / "text_generation.py").is_file():
        raise ConfigError(f"{webui} is not a folder of text-generation-webui: it has no server.py and modules/")
    register()
    logging.getLogger().handlers.clear()  # those of our command line: the web UI brings its own
    logging.addLevelName(logging.WARNING, "WARNING")
    os.chdir(webui)
    sys.argv = ["server.py", *flags]
    sys.path.insert(0, str(webui))
    try:
        runpy.run_path("server.py", run_name="__main__")
    except Exception as error:  # shown as a plain start would show it, not as an error of our command line
        drop_our_frames(error)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
