"""Every way to run a model on this machine: the reference, and the compiled core with each instruction set it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ropewalk.base.errors import NativeError
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model


@dataclass(frozen=True)
class Variant:
    """Arguments of `load_model` that choose the arithmetic."""

    backend: str
    compute: str
    isa: str | None = None

    def __str__(self) -> str:
        return "-".join(part for part in (self.backend, self.isa, self.compute) if part)

    def load(self, folder: Path, **options) -> Model:
        """Load with one thread (tests share few cores) unless `options`, the other arguments, say otherwise."""
        threads = 1 if self.backend == "cpu" else None
        chosen = {"backend": self.backend, "compute": self.compute, "isa": self.isa, "threads": threads}
        return load_model(folder, **(chosen | options))


def variants(compute: str | None = None, backend: str | None = None) -> list[Variant]:
    """All variants there are, or those of one compute mode or backend."""
    found = [Variant("reference", mode) for mode in ("exact", "int8")]
    found += [Variant("cpu", mode, isa) for isa in _isas() for mode in ("exact", "int8")]
    return [v for v in found if compute in (None, v.compute) and backend in (None, v.backend)]


def _isas() -> tuple[str, ...]:
    try:
        from ropewalk.native import available_isas
    except NativeError:  # not installed: run from the source tree, the reference alone
        return ()
    return tuple(available_isas())
