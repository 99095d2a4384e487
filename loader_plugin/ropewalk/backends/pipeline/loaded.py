"""What a rank has loaded, and what it tells rank 0 of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ropewalk.backends.protocol import CompiledLayer, OnePlace
from ropewalk.base import errors
from ropewalk.base.errors import RankError, RopewalkError


@dataclass(frozen=True, slots=True)
class Report:
    """num_bytes: memory of its layers. samples: of the tensors that were read, in hexadecimal, for the fingerprint;
    those of the second model apart. arithmetic: as `Backend.arithmetic`. error, message: what went wrong; "" if nothing
    did. name: of the rank, for that message."""

    name: str
    num_bytes: int = 0
    samples: Mapping[str, str] = field(default_factory=dict)
    second_samples: Mapping[str, str] = field(default_factory=dict)
    arithmetic: str = ""
    error: str = ""
    message: str = ""

    @classmethod
    def of_error(cls, name: str, error: RopewalkError) -> Report:
        """The rank cannot load its layers."""
        return cls(name, error=type(error).__name__, message=str(error))

    def to_json(self) -> dict[str, Any]:
        """For a message."""
        return asdict(self)

    def check(self) -> None:
        """Raises:
        RopewalkError: that of the rank, of the same class.
        """
        if self.error:
            kind = getattr(errors, self.error, None)
            known = isinstance(kind, type) and issubclass(kind, RopewalkError)
            raise (kind if known else RankError)(f"{self.name}: {self.message}")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedLayers:
    """The layers of a rank, by their index, on its backend."""

    backend: OnePlace
    layers: Mapping[int, CompiledLayer]
    report: Report
