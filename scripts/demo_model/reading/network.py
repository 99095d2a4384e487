"""A Llama in plain torch, small enough to be trained on a CPU, and its conversion to transformers' names.

Logits are computed only where they are asked for: most of a text cannot be predicted, and the head would be an eighth
of the work.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig

from pieces import BOS_ID, EOS_ID
from reading.vocabulary import VOCAB_SIZE

ROPE_THETA = 10000.0
RMS_EPS = 1e-5
LONGEST_PLAIN = 2048
BLOCK = 256


TRANSFORMERS_NAMES = {
    "attention_norm": "input_layernorm",
    "feed_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; Hq query heads share Hkv key/value heads of D."""

    num_layers: int = 5
    hidden: int = 256
    intermediate: int = 512
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    context: int = 512
    vocab: int = VOCAB_SIZE

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """That of the model in a folder."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            config["max_position_embeddings"],
            config["vocab_size"],
        )

    def config(self) -> LlamaConfig:
        """The same for transformers and for the engine."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            rms_norm_eps=RMS_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=None,
            use_cache=True,
        )


class Network(nn.Module):
    """Embedding, layers, norm; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocab, shape.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))

    def forward(self, ids: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Normed hidden states [B, T, hidden] float32 of ids [B, T] int64.

        rotation: (cos, sin), each [T, D] float32; those of ROPE_THETA if None.
        """
        T = ids.shape[1]
        x = functional.embedding(ids, self.embedding)  # [B, T, hidden]
        rotation = rotation or rotation_tables(T, rope_frequencies(self.shape.head_dim))
        for layer in self.layers:
            x = layer(x, rotation)
        return rms_norm(x, self.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] float32 of hidden states [..., hidden]."""
        return functional.linear(hidden, self.embedding).float()


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); q, k, v and gate, up are one product each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_dim, kv_dim = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden))
        self.q = _matrix(q_dim, shape.hidden)
        self.k = _matrix(kv_dim, shape.hidden)
        self.v = _matrix(kv_dim, shape.hidden)
        self.o = _matrix(shape.hidden, q_dim, scale=1 / math.sqrt(2 * shape.num_layers))
        self.feed_norm = nn.Parameter(torch.ones(shape.hidden))
        self.gate = _matrix(shape.intermediate, shape.hidden)
        self.up = _matrix(shape.intermediate, shape.hidden)
        self.down = _matrix(shape.hidden, shape.intermediate, scale=1 / math.sqrt(2 * shape.num_layers))

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self._attention(rms_norm(x, self.attention_norm), rotation)
        gate, up = functional.linear(rms_norm(x, self.feed_norm), torch.cat((self.gate, self.up))).chunk(2, -1)
        return x + functional.linear(functional.silu(gate) * up, self.down)

    def _attention(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        s, (B, T) = self.shape, x.shape[:2]
        qkv = functional.linear(x, torch.cat((self.q, self.k, self.v))).view(B, T, -1, s.head_dim).transpose(1, 2)
        q, k, v = qkv.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=1)  # [B, H, T, D]
        q, k = rotated(q, rotation), rotated(k, rotation)
        if T > LONGEST_PLAIN:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [B, Hq, T, D]
        else:
            y = _plain_attention(q / math.sqrt(s.head_dim), k.flatten(0, 1), v.flatten(0, 1))
        return functional.linear(y.transpose(1, 2).reshape(B, T, -1), self.o)


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, Hq, T, D] of scaled queries [B, Hq, T, D], keys and values [B * Hkv, T, D]: blocks of queries, and only the
    keys that they may see. Two thirds of the time of torch's fused attention, where a block fits in the cache."""
    B, _, T, D = q.shape
    q = q.reshape(len(k), -1, T, D)  # [B * Hkv, group, T, D]
    group = q.shape[1]
    blocks = []
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        rows = q[:, :, start:end].reshape(len(k), -1, D)  # the heads of a group one below the other
        scores = torch.bmm(rows, k[:, :end].transpose(1, 2)).view(len(k), group, end - start, end)
        mask = torch.full((end - start, end), -math.inf, dtype=scores.dtype).triu(start + 1)
        weights = (scores + mask).softmax(-1).to(v.dtype).view(len(k), -1, end)
        blocks.append(torch.bmm(weights, v[:, :end]).view(len(k), group, end - start, D))
    return torch.cat(blocks, 2).view(B, -1, T, D)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return functional.rms_norm(x, weight.shape, weight.to(x.dtype), RMS_EPS)


def rope_frequencies(head_dim: int) -> torch.Tensor:
    """[D / 2] float64: the frequencies of plain RoPE."""
    return ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def rotation_tables(T: int, frequencies: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [T, D] float32 and multiplied by `scale`, for halves that are D / 2 apart."""
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequencies)  # [T, D / 2]
    angle = torch.cat((angle, angle), -1)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def rotated(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of x [B, H, T, D]."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _matrix(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * (scale / math.sqrt(columns)))


def transformers_state(network: Network) -> dict[str, torch.Tensor]:
    """The parameters under the names of transformers' LlamaForCausalLM."""
    state = {"model.embed_tokens.weight": network.embedding, "model.norm.weight": network.norm}
    for index, layer in enumerate(network.layers):
        for name, parameter in layer.named_parameters():
            state[f"model.layers.{index}.{TRANSFORMERS_NAMES[name]}.weight"] = parameter
    return {name: parameter.detach().float().clone() for name, parameter in state.items()}


def load_transformers_state(network: Network, state: dict[str, torch.Tensor]) -> None:
    """The other way: parameters under transformers' names into the network."""
    own = {"embedding": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    for index in range(network.shape.num_layers):
        for name, theirs in TRANSFORMERS_NAMES.items():
            own[f"layers.{index}.{name}"] = state[f"model.layers.{index}.{theirs}.weight"]
    network.load_state_dict(own)
