"""How a model is to be loaded: the options of `load_model` and of every front end, in one frozen record."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.choices import BACKEND, CACHE_TYPE, COMPUTE, HEAD_BITS, MAX_INPUT_LEN, ROPE_GROWTH
from ropewalk.base.errors import ConfigError
from ropewalk.base.limits import MAX_SEQ_LEN, MAX_THREADS
from ropewalk.config.cache_format import CacheFormat
from ropewalk.files.local import local_folder

if TYPE_CHECKING:
    import torch

    from ropewalk.config.layer_order import LayerOrder

MOST_RANKS = 1024
# What options may be that are checked in full where they are used.
KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "isa": ((str,), "the name of an instruction set"),
    "rope_scaling": ((str, Mapping), 'a mapping as in config.json, the name of a method, or "auto"'),
    "compress_pos_emb": ((int, float), "a number"),
    "alpha_value": ((int, float), "a number"),
    "rope_theta": ((int, float), "a number"),
    "recompute_n_layers": ((int,), "a number of layers"),
    "rewind_n_layers": ((int,), "a number of layers"),
    "second_folder": ((str, Path), "a path"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The options of loading; each is also a keyword of `load_model`. None: as the model's files declare.

    max_seq_len: longest sequence to be run (default: what config.json declares, or what an option below
        makes the RoPE cover). A length beyond what the method covers logs a warning with the remedy.
    max_input_len: tokens per chunk of a long prompt; bounds scratch memory, never changes results.
    compute: "int8" (activations quantised in blocks of 32, integer products; "cpu" and "reference"), "fp16" (float16
        activations; "gpu"), "exact" (activations to the precision of float32), or "auto": "int8" on a CPU and "fp16" on
        a GPU.
    head_bits: how a head that is stored in floats is held: "8" or "4" (rounded when it is loaded, on any backend and
        for any `compute`), "16" (as stored), or "auto": 8 where `compute` is "int8", else as stored. See
        `model/head.py`.
    backend: "cpu" (compiled kernels), "gpu" (Triton kernels), "reference" (plain torch, slow, any `device`), or "auto":
        the GPU if this machine has what it needs and no option asks for the CPU, else the CPU.
    device: for "gpu": "cuda" (default), "cuda:1", ..., or "cpu" under Triton's interpreter; for "reference": any.
    gpu_layers: how many layer instances run on the GPU, from the first on; the others run on the CPU (default: all).
    gpu_split: GiB of weights for each card, from the first on, such as "10,20" (default: one card, `device`).
    threads, isa: for "cpu": number of threads (default: all cores) and instruction set (default: the best there is).
    rope_scaling, compress_pos_emb, alpha_value, rope_theta: override what config.json says; see `resolve_rope`.
        rope_scaling="auto": if max_seq_len is more than the checkpoint covers, a rule chooses (rope/automatic.py).
    rope_growth: what happens to cached keys when a sequence outgrows the length of their frequencies, under a method
        that follows the length: "rotate" turns them, "recompute" computes them anew.
    cache_type: the format of cached keys and values: "fp32", "fp16", "q8", "q6", "q4", two of them as keys_values such
        as "q8_q4", and with codes a window of recent positions that stay in float16, such as "q4+256"; see
        `config/cache_format.py`.
    cache_memory: bytes for the keys and values of all sequences together (default: what is left beside the weights,
        within a bound: at most 16 contexts or 4 GiB, whichever is more); at least one context.
    expert_memory: bytes for the experts of a mixture; those that were not used for longest are dropped, and read again
        when they are needed (default: all of them if they fit beside the other weights; on the CPU).
    pipeline: spread the layer instances over processes, which pass rows on to each other (docs/pipeline.md): how many
        there are to be, or how many instances each runs, such as "6,10,10"; they are started on this machine, unless
        torchrun has started them.
    max_attention_size: accepted for compatibility with exllama, where it bounds the matrix of scores. Attention here is
        tiled and never forms that matrix, so it has no effect.
    layer_order: which layers to run, such as "0-15,8-23,16-31" or a list of numbers; see `config/layer_order.py`.
        Default: the key `layer_order` of config.json, else each layer once. A layer that runs several times shares its
        weights, and has a cache for each time.
    recompute_n_layers, rewind_n_layers: instead of an order: run this many layers, go back by this many, and repeat.
    second_folder: a model of equal shapes whose layers an order names as "b:"; embeddings and head are the first's.

    Raises:
        ConfigError: a value is of the wrong type, out of range or not one of the choices.
    """

    max_seq_len: int | None = None
    max_input_len: int = MAX_INPUT_LEN
    compute: str = COMPUTE.default
    backend: str = BACKEND.default
    threads: int | None = None
    isa: str | None = None
    rope_scaling: Mapping[str, Any] | str | None = None
    compress_pos_emb: float | None = None
    alpha_value: float | None = None
    rope_theta: float | None = None
    rope_growth: str = ROPE_GROWTH.default
    cache_type: str = CACHE_TYPE.default
    cache_memory: int | None = None
    head_bits: str | int = HEAD_BITS.default
    expert_memory: int | None = None
    device: str | torch.device | None = None
    gpu_layers: int | None = None
    gpu_split: str | None = None
    pipeline: int | str | None = None
    max_attention_size: int | None = None
    layer_order: str | Sequence[int] | LayerOrder | None = None
    recompute_n_layers: int | None = None
    rewind_n_layers: int | None = None
    second_folder: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_input_len", "max_attention_size", "threads", "cache_memory", "expert_memory"):
            value = getattr(self, name)
            optional = name != "max_input_len"
            if not (optional and value is None or _is_positive(value)):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.max_seq_len is not None and self.max_seq_len > MAX_SEQ_LEN:
            raise ConfigError(f"max_seq_len must be at most {MAX_SEQ_LEN}, got {self.max_seq_len}")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise ConfigError(f"threads must be at most {MAX_THREADS}, got {self.threads}")
        for choice in (COMPUTE, BACKEND, ROPE_GROWTH):
            choice.check(getattr(self, choice.name))
        HEAD_BITS.check(self.head_bits if isinstance(self.head_bits, bool) else str(self.head_bits))
        CacheFormat.parse(self.cache_type)
        for name, (kinds, accepted) in KINDS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise ConfigError(f"{name} must be {accepted}, got {value!r:.80}")
        if self.gpu_layers is not None and not _is_count(self.gpu_layers):
            raise ConfigError(f"gpu_layers must be an integer from 0 on, got {self.gpu_layers!r}")
        if self.gpu_split is not None:
            parse_split(self.gpu_split)
        if self.pipeline is not None:
            parse_pipeline(self.pipeline)

    @property
    def cache_format(self) -> CacheFormat:
        """What `cache_type` spells."""
        return CacheFormat.parse(self.cache_type)

    @property
    def asks_for_gpu(self) -> bool:
        """True if an option has a meaning only where a GPU runs layers."""
        return bool(self.gpu_layers) or self.gpu_split is not None or self.compute == "fp16"

    @property
    def has_rope(self) -> bool:
        """True if an option overrides the RoPE that config.json declares."""
        return any(getattr(self, name) is not None for name in ROPE_NAMES)


