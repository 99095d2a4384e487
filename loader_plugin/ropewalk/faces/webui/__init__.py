"""ropewalk as a model loader of text-generation-webui. No file of the web UI is edited: its functions are wrapped while
it runs, and only this package knows them.

    extension, launcher or .pth -> register() -> import hook -> hooks/*, each attached to one module of the web UI

Importing this package imports nothing else of ropewalk: it happens at the start of every `server.py` when
`ropewalk webui enable` was used.
"""

from __future__ import annotations

from ropewalk.faces.webui.registration import register

__all__ = ["register"]
