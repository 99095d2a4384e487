"""Every error that ropewalk raises on purpose, under its public path; `base/errors.py` says when each is raised."""

from __future__ import annotations

from ropewalk.base.errors import (
    CacheFullError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    NativeError,
    QueueFullError,
    RankError,
    RequestError,
    RopewalkError,
    SavedCacheError,
    ShapeError,
    UnsupportedError,
)

__all__ = [
    "CacheFullError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "NativeError",
    "QueueFullError",
    "RankError",
    "RequestError",
    "RopewalkError",
    "SavedCacheError",
    "ShapeError",
    "UnsupportedError",
]
