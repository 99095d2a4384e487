"""Paths that begin with `~`, as people type them."""

from __future__ import annotations

from pathlib import Path

from ropewalk.base.errors import RequestError


def home_expanded(path: str | Path) -> Path:
    """The path with the folder of a person in place of a `~` or `~NAME` in front.

    Raises:
        RequestError: there is no such person.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RequestError(f"{path}: this machine knows no home folder for {Path(path).parts[0]}") from error
