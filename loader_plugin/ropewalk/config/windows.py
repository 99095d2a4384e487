"""Which layers of a model see only the keys of a sliding window."""

from __future__ import annotations

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.base.json import Section
from ropewalk.base.limits import MAX_LAYERS, MAX_POSITIONS
from ropewalk.families.family import Family, Windows


def layer_windows(section: Section, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer; None for a layer that sees every earlier key.

    ALL: every layer has `sliding_window` (null: none). SOME: only with `use_sliding_window`, and then the layers that
    `layer_types` names, or those from `max_window_layers` on. MOST: those that `layer_types` names, or all but every
    n-th.

    Raises:
        ConfigError: layers are named that cannot have a window. UnsupportedError: an order that the family has not.
    """
    if family.windows is Windows.NONE:
        return (None,) * num_layers
    window = None
    key = "use_sliding_window" if family.windows is Windows.SOME else family.window_key
    if key is None or section.boolean(key, False):
        absent = None if "sliding_window" in section.values else family.window
        window = section.optional_integer("sliding_window", 1, MAX_POSITIONS, absent)
    slides = _layer_slides(section, num_layers)
    if family.windows is Windows.ALL:
        if slides is not None and any(slide != (window is not None) for slide in slides):
            raise UnsupportedError(
                f"{section.source}: layer_types that differ between layers or from sliding_window are not supported "
                f"for {family.name}: every layer has the window of sliding_window"
            )
        return (window,) * num_layers
    if slides is None:
        slides = _most(section, family, num_layers) if family.windows is Windows.MOST else _last(section, num_layers)
        slides = [slide and (window is not None or family.windows is Windows.MOST) for slide in slides]
    if window is None and any(slides):
        if family.windows is Windows.MOST:
            raise section.error(
                "sliding_window", f"an integer from 1 to {MAX_POSITIONS}: there are layers with windows"
            )
        raise ConfigError(
            f"{section.source}: layer_types names sliding_attention layers, but no window is in force: "
            "use_sliding_window must be true and sliding_window an integer"
        )
    return tuple(window if slide else None for slide in slides)


def _last(section: Section, num_layers: int) -> list[bool]:
    first = section.optional_integer("max_window_layers", 0, MAX_LAYERS, 28)
    return [layer >= first for layer in range(num_layers)]


def _most(section: Section, family: Family, num_layers: int) -> list[bool]:
    every = family.full_every
    if family.full_key is not None:
        every = section.optional_integer(family.full_key, 1, MAX_LAYERS, every)
    return [(layer + 1) % every != 0 for layer in range(num_layers)]


def _layer_slides(section: Section, num_layers: int) -> list[bool] | None:
    """Which layers have a sliding window by `layer_types`; None if the key is absent."""
    if not section.has("layer_types"):
        return None
    names = {"full_attention": False, "attention": False, "sliding_attention": True}
    types = section.values["layer_types"]
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or not all(isinstance(name, str) and name in names for name in types)
    ):
        raise section.error("layer_types", f"a list of {num_layers} times full_attention or sliding_attention")
    return [names[name] for name in types]
