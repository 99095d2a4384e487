"""Every error that ropewalk raises on purpose.

A message names the file, tensor or option, what was found, what is accepted and, where known, what to do.
"""

from __future__ import annotations


class RopewalkError(Exception):
    """Base class: catch this to catch everything that ropewalk raises on purpose."""


class ConfigError(RopewalkError, ValueError):
    """A key of a JSON file, or an option given as an argument, is missing, of the wrong type or out of range."""


class CheckpointError(RopewalkError, ValueError):
    """The files of a model folder are missing, damaged, or disagree with its configuration."""


class UnsupportedError(RopewalkError, ValueError):
    """Something was recognised by name and is not implemented (an architecture, a weight format, a RoPE type)."""


class ShapeError(RopewalkError, ValueError):
    """A tensor handed to a public function has the wrong shape, dtype, device or memory layout."""


class RequestError(RopewalkError, ValueError):
    """A generation request cannot be served: empty or too long a prompt, token ids or settings out of range."""


class QueueFullError(RopewalkError, RuntimeError):
    """As many requests as allowed wait already; the same request can succeed later."""


class NativeError(RopewalkError, RuntimeError):
    """The compiled core is missing, or the asked-for instruction set does not exist on this machine."""
