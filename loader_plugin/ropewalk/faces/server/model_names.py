"""Adapters as model names: BASE, BASE+storm, BASE+storm:0.5+poet@3-5, BASE+auto."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ropewalk.adapters.request import AdapterUse, Request, format_request, parse_request
from ropewalk.base.errors import RequestError
from ropewalk.faces.server.errors import ApiError
from ropewalk.generate.routing import AUTO


@dataclass(frozen=True, slots=True)
class ModelNames:
    """base: what the model itself is called. adapters: the names of those that are loaded."""

    base: str
    adapters: Sequence[str] = ()

    @property
    def listed(self) -> list[str]:
        """The names that clients are shown; they can also write weights, instances and sums of adapters."""
        names = [f"{self.base}+{format_request([AdapterUse(name)])}" for name in self.adapters]
        return [self.base, *names, *([f"{self.base}+{AUTO}"] if names else [])]

    def adapters_of(self, model: str | None) -> Request | None:
        """The adapters of a request for this model; no model means the base.

        Raises:
            ApiError: no such model or adapter, or an invalid notation.
        """
        if model is None or model == self.base:
            return None
        if not model.startswith(self.base + "+"):
            raise self._unknown(model)
        request = model.removeprefix(self.base + "+")
        if request == AUTO and self.adapters:
            return AUTO
        try:
            uses = parse_request(request, "model")
        except RequestError as error:
            raise ApiError(400, str(error), "model", "invalid_model_name") from error
        if any(use.name not in self.adapters for use in uses):
            raise self._unknown(model)
        return uses

    def _unknown(self, model: str) -> ApiError:
        message = f"there is no model {model[:200]!r} here; available are {', '.join(self.listed)}"
        return ApiError(404, message, "model", "model_not_found")