ROPE_NAMES = ("rope_scaling", "compress_pos_emb", "alpha_value", "rope_theta")
OPTION_NAMES = tuple(field.name for field in fields(LoadOptions))


def options_with(options: LoadOptions | None, keywords: Mapping[str, Any]) -> LoadOptions:
    """`options` (default: all defaults) with the fields that `keywords` name replaced.

    Raises:
        TypeError: a keyword is not an option; the message suggests the closest one. ConfigError: as `LoadOptions`.
    """
    for name in keywords:
        if name not in OPTION_NAMES:
            close = get_close_matches(name, OPTION_NAMES, 1)
            hint = f": did you mean {close[0]}?" if close else "."
            raise TypeError(f"{name!r} is not a loading option{hint} The options are {', '.join(OPTION_NAMES)}")
    if options is not None and not isinstance(options, LoadOptions):
        raise ConfigError(f"options must be LoadOptions, got {type(options).__name__}")
    return replace(options or LoadOptions(), **keywords)


def with_local_second(options: LoadOptions) -> LoadOptions:
    """The same with the folder of the second model, where it is given by its name on the hub."""
    if not isinstance(options.second_folder, str):
        return options
    return replace(options, second_folder=local_folder(options.second_folder))


def with_options(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function that takes options as `**keywords`, with every option spelled out instead."""
    given = inspect.signature(function).parameters
    singly = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(LoadOptions)
        if field.name not in given
    ]
    shown = [item for item in given.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    named = [item for item in shown if item.kind is inspect.Parameter.KEYWORD_ONLY]
    return inspect.Signature([*(item for item in shown if item not in named), *singly, *named])


def parse_split(text: Any) -> tuple[float, ...]:
    """ "10,20" -> (10.0, 20.0): GiB of weights for each card.

    Raises:
        ConfigError: not positive numbers separated by commas.
    """
    try:
        shares = tuple(float(part) for part in text.split(","))
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"gpu_split must be GiB for each card, such as '10,20', got {text!r:.80}") from error
    if not all(0 < share < math.inf for share in shares):
        raise ConfigError(f"gpu_split must be a positive number of GiB for each card, got {text!r:.80}")
    return shares


def parse_pipeline(value: Any) -> int | tuple[int, ...]:
    """4 or "4" -> 4 processes; "6,10,10" -> so many layer instances for each, of which the first may have none.

    Raises:
        ConfigError: anything else, or fewer than two processes.
    """
    accepted = 'a number of processes from 2 on, or layer instances for each, such as "6,10,10"'
    parts = value.split(",") if isinstance(value, str) else [value]
    try:
        counts = tuple(int(part) for part in parts) if not isinstance(value, (bool, float)) else ()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"pipeline must be {accepted}, got {value!r:.80}") from error
    if len(counts) == 1 and 2 <= counts[0] <= MOST_RANKS:
        return counts[0]
    if not 2 <= len(counts) <= MOST_RANKS or counts[0] < 0 or min(counts[1:]) < 1:
        raise ConfigError(f"pipeline must be {accepted}, got {value!r:.80}")
    return counts


def num_ranks(pipeline: int | str | None) -> int:
    """How many processes run a model.

    Raises:
        ConfigError: as `parse_pipeline`.
    """
    if pipeline is None:
        return 1
    asked = parse_pipeline(pipeline)
    return asked if isinstance(asked, int) else len(asked)


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value >= 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
