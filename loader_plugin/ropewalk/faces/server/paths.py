"""Messages name files, which helps whoever runs the server but does not concern its clients: they get the last part."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# In quotes a path may contain spaces; otherwise it ends at the first space, unless it begins with a known folder.
QUOTED = re.compile(r"""(['"])((?:/|[A-Za-z]:[\\/])[^'"]*[\\/][^'"]*|/[^'"/]+)\1""")
BARE = re.compile(r"""(?<![\w.<~/\\-])(?:[A-Za-z]:)?[\\/](?:[^\s\\/'":;,()<>]+[\\/])+[^\s\\/'":;,()<>]*""")
REST = r"""(?:[\\/][^\s'":;,()<>]*)?(?![\w-])"""


class PathHider:
    """Reduces every path to its last part. folders: known ones, whose names may contain spaces or be relative."""

    def __init__(self, folders: Iterable[Path]) -> None:
        spelled = {str(form) for folder in folders for form in (folder, folder.absolute(), folder.resolve())}
        known = sorted(spelled - {".", "/", ""}, key=len, reverse=True)
        self._known = re.compile(f"(?:{'|'.join(map(re.escape, known))}){REST}") if known else None

    def hide(self, message: str) -> str:
        """The message without folders of this machine."""
        if self._known is not None:
            message = self._known.sub(lambda found: _last_part(found[0]), message)
        message = QUOTED.sub(lambda found: f"{found[1]}{_last_part(found[2])}{found[1]}", message)
        return BARE.sub(lambda found: _last_part(found[0]), message)


def _last_part(path: str) -> str:
    dots = path[len(path.rstrip(".")) :]  # the end of a sentence
    return re.split(r"[\\/]", path.rstrip("./\\"))[-1] + dots
