"""One set of weights, computed in several ways at a time: with another RoPE scaling, cache, layer order or arithmetic.

A variant is a model of its own, with its own adapters and caches; weights and the backend (its threads, and the memory
that the matrices of adapters are placed in) are shared. It can run, and load adapters, while the other one does: each
operation takes the threads for itself, and each matrix its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ropewalk.adapters.lora import read_adapter
from ropewalk.backends.protocol import Backend
from ropewalk.base.errors import RequestError, UnsupportedError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.config.layer_order import LayerOrder, choose_layer_order
from ropewalk.model.head import rounded_bits
from ropewalk.model.layers import recompiled
from ropewalk.model.model import Model, ModelLimits, ModelWeights
from ropewalk.rope.rope import Rope, resolve_rope
from ropewalk.rope.spellings import AS_LOADED, SCALINGS

# A chunk of a prompt gives way to other users of the threads only between its operations, so chunks are kept short.
MAX_CHUNK = 512


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A LoRA in use. name: what it is loaded as; instances: the layer instances that it changes (default: all)."""

    name: str
    folder: Path
    weight: float = 1.0
    instances: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """A named way to run the weights. None: as the model was loaded."""

    name: str
    rope: Rope
    adapters: tuple[AdapterUse, ...] = ()
    cache_format: CacheFormat | None = None
    compute: str | None = None
    layer_order: LayerOrder | None = None


def variant_model(
    model: Model,
    rope: Rope | None = None,
    max_seq_len: int | None = None,
    layer_order: str | Sequence[int] | LayerOrder | None = None,
    cache_format: CacheFormat | None = None,
    compute: str | None = None,
) -> Model:
    """The weights of `model` under another RoPE, context length, layer order, cache or arithmetic.

    Whatever is not given stays.

    Raises:
        ConfigError: as `choose_layer_order`. UnsupportedError: the weights are packed for one arithmetic alone.
    """
    order = model.layer_order
    if layer_order is not None:
        second_layers = len(model.weights.layers) - model.config.num_layers or None
        order = choose_layer_order(model.config, layer_order, second_layers=second_layers)
    backend, weights = _computing(model, compute)
    length, chunk = max_seq_len or model.max_seq_len, min(model.max_input_len, MAX_CHUNK)
    limits = ModelLimits(length, chunk, cache_format or model.cache_format, rope_growth=model.rope_growth)
    return Model(model.config, model.quant, rope or model.rope, backend, weights, limits, order)


def can_compute(model: Model, compute: str) -> bool:
    """Whether the weights as they are packed serve this arithmetic: with another one the head may be held otherwise."""
    if compute == model.backend.compute:
        return True
    return model.backend.computing(compute) is not None and _same_head(model, compute)


def _same_head(model: Model, compute: str) -> bool:
    head_bits = model.weights.head_bits
    return head_bits is None or rounded_bits(head_bits, compute) == rounded_bits(head_bits, model.backend.compute)


def _computing(model: Model, compute: str | None) -> tuple[Backend, ModelWeights]:
    """Backend and weights for an arithmetic; what is packed is shared."""
    if compute is None or compute == model.backend.compute:
        return model.backend, model.weights
    backend = model.backend.computing(compute)
    if backend is not None and not _same_head(model, compute):
        raise UnsupportedError(
            f"the head is held for compute={model.backend.compute!r} (head_bits={model.weights.head_bits}): for "
            f"compute={compute!r} the model must be loaded anew, or with head_bits=16"
        )
    if backend is None:
        raise UnsupportedError(
            f"the weights are packed for {model.backend.compute!r} on backend {model.backend.name!r}: for compute="
            f"{compute!r} the model must be loaded anew"
        )
    return backend, replace(model.weights, layers=recompiled(backend, model.config, model.weights.layers))


def scaling_variant(model: Model, name: str, factor: float, rope_theta: float | None = None) -> Variant:
    """One of SCALINGS by that factor, or AS_LOADED. rope_theta: the base, in place of config.json's.

    Raises:
        RequestError: an unknown name. ConfigError: the factor is out of range.
    """
    if name == AS_LOADED:
        return Variant(name, model.rope)
    if name not in SCALINGS:
        raise RequestError(f"scaling {name!r} is not known; accepted are {', '.join((AS_LOADED, *SCALINGS))}")
    scaling = {"rope_type": "default"} if name == "none" else {"rope_type": name, "factor": factor}
    config = model.config
    return Variant(name, resolve_rope(config.raw, rope_scaling=scaling, rope_theta=rope_theta, source=config.source))


def adapter_variant(model: Model, name: str, folder: Path) -> Variant:
    """A LoRA under the RoPE scaling that it declares; if it declares none, under that of the model.

    Raises:
        Errors of `Model.load_adapter`.
    """
    noted = read_adapter(folder, model.config, model.weights.embeddings).rope_scaling
    if noted is None:
        return Variant(name, model.rope, (AdapterUse(name, folder),))
    rope = resolve_rope(model.config.raw, rope_scaling=noted, source=str(folder))
    return Variant(name, rope, (AdapterUse(name, folder),))


Chosen = list[tuple[str, float, tuple[int, ...] | None]]


def open_variant(model: Model, variant: Variant, max_seq_len: int) -> tuple[Model, Chosen | None]:
    """(the model of a variant for texts of that length, the adapters of its requests).

    Raises:
        Errors of `variant_model` and of `Model.load_adapter`.
    """
    made = variant_model(model, variant.rope, max_seq_len, variant.layer_order, variant.cache_format, variant.compute)
    return made, load_adapters(made, variant.adapters)


def load_adapters(model: Model, adapters: Sequence[AdapterUse]) -> Chosen | None:
    """Load them beside a model; returns the `adapters` of requests, None if there are none. An adapter may be in use
    several times, on different instances."""
    for use in adapters:
        if use.name not in model.adapters:
            model.load_adapter(use.folder, use.name)
    return [(use.name, use.weight, use.instances) for use in adapters] or None
