"""Reading all weights of a folder, to compare them with what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ropewalk.base.errors import CheckpointError
from ropewalk.config.model import ModelConfig, load_model_config
from ropewalk.config.quantisation import QuantConfig, load_quant_config
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import DenseLinear, GptqLinear
from ropewalk.weights.read import LayerWeights, check_tensors, read_embeddings, read_head, read_layer

FIELDS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


NORMS = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


Q0 = "model.layers.0.self_attn.q_proj"


CONFIG_FILES = st.sampled_from([(), ("config.json",)])


def opened(folder: Path) -> tuple[ModelConfig, QuantConfig | None, Checkpoint]:
    config = load_model_config(folder)
    quant = load_quant_config(folder, config.raw)
    return config, quant, Checkpoint(folder, quant.model_file_base_name if quant else None)


def weight_of(linear: GptqLinear | DenseLinear) -> torch.Tensor:
    """[N, K] float32."""
    return linear.weight.float() if isinstance(linear, DenseLinear) else linear.dequantise().T


def read_state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """All that tensors.py reads, under transformers' names, in float32. A shared head is left out."""
    config, quant, checkpoint = opened(folder)
    with checkpoint:
        check_tensors(config, quant, checkpoint)
        embeddings = read_embeddings(config, checkpoint)
        norm, head = read_head(config, quant, checkpoint, embeddings)
        state = {"model.embed_tokens.weight": embeddings.float(), "model.norm.weight": norm["norm"]}
        if not (isinstance(head, DenseLinear) and head.weight is embeddings):
            state["lm_head.weight"] = weight_of(head)
        for index in range(config.num_layers):
            layer = read_layer(config, quant, checkpoint, index)
            for field, name in NORMS.items():
                if field in layer.norms:
                    state[f"model.layers.{index}.{name}.weight"] = layer.norms[field]
            for field, name in FIELDS.items():
                linear = layer.linears[field]
                state[f"model.layers.{index}.{name}.weight"] = weight_of(linear)
                if linear.bias is not None:
                    state[f"model.layers.{index}.{name}.bias"] = linear.bias
    return state


def assert_reads_exactly(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    state = read_state_dict(folder)
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def first_layer(folder: Path) -> LayerWeights:
    config, quant, checkpoint = opened(folder)
    check_tensors(config, quant, checkpoint)
    layer = read_layer(config, quant, checkpoint, 0)
    return replace(layer, linears=dict(layer.linears))  # reads them


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of model.safetensors; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def refusal(folder: Path) -> str:
    config, quant, checkpoint = opened(folder)
    with pytest.raises(CheckpointError) as caught:
        check_tensors(config, quant, checkpoint)
    return str(caught.value)
