"""What a request leaves for its line in the log."""

from __future__ import annotations

from dataclasses import dataclass, field

NOTES = "ropewalk_notes"  # the key under which the ASGI scope has them


@dataclass(slots=True)
class Notes:
    """What a route has to say about its request."""

    model: str = ""
    details: list[str] = field(default_factory=list)
    client_gone: bool = False
