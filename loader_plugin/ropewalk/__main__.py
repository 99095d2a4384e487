"""The command `ropewalk`, which is also `python -m ropewalk`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from ropewalk.faces.cli.main import main as run
    except KeyboardInterrupt:  # while modules are imported, which takes a moment
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
