"""One set of weights, computed in several ways at a time: with another RoPE scaling, layer order or context.

A variant is a model of its own, with its own adapters and caches; weights and the backend (its threads, and the memory
that the matrices of adapters are placed in) are shared. It can run, and load adapters, while the other one does: each
operation takes the threads for itself, and each matrix its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ropewalk.adapters.lora import read_adapter
from ropewalk.base.errors import RequestError
from ropewalk.config.layer_order import LayerOrder, choose_layer_order
from ropewalk.model.model import Model, ModelLimits
from ropewalk.rope.rope import Rope, resolve_rope
from ropewalk.rope.spellings import BY_FACTOR

AS_LOADED = "as loaded"
SCALINGS = ("none", *BY_FACTOR)
# A chunk of a prompt gives way to other users of the threads only between its operations, so chunks are kept short.
MAX_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Variant:
    """A named way to run the weights. adapter: the LoRA folder in use, under the variant's name."""

    name: str
    rope: Rope
    adapter: Path | None = None


def variant_model(
    model: Model,
    rope: Rope | None = None,
    max_seq_len: int | None = None,
    layer_order: str | Sequence[int] | LayerOrder | None = None,
) -> Model:
    """The weights of `model` under another RoPE, context length or layer order; whatever is not given stays.

    Raises:
        ConfigError: as `choose_layer_order`.
    """
    order = model.layer_order
    if layer_order is not None:
        second_layers = len(model.weights.layers) - model.config.num_layers or None
        order = choose_layer_order(model.config, layer_order, second_layers=second_layers)
    limits = ModelLimits(max_seq_len or model.max_seq_len, min(model.max_input_len, MAX_CHUNK), model.cache_format)
    return Model(model.config, model.quant, rope or model.rope, model.backend, model.weights, limits, order)


def scaling_variant(model: Model, name: str, factor: float) -> Variant:
    """One of SCALINGS by that factor, or AS_LOADED.

    Raises:
        RequestError: an unknown name. ConfigError: the factor is out of range.
    """
    if name == AS_LOADED:
        return Variant(name, model.rope)
    if name not in SCALINGS:
        raise RequestError(f"scaling {name!r} is not known; accepted are {', '.join((AS_LOADED, *SCALINGS))}")
    scaling = {"rope_type": "default"} if name == "none" else {"rope_type": name, "factor": factor}
    return Variant(name, resolve_rope(model.config.raw, rope_scaling=scaling, source=model.config.source))


def adapter_variant(model: Model, name: str, folder: Path) -> Variant:
    """A LoRA under the RoPE scaling that it declares; if it declares none, under that of the model.

    Raises:
        Errors of `Model.load_adapter`.
    """
    noted = read_adapter(folder, model.config, model.weights.embeddings).rope_scaling
    if noted is None:
        return Variant(name, model.rope, folder)
    return Variant(name, resolve_rope(model.config.raw, rope_scaling=noted, source=str(folder)), folder)


def open_variant(model: Model, variant: Variant, max_seq_len: int) -> tuple[Model, list[tuple[str, float]] | None]:
    """(the model of a variant for texts of that length, the adapters of its requests)."""
    made = variant_model(model, variant.rope, max_seq_len)
    if variant.adapter is None:
        return made, None
    made.load_adapter(variant.adapter, variant.name)
    return made, [(variant.name, 1.0)]
