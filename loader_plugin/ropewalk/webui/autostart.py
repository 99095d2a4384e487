"""Imported by the .pth file of `ropewalk webui enable` at the start of a `server.py`: registers the loader."""

from __future__ import annotations

from ropewalk.faces.webui.registration import register

register()
