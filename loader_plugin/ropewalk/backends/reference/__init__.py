"""The backend in plain torch: the executable specification of backends/protocol.py."""

from __future__ import annotations

from ropewalk.backends.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
