"""The opt-in for a plain `python server.py`: a .pth file in site-packages, which Python reads at every start.

For every other program it costs one comparison of its arguments.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from ropewalk.base.errors import ConfigError

FILE_NAME = "ropewalk_webui.pth"
# One line, as site.py runs it; it may run twice, and must say nothing once the package is gone.
LINE = (
    "import sys; any(a.endswith('server.py') for a in sys.orig_argv) "
    "and __import__('importlib.util').util.find_spec('ropewalk') and __import__('ropewalk.webui.autostart')\n"
)


def startup_file(site_packages: Path | None = None) -> Path:
    """Where the file is, or would be; default: site-packages of the Python that runs this."""
    return (site_packages or Path(sysconfig.get_path("purelib"))) / FILE_NAME


def enable(path: Path) -> None:
    """Write the file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(LINE, encoding="utf-8")
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
