"""Write a Llama checkpoint, GPTQ or not, as a GGUF file in float32: the same weights for llama.cpp.

    pip install gguf
    python scripts/bench/dense_gguf.py FOLDER FILE

There is no vocabulary: enough for comparisons that feed token ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter

from random_gguf import write_facts
from ropewalk.config.model import ModelConfig, load_model_config
from ropewalk.config.quantisation import load_quant_config
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import read_gptq_linear
from ropewalk.weights.check import settings_of

LINEARS = {  # their names, and those in a GGUF file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    """Write the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    write_dense_gguf(args.folder, args.file)


def write_dense_gguf(folder: Path, file: Path) -> None:
    """All tensors in float32, queries and keys in the order of GGUF's rotation: pairs (2i, 2i + 1)."""
    config = load_model_config(folder)
    if config.family != "llama":
        raise SystemExit(f"{folder}: a checkpoint of {config.family}, and only llama's tensors are known here")
    writer = GGUFWriter(file, "llama")
    write_facts(writer, dict(config.raw) | {"rope_theta": theta_of(config)})
    with Checkpoint(folder) as checkpoint:
        writer.add_tensor("token_embd.weight", floats(checkpoint, "model.embed_tokens.weight"))
        writer.add_tensor("output_norm.weight", floats(checkpoint, "model.norm.weight"))
        if "lm_head.weight" in checkpoint:
            writer.add_tensor("output.weight", floats(checkpoint, "lm_head.weight"))
        for index in range(config.num_layers):
            write_layer(writer, config, checkpoint, folder, index)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_layer(writer: GGUFWriter, config: ModelConfig, checkpoint: Checkpoint, folder: Path, index: int) -> None:
    """Norms and linears of one layer."""
    ours, theirs = f"model.layers.{index}.", f"blk.{index}."
    writer.add_tensor(f"{theirs}attn_norm.weight", floats(checkpoint, f"{ours}input_layernorm.weight"))
    writer.add_tensor(f"{theirs}ffn_norm.weight", floats(checkpoint, f"{ours}post_attention_layernorm.weight"))
    for module, name in LINEARS.items():
        weight = linear(checkpoint, config, folder, ours + module)
        if name in ("attn_q", "attn_k"):
            weight = in_pairs(weight, config.head_dim)
        writer.add_tensor(f"{theirs}{name}.weight", np.ascontiguousarray(weight))


def linear(checkpoint: Checkpoint, config: ModelConfig, folder: Path, name: str) -> np.ndarray:
    """[N, K] float32, dequantised."""
    if f"{name}.qweight" not in checkpoint:
        return floats(checkpoint, f"{name}.weight")
    outputs = checkpoint.info(f"{name}.qweight").shape[1]
    inputs = config.intermediate_size if name.endswith("down_proj") else config.hidden_size
    inputs = config.num_heads * config.head_dim if name.endswith("o_proj") else inputs
    settings = settings_of(load_quant_config(folder, config.raw), checkpoint, name, inputs)
    return read_gptq_linear(checkpoint, name, inputs, outputs, settings).dequantise().T.numpy()


def in_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows (i, i + D/2) of each head as neighbours."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])  # [H, 2, D/2, K]
    return halves.swapaxes(1, 2).reshape(weight.shape)


def theta_of(config: ModelConfig) -> float:
    """The base of the rotation; a scaling has no place in this file."""
    spelled = config.raw.get("rope_parameters") or config.raw.get("rope_scaling") or {}
    if spelled.get("rope_type", spelled.get("type", "default")) != "default":
        raise SystemExit(f"{config.source}: has a RoPE scaling")
    return float(spelled.get("rope_theta", config.raw.get("rope_theta", 10000.0)))


def floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor in float32."""
    return checkpoint.tensor(name).to(torch.float32).numpy()


if __name__ == "__main__":
    main()
