"""The opt-in for a plain `python server.py`: a .pth file in site-packages, which Python reads at every start.

For every other program it costs one comparison of its arguments.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from ropewalk.base.errors import ConfigError

FILE_NAME = "ropewalk_webui.pth"


def line(environment: Path) -> str:
    """The content of the file for an environment: one line, which site.py runs. It may run twice, must stay silent once
    the package is gone, and does nothing in another environment that sees the same site-packages."""
    return (
        f"import os, sys; os.path.realpath(sys.prefix) == {os.path.realpath(environment)!r} "
        "and any(a.endswith('server.py') for a in sys.orig_argv) "
        "and __import__('importlib.util').util.find_spec('ropewalk') and __import__('ropewalk.webui.autostart')\n"
    )


def startup_file(site_packages: Path | None = None) -> Path:
    """Where the file is, or would be; default: site-packages of the Python that runs this."""
    return (site_packages or Path(sysconfig.get_path("purelib"))) / FILE_NAME


def is_enabled(path: Path) -> bool:
    """True if the file is there and is for the environment of this Python."""
    return path.is_file() and path.read_text(encoding="utf-8") == line(Path(sys.prefix))


def enable(path: Path) -> None:
    """Write the file for the environment of this Python.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(line(Path(sys.prefix)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def disable(path: Path) -> bool:
    """Remove the file; False if there was none.

    Raises:
        ConfigError: it cannot be removed.
    """
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"{path} cannot be removed: {error.strerror or error}") from error
    return True
