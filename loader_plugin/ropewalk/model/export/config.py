"""The JSON files of a checkpoint whose layers were written out in a new order: facts about a layer follow the layer.

The name of a layer decides two things: its attention window (`layer_types`, `max_window_layers`) and its quantisation
(the regular expressions of `dynamic`, the names of `extra_config`). If the old rules say something else of the new name
of a layer, exact rules for that name are put before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.base.errors import UnsupportedError
from ropewalk.base.json import read_json_object
from ropewalk.config.layer_order import LayerOrder
from ropewalk.config.model import ModelConfig, parse_model_config
from ropewalk.config.quantisation import QuantConfig, QuantSettings
from ropewalk.families.family import Windows

CONFIG = "config.json"
NESTED = "quantization_config"
QUANT_FILES = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model that layers are taken from."""

    folder: Path
    config: ModelConfig
    quant: QuantConfig | None


@dataclass(frozen=True, slots=True)
class MovedLinear:
    """A linear of the new checkpoint: its name there, its name in its own model, and how it is declared there."""

    name: str
    old_name: str
    settings: QuantSettings | None


def moved_linears(sources: Mapping[str, SourceModel], order: LayerOrder) -> Iterator[MovedLinear]:
    """Every linear of every layer, in the new order."""
    for position, use in enumerate(order.uses):
        source = sources[use.source]
        prefix = source.config.table.layer_prefix
        for entry in source.config.layer_table(use.layer).linears:
            old_name = prefix(use.layer) + entry.name
            settings = None if source.quant is None else source.quant.for_module(old_name)
            yield MovedLinear(prefix(position) + entry.name, old_name, settings)


def exported_files(sources: Mapping[str, SourceModel], order: LayerOrder) -> dict[str, dict[str, Any]]:
    """The JSON objects to be written, by file name: config.json and the files that declare the quantisation.

    sources: the model "a" and, where the order uses it, the second model "b".

    Raises:
        UnsupportedError: one checkpoint cannot declare what the two models declare.
    """
    first = sources["a"]
    files = {CONFIG: _config(sources, order)}
    files |= {name: read_json_object(first.folder / name) for name in QUANT_FILES if (first.folder / name).exists()}
    if isinstance(files[CONFIG].get(NESTED), Mapping):
        files[CONFIG][NESTED] = dict(files[CONFIG][NESTED])
    declarations = [files[CONFIG].get(NESTED), *(files[name] for name in QUANT_FILES if name in files)]
    declarations = [declaration for declaration in declarations if declaration]
    for declaration in declarations:
        declaration.pop("model_file_base_name", None)  # the new files have the usual names
    if first.quant is not None:
        _check_second_quant(sources)
        if first.quant.rules or "b" in sources:
            _rewrite_rules_(declarations, sources, order)
    elif "b" in sources and sources["b"].quant is not None:
        raise UnsupportedError(
            f"{first.config.source} declares no quantisation and {sources['b'].quant.source} does: exchange the two "
            "models, so that the declaration is the first model's"
        )
    return files


def _config(sources: Mapping[str, SourceModel], order: LayerOrder) -> dict[str, Any]:
    config = sources["a"].config
    raw = {key: value for key, value in config.raw.items() if key != "layer_order"}
    raw["num_hidden_layers"] = len(order)
    windows = tuple(sources[use.source].config.sliding_windows[use.layer] for use in order.uses)
    sizes = {window for window in windows if window is not None}
    if not sizes <= set(config.sliding_windows):
        raise UnsupportedError(
            f"{sources['b'].config.source}: its layers have sliding windows of {sorted(sizes)}, which {config.source} "
            "cannot say: one config.json holds one window"
        )
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if raw.get("layer_types") is not None:
        raw["layer_types"] = types
    source = f"{config.source} with the layers {order}"
    if parse_model_config(raw, source).sliding_windows != windows:
        raw["layer_types"] = types  # max_window_layers alone no longer says which layers have the window
        if config.table.windows is Windows.ALL or parse_model_config(raw, source).sliding_windows != windows:
            raise UnsupportedError(
                f"{config.source}: a {config.family} model cannot have sliding windows in some of its layers only"
            )
    return raw


def _check_second_quant(sources: Mapping[str, SourceModel]) -> None:
    if "b" not in sources or sources["b"].quant is None:
        return  # dense layers become exceptions
    first, second = sources["a"].quant, sources["b"].quant
    for name in ("format", "word_borrow"):
        ours, theirs = getattr(first.default, name), getattr(second.default, name)
        if ours != theirs:
            raise UnsupportedError(
                f"{second.source} and {first.source} differ in the {'format' if name == 'format' else 'writer'} of "
                f"zero points ({theirs} and {ours}), which holds for a whole checkpoint: quantise both with one tool"
            )


def _rewrite_rules_(declarations: list[dict[str, Any]], sources: Mapping[str, SourceModel], order: LayerOrder) -> None:
    """Make `dynamic` or `extra_config` of every declaration say of each new name what they said of the old one."""
    by_name = next((d["extra_config"] for d in declarations if d.get("extra_config")), None)
    rules = next((d["dynamic"] for d in declarations if d.get("dynamic")), None)
    if by_name is not None:
        if rules is not None or "b" in sources:
            raise UnsupportedError(
                f"{sources['a'].quant.source}: extra_config together with dynamic or a second model cannot be exported"
            )
        layers = sources["a"].config.table.names.layers
        renamed = {name: value for name, value in by_name.items() if not name.startswith(layers)}
        moved = list(moved_linears(sources, order))
        renamed |= {linear.name: by_name[linear.old_name] for linear in moved if linear.old_name in by_name}
        for declaration in declarations:
            declaration["extra_config"] = renamed
        return
    exact = {}
    for linear in moved_linears(sources, order):
        if sources["a"].quant.for_module(linear.name) != linear.settings:
            exact.update([_exact_rule(linear)])
    if exact:
        rewritten = exact | {pattern: value for pattern, value in (rules or {}).items() if pattern not in exact}
        for declaration in declarations:
            declaration["dynamic"] = rewritten


def _exact_rule(linear: MovedLinear) -> tuple[str, dict[str, Any]]:
    pattern, settings = f"^{re.escape(linear.name)}$", linear.settings
    if settings is None:
        return f"-:{pattern}", {}
    values = {name: getattr(settings, name) for name in ("bits", "group_size", "desc_act", "sym")}
    return f"+:{pattern}", values
