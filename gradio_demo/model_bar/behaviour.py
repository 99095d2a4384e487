"""What a visitor does in the model bar: load and unload the model that all share, if they may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ropewalk.generate.generate import Progress
from ropewalk.gradio_demo.model_bar.owner import Owner
from ropewalk.gradio_demo.model_bar.workbench import Loaded, Workbench
from ropewalk.gradio_demo.shared.visitors import Visitor


class Loading:
    """The workbench as visitors may use it."""

    def __init__(self, workbench: Workbench, owner: Owner) -> None:
        self._workbench = workbench
        self._owner = owner

    def load(self, visitor: Visitor, name: str, values: Mapping[str, Any], progress: Progress | None = None) -> Loaded:
        """As `Workbench.load`.

        Raises:
            RequestError: this visitor may not load, or someone else is loading. FieldError: a setting is wrong, or
                there is too little memory; names the field.
        """
        self._owner.require(visitor)
        return self._workbench.load(name, values, progress)

    def unload(self, visitor: Visitor) -> None:
        """As `Workbench.unload`.

        Raises:
            RequestError: this visitor may not.
        """
        self._owner.require(visitor)
        self._workbench.unload()

    def rescale(self, visitor: Visitor, values: Mapping[str, Any], mode: str) -> Loaded:
        """As `Workbench.rescale`.

        Raises:
            RequestError: this visitor may not change the model that all share; or as there. FieldError: as there.
        """
        self._owner.require(visitor)
        return self._workbench.rescale(values, mode)

    def note(self, visitor: Visitor) -> str:
        """Why this visitor may not load, or ""."""
        return "" if self._owner.may(visitor) else f"You can look, but not load: {self._owner.explanation}."
