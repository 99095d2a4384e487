"""The command /rescale of `ropewalk chat`: another RoPE while the conversation goes on."""

from __future__ import annotations

import json
from typing import Any

from ropewalk.base.choices import AUTO, RESCALE_MODE
from ropewalk.base.errors import RequestError
from ropewalk.rope.spellings import BY_FACTOR

NAMES = ("none", "auto", "as-declared", *BY_FACTOR)
HELP = (
    "/rescale METHOD [FACTOR] [rotate|recompute] changes the RoPE scaling and keeps the conversation; METHOD: "
    f"{', '.join(NAMES)}, or a JSON object"
)


def parse_rescale(text: str) -> dict[str, Any]:
    """ "yarn 4 recompute" -> the arguments of `Engine.rescale`.

    Raises:
        RequestError: something else; the message says what is accepted.
    """
    words = text.split()
    given: dict[str, Any] = {"mode": RESCALE_MODE.default}
    if words and words[-1] in RESCALE_MODE.values:
        given["mode"] = words.pop()
    rest = " ".join(words)
    if rest.startswith("{"):
        return given | {"rope_scaling": _object(rest)}
    if not words or len(words) > 2 or words[0] not in NAMES:
        raise RequestError(f"{text.strip()!r:.80} is not a RoPE scaling. {HELP}")
    name, *factor = words
    if name not in BY_FACTOR:
        if factor:
            raise RequestError(f"{name} takes no factor. {HELP}")
        scalings = {"none": {"rope_type": "default"}, "auto": AUTO, "as-declared": None}
        return given | {"rope_scaling": scalings[name]}
    if not factor:
        raise RequestError(f"{name} needs a factor, such as: /rescale {name} 4")
    return given | {"rope_scaling": {"rope_type": name, "factor": _number(factor[0])}}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(f"a factor must be a number, got {text!r:.40}. {HELP}") from error


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON ({error}). {HELP}") from error
    return value
