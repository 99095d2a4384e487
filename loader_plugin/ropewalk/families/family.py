"""What an architecture is: how its config.json is read, the names and sizes of its tensors, and its layers.

Each family is one file of this folder, and nothing outside the folder refers to a family by name. Most share Llama's
decoder (families/decoder.py) and its tensor names, which are the defaults here. docs/adding-a-family.md says how to
write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ropewalk.base.json import Section
from ropewalk.families.program import Activation
from ropewalk.families.recorder import Mixture
from ropewalk.families.tables import LLAMA_KIND, LayerKind, NormEntry, Rows, norm


class Windows(Enum):
    """Which layers of a family use sliding-window attention."""

    NONE = "none"
    ALL = "every layer, if `sliding_window` is set"
    SOME = "those that `layer_types` or `max_window_layers` name, with `use_sliding_window`"
    MOST = "all but every n-th, or those that `layer_types` names"


@dataclass(frozen=True, slots=True)
class Flag:
    """Something that a model has or has not: as the key of config.json says, or (key None) as all of the family do."""

    name: str
    key: str | None = None
    default: bool = True


@dataclass(frozen=True, slots=True)
class Key:
    """A number of config.json, and what it is where the key is absent."""

    name: str
    default: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Factors of a model, all applied in float32, and the soft caps c of c * tanh(x / c).

    attention: of the products of queries and keys. residual: of what attention and MLP add to the residual stream.
    """

    attention: float
    embeddings: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    attention_cap: float | None = None
    logits_cap: float | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the scales of a family may follow from."""

    hidden: int
    head_dim: int


def plain_scales(config: Section, sizes: Sizes) -> Scales:
    """1 / sqrt(D), and nothing else."""
    return Scales(attention=sizes.head_dim**-0.5)


ONE_KIND = "decoder"
KindsOf = Callable[[Section, int], Sequence[str]]  # config.json, number of layers -> the kind of each


def one_kind(config: Section, num_layers: int) -> Sequence[str]:
    """Of a family whose layers are all alike."""
    return (ONE_KIND,) * num_layers


@dataclass(frozen=True, slots=True)
class Names:
    """What the tensors outside of the layers are called, and what the names of layers begin with."""

    embeddings: str = "model.embed_tokens"
    layers: str = "model.layers."
    head: str = "lm_head"
    final_norm: tuple[NormEntry, ...] = norm("norm", "model.norm", "hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. Defaults for absent keys are those of transformers 5.23 (its `configuration_*.py`).

    name, architectures: `model_type` and the class names in config.json.
    num_kv_heads: None: as many as query heads. head_dim: None: hidden_size / num_attention_heads.
    heads_divide_hidden: hidden_size must be a multiple of the heads even where head_dim is given.
    fixed_heads: there is a key/value head for each query head, whatever `num_key_value_heads` and `head_dim` say.
    tied: the head is the embedding table where `tie_word_embeddings` is absent.
    flags: which biases and norms there are. scales: the factors, read from config.json.
    eps: of all norms. centred: norms are LayerNorm instead of RMSNorm.
    activations, activation: the keys for it, the first that is there counts, and the name where none is.
    renamed: names of activations that mean another one in this family.
    windows, window: which layers have one, and `sliding_window` where that is absent. window_key: for Windows.ALL, a
        key without which no layer has one. full_every, full_key: for Windows.MOST, after how many layers one sees
        everything, and the key for that number.
    theta, partial_rotary: of RoPE. rope_types: names of its types that mean another one in this family.
    sliding_theta: layers with a window have a table of their own, never scaled.
    full_layers_rotate: False: layers without a window have no RoPE at all.
    extended_in_the_wild: fine-tunes may declare a longer context by other means than a scaling object
        (rope/decision.py).
    mixture: the experts of the layers whose kind has some, as config.json says.
    kinds, kinds_of: the kinds of layers by name, and which layer is of which.
    """

    name: str
    architectures: tuple[str, ...]
    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    heads_divide_hidden: bool = False
    fixed_heads: bool = False
    tied: bool = False
    flags: tuple[Flag, ...] = ()
    scales: Callable[[Section, Sizes], Scales] = plain_scales
    eps: Key = Key("rms_norm_eps", 1e-6)
    centred: bool = False
    activations: tuple[str, ...] = ("hidden_act",)
    activation: Activation = Activation.SILU
    renamed: Mapping[str, Activation] = field(default_factory=dict)
    windows: Windows = Windows.NONE
    window: int | None = 4096
    window_key: str | None = None
    full_every: int = 0
    full_key: str | None = None
    theta: Key = Key("rope_theta", 10000.0)
    partial_rotary: Key | None = None
    rope_types: Mapping[str, str] = field(default_factory=dict)
    sliding_theta: Key | None = None
    full_layers_rotate: bool = True
    extended_in_the_wild: bool = False
    names: Names = Names()
    mixture: Callable[[Section], Mixture] | None = None
    kinds: Mapping[str, LayerKind] = field(default_factory=lambda: {ONE_KIND: LLAMA_KIND})
    kinds_of: KindsOf = one_kind

    @property
    def pairs(self) -> bool:
        """True if its queries and keys are stored in another order of features, which depends on the rotated part."""
        entries = (entry for kind in self.kinds.values() for entry in kind.linears)
        return any(entry.rows is Rows.PAIRS for entry in entries)

    def layer_prefix(self, index: int) -> str:
        """The beginning of the names of layer `index`."""
        return f"{self.names.layers}{index}."
