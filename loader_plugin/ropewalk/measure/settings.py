"""A setting: a model folder, loading options and adapters. Opened beside another, it shares whatever it can with it.

same folder; other cache, RoPE, layer order, adapters, or arithmetic where the packed weights serve it: shared weights
anything else (another folder, backend, second model, ...): a second model is loaded, for as long as it is needed
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ropewalk.base.errors import RequestError
from ropewalk.config.layer_order import choose_layer_order
from ropewalk.model.backend_choice import ARITHMETIC
from ropewalk.model.head import rounded_bits
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.options import ROPE_NAMES, LoadOptions
from ropewalk.model.variants import AdapterUse, Chosen, can_compute, load_adapters, variant_model
from ropewalk.rope.given import rope_as_given

ORDER_NAMES = ("layer_order", "recompute_n_layers", "rewind_n_layers")
# What a variant of a loaded model can change; of the rest, these change no result.
SHARED_NAMES = (*ROPE_NAMES, *ORDER_NAMES, "cache_type", "compute", "max_seq_len")
HARMLESS_NAMES = ("cache_memory", "max_input_len", "max_attention_size")
SAMPLE = 1 << 16  # bytes that are read of the start, the middle and the end of a weight file
WEIGHT_FILES = ("*.safetensors", "config.json", "quantize_config.json", "adapter_config.json")


@dataclass(frozen=True, slots=True)
class Setting:
    """A named way to run a model."""

    name: str
    folder: Path
    options: LoadOptions
    adapters: tuple[AdapterUse, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenSetting:
    """A model that runs a setting, and the adapters of its requests."""

    setting: Setting
    model: Model
    adapters: Chosen | None

    @property
    def facts(self) -> dict[str, Any]:
        """See `facts_of`."""
        return facts_of(self.model, self.setting.adapters)


def open_base(setting: Setting, model: Model) -> OpenSetting:
    """A setting that was loaded already."""
    return OpenSetting(setting, model, load_adapters(model, setting.adapters))


def open_beside(base: OpenSetting, setting: Setting, progress: Callable[[int, int], None] | None = None) -> OpenSetting:
    """A setting beside an open one, for texts as long as that one takes. progress: of loading, if it must be.

    Raises:
        RequestError: a model with another vocabulary. Others as `load_model` and `Model.load_adapter`.
    """
    if _can_share(base, setting):
        model = _shared(base, setting)
    else:
        options = replace(setting.options, max_seq_len=base.model.max_seq_len)
        model = load_model(setting.folder, options=options, progress=progress)
    ours, theirs = base.model.config.vocab_size, model.config.vocab_size
    if ours != theirs:
        raise RequestError(
            f"{setting.name}: a vocabulary of {theirs} tokens cannot be compared with one of {ours} "
            f"({base.model.config.source}): models must have the same tokenizer"
        )
    return OpenSetting(setting, model, load_adapters(model, setting.adapters))


def facts_of(model: Model, adapters: Sequence[AdapterUse] = ()) -> dict[str, Any]:
    """What the results of a model depend on, as plain data for a record."""
    rope = model.rope
    return {
        "model": fingerprint(Path(model.config.source).parent),
        "RoPE": f"{rope.method!r}, theta {rope.theta!r}, {rope.rotary_dim} of {rope.head_dim}",
        "cache": model.cache_type,
        "compute": f"{model.backend.name} {model.backend.compute}",
        "head": _head_of(model),
        "layer order": str(model.layer_order),
        "adapters": [
            {"files": fingerprint(use.folder), "weight": use.weight, "instances": use.instances} for use in adapters
        ],
    }


def _head_of(model: Model) -> str:
    """How many bits it is held in."""
    bits = model.weights.head_bits
    rounded = None if bits is None else rounded_bits(bits, model.backend.compute)
    return "as stored" if rounded is None else f"{rounded} bits"


def fingerprint(folder: Path) -> str:
    """What tells the weights of one folder from those of another: settings, sizes and samples of the weight files.

    Weights are gigabytes, so 192 KiB of each file are read: two models that differ anywhere differ there, unless
    someone changes single tensors of a file by hand.
    """
    digest = hashlib.sha256()
    paths = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)}):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:32]


def _can_share(base: OpenSetting, setting: Setting) -> bool:
    ours, theirs = base.setting.options, setting.options
    if setting.folder.resolve() != base.setting.folder.resolve():
        return False
    names = [field.name for field in fields(LoadOptions) if field.name not in (*SHARED_NAMES, *HARMLESS_NAMES)]
    if any(getattr(ours, name) != getattr(theirs, name) for name in names):
        return False
    return ours.compute == theirs.compute or can_compute(base.model, _arithmetic(base.model, setting))


def _arithmetic(model: Model, setting: Setting) -> str:
    """The arithmetic that the setting asks for, on the backend of a model."""
    if setting.options.compute != "auto" or model.backend.name not in ARITHMETIC:
        return setting.options.compute
    return ARITHMETIC[model.backend.name][0]


def _shared(base: OpenSetting, setting: Setting) -> Model:
    """The weights of the base under the options of a setting that differ from its own."""
    options, model = setting.options, base.model
    arguments: dict[str, Any] = {"cache_format": options.cache_format}
    if options.compute != base.setting.options.compute:
        arguments["compute"] = _arithmetic(model, setting)
    if _differ(options, base.setting.options, ROPE_NAMES):
        given = {name: getattr(options, name) for name in ROPE_NAMES}
        arguments["rope"] = rope_as_given(model.config.raw, model.max_seq_len, **given, source=model.config.source)
    if _differ(options, base.setting.options, ORDER_NAMES):
        second = len(model.weights.layers) - model.config.num_layers or None
        given = {name: getattr(options, name) for name in ORDER_NAMES}
        arguments["layer_order"] = choose_layer_order(model.config, **given, second_layers=second)
    return variant_model(model, **arguments)


def _differ(ours: LoadOptions, theirs: LoadOptions, names: Sequence[str]) -> bool:
    return any(getattr(ours, name) != getattr(theirs, name) for name in names)
