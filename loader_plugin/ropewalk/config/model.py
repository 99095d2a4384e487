"""From a model folder's config.json to a ModelConfig: the frozen facts of one decoder, all checked.

What differs between architectures is data in `families/`, a file for each. Whatever can be refused is refused here,
before a byte of weights is read. rope/decision.py reads the RoPE keys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.base.json import Section, read_json_object, require_folder, shown
from ropewalk.base.limits import MAX_FEATURES, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB
from ropewalk.config.rotary import read_rotary_dim, read_sliding_theta, scaling_object
from ropewalk.config.windows import layer_windows
from ropewalk.families import FAMILIES
from ropewalk.families.family import Family, Scales, Sizes
from ropewalk.families.program import Activation
from ropewalk.families.recorder import Mixture
from ropewalk.families.tables import LayerKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of one decoder. Key j is visible to query i of a layer with window W iff i - W < j <= i.

    sliding_windows, rotations, layer_kinds: one for each layer. A window is None where all earlier keys are visible; a
    rotation is the table that the layer turns queries and keys by: 0 that of the model's RoPE, 1 that of layers with
    windows where it has another theta (`sliding_theta`), None: they are not turned.
    flags: the biases and norms that there are, by their names in the family's tables.
    """

    source: str  # the file, for messages
    family: str  # a key of FAMILIES
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    activation: Activation
    scales: Scales
    max_position_embeddings: int
    layer_kinds: tuple[str, ...]
    sliding_windows: tuple[int | None, ...]
    rotations: tuple[int | None, ...]
    paired_dim: int  # features of a head that the file orders in pairs (families/tables.py: Rows.PAIRS)
    sliding_theta: float | None
    tie_word_embeddings: bool
    flags: frozenset[str]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    mixture: Mixture | None  # of the layers whose kind has experts
    # The whole config.json, read-only: rope/decision.py and config/quantisation.py read their keys from it.
    raw: Mapping[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the tensors of a family are named by (families/tables.py)."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mixture = self.mixture
        experts = (
            {}
            if mixture is None
            else {
                "experts": mixture.num_experts,
                "expert inner": mixture.inner,
                "shared inner": mixture.shared_inner,
                "one": 1,
            }
        )
        return experts | {
            "hidden": self.hidden_size,
            "inner": self.intermediate_size,
            "gate and up": 2 * self.intermediate_size,
            "heads": self.num_heads,
            "key heads": self.num_kv_heads,
            "queries": queries,
            "keys": keys,
            "queries, keys and values": queries + 2 * keys,
            "head": self.head_dim,
            "vocab": self.vocab_size,
        }

    @property
    def table(self) -> Family:
        """What is common to all models of the family."""
        return FAMILIES[self.family]

    def layer_table(self, index: int) -> LayerKind:
        """The tensors of decoder layer `index`."""
        return self.table.kinds[self.layer_kinds[index]].with_flags(self.flags)


def load_model_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder: config.json, with the end tokens of generation_config.json added.

    Raises:
        ConfigError: the folder or config.json is missing or damaged, or a value is not accepted.
        UnsupportedError: the architecture is not one of the families.
    """
    folder = Path(folder)
    path = folder / "config.json"
    require_folder(folder, "config.json and the weights")
    if not path.exists():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"{folder} has no config.json (found: {found}): give the folder that holds it, or copy the file from the "
            "model that this one was quantised from"
        )
    config = parse_model_config(read_json_object(path), str(path))
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    added = _token_ids(Section(str(generation), read_json_object(generation)), "eos_token_id", config.vocab_size)
    eos = tuple(dict.fromkeys(config.eos_token_ids + added))
    return replace(config, eos_token_ids=eos)


def parse_model_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """The configuration that a parsed config.json describes; `source` names it in messages.

    Raises:
        ConfigError: a required key is missing, or a value has the wrong type, is out of range or contradicts another.
        UnsupportedError: an architecture, activation or attention layout that is not implemented.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source} must hold a JSON object, found {shown(raw)}")
    section = Section(source, raw)
    family = _family(section)
    hidden_size = section.integer("hidden_size", 1, MAX_FEATURES)
    num_layers = section.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_heads, num_kv_heads, head_dim = _heads(section, family, hidden_size)
    vocab_size = section.integer("vocab_size", 1, MAX_VOCAB)
    windows = layer_windows(section, family, num_layers)
    sliding_theta = read_sliding_theta(section, family)
    bos_token_id, eos_token_ids = _special_tokens(section, family, vocab_size)
    return ModelConfig(
        source=source,
        family=family.name,
        hidden_size=hidden_size,
        intermediate_size=section.integer("intermediate_size", 1, MAX_FEATURES),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        norm_eps=section.optional_number(family.eps.name, 0.0, 1.0, family.eps.default, above=True),
        activation=_activation(section, family),
        scales=family.scales(section, Sizes(hidden_size, head_dim)),
        max_position_embeddings=read_max_positions(section, family),
        layer_kinds=tuple(family.kinds_of(section, num_layers)),
        sliding_windows=windows,
        rotations=tuple(_rotation(family, window, sliding_theta) for window in windows),
        paired_dim=read_rotary_dim((scaling_object(section), section), family, head_dim) if family.pairs else 0,
        sliding_theta=sliding_theta,
        tie_word_embeddings=section.boolean("tie_word_embeddings", family.tied),
        flags=frozenset(
            flag.name for flag in family.flags if flag.key is None or section.boolean(flag.key, flag.default)
        ),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        mixture=None if family.mixture is None else family.mixture(section),
        raw=MappingProxyType(dict(raw)),
    )


