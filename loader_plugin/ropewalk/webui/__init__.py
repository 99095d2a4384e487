"""The loader for text-generation-webui, under the path that is written into people's web UIs; see `faces/webui`."""

from __future__ import annotations

from ropewalk.faces.webui.registration import register

__all__ = ["register"]
