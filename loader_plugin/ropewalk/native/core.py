"""The compiled core, or an error that says what to do where it is missing."""

from __future__ import annotations

from ropewalk.base.errors import NativeError

try:
    from ropewalk import _core
except ImportError as error:
    raise NativeError(
        f"the compiled core of ropewalk cannot be imported ({error}); install the package with a C++ compiler "
        "present: pip install . (or use backend='reference')"
    ) from error

__all__ = ["_core"]