def _family(section: Section) -> Family:
    """The family by `model_type`, or by `architectures` if that key is absent (as in some files of 2023)."""
    accepted = "; accepted are " + ", ".join(f"{f.name} ({'/'.join(f.architectures)})" for f in FAMILIES.values())
    model_type = section.text("model_type")
    architectures = section.values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise section.error("architectures", "a list of strings")
    if model_type is None and not architectures:
        raise ConfigError(f"{section.source}: neither model_type nor architectures says which model this is{accepted}")
    if model_type is not None and model_type not in FAMILIES:
        raise UnsupportedError(f"{section.source}: model_type {shown(model_type)} is not supported{accepted}")
    families = [model_type] if model_type is not None else list(FAMILIES)
    known = {name: family for family in families for name in FAMILIES[family].architectures}
    for name in architectures:
        if name not in known:
            of = f" with model_type {shown(model_type)}" if model_type is not None else ""
            raise UnsupportedError(f"{section.source}: architecture {shown(name)}{of} is not supported{accepted}")
    return FAMILIES[model_type if model_type is not None else known[architectures[0]]]


ACTIVATIONS = {  # several names of one function, as in transformers
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
}


def _activation(section: Section, family: Family) -> Activation:
    for key in family.activations:
        name = section.text(key)
        if name is None:
            continue
        if name not in ACTIVATIONS:
            raise UnsupportedError(
                f"{section.source}: {key} {shown(name)} is not supported; accepted are {', '.join(ACTIVATIONS)}"
            )
        return family.renamed.get(name, ACTIVATIONS[name])
    return family.activation


def _rotation(family: Family, window: int | None, sliding_theta: float | None) -> int | None:
    """The table of a layer with this window."""
    if window is None:
        return 0 if family.full_layers_rotate else None
    return 0 if sliding_theta is None else 1


def _heads(section: Section, family: Family, hidden_size: int) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim)."""
    num_heads = section.integer("num_attention_heads", 1, MAX_HEADS)
    if family.fixed_heads:
        section = Section(section.source, {**section.values, "num_key_value_heads": num_heads, "head_dim": None})
    # An explicit null means "one per query head" in every family; an absent key means the family's default.
    absent_kv = num_heads if "num_key_value_heads" in section.values else family.num_kv_heads or num_heads
    num_kv_heads = section.optional_integer("num_key_value_heads", 1, MAX_HEADS, absent_kv)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{section.source}: num_key_value_heads, {num_kv_heads}, must divide num_attention_heads, {num_heads}"
        )
    head_dim = section.optional_integer("head_dim", 2, MAX_HEAD_DIM, family.head_dim)
    # transformers refuses a llama whose heads do not divide the hidden size even where head_dim is given.
    if hidden_size % num_heads and (head_dim is None or family.heads_divide_hidden):
        raise ConfigError(f"{section.source}: num_attention_heads, {num_heads}, must divide hidden_size, {hidden_size}")
    if head_dim is None:
        head_dim = hidden_size // num_heads
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"{section.source}: the head size (head_dim, or hidden_size / num_attention_heads) must be even and at "
            f"most {MAX_HEAD_DIM}, found {head_dim}: RoPE rotates pairs of features"
        )
    return num_heads, num_kv_heads, head_dim


def read_max_positions(section: Section, family: Family) -> int:
    """`max_position_embeddings`, or the family's default."""
    # The LLaMA conversions of March 2023 said max_sequence_length.
    old_name = section.optional_integer("max_sequence_length", 1, MAX_POSITIONS, family.max_position_embeddings)
    return section.optional_integer("max_position_embeddings", 1, MAX_POSITIONS, old_name)


def _special_tokens(section: Section, family: Family, vocab_size: int) -> tuple[int | None, tuple[int, ...]]:
    """(bos_token_id, eos_token_ids) of config.json."""
    ends = list(family.eos_token_id) if isinstance(family.eos_token_id, tuple) else family.eos_token_id
    absent = {"bos_token_id": family.bos_token_id, "eos_token_id": ends}
    known = Section(section.source, {**absent, **section.values})
    bos, eos = (_token_ids(known, key, vocab_size) for key in absent)
    old_spelling = "LLaMAForCausalLM" in (section.values.get("architectures") or [])
    if old_spelling and (bos, eos) == ((0,), (1,)) and vocab_size > 2:
        # The widespread conversions of March 2023 wrote these ids, although LLaMA's tokenizer has 1 = <s> and 2 = </s>:
        # taken literally, generation would never end.
        logger.warning("%s: bos_token_id 0 and eos_token_id 1 are a known mistake; using 1 and 2", section.source)
        bos, eos = (1,), (2,)
    return (bos[0] if bos else None), eos


def _token_ids(section: Section, key: str, vocab_size: int) -> tuple[int, ...]:
    """The token ids under a key: an integer, a list of them, or nothing. Ids outside the vocabulary are left out."""
    if not section.has(key):
        return ()
    value = section.values[key]
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise section.error(key, "a token id, a list of token ids, or null")
    outside = [token for token in ids if token >= vocab_size]
    if outside:
        listed = ", ".join(map(shown, outside))
        logger.warning("%s: %s %s is not in the vocabulary of %d; ignored", section.source, key, listed, vocab_size)
    return tuple(dict.fromkeys(token for token in ids if token < vocab_size))
