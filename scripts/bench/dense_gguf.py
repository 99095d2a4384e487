"""Write a Llama checkpoint, quantised or not, as a GGUF file in float32: the same weights for llama.cpp.

    pip install gguf
    python scripts/bench/dense_gguf.py FOLDER FILE

There is no vocabulary: enough for comparisons that feed token ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from random_gguf import write_facts
from ropewalk.config.model import load_model_config
from ropewalk.config.quantisation import load_quant_config
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import DenseLinear, GptqLinear
from ropewalk.rope.methods import NoScaling
from ropewalk.rope.rope import resolve_rope
from ropewalk.weights.read import LayerWeights, check_tensors, read_embeddings, read_head, read_layer

LINEARS = {  # their names in the family's table, and those in a GGUF file
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
NORMS = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}


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
    rope = resolve_rope(config.raw, source=config.source)
    if config.family != "llama" or not isinstance(rope.method, NoScaling):
        raise SystemExit(
            f"{config.source}: {config.family}, {rope.method.name}: only a llama without scaling is written"
        )
    quant = load_quant_config(folder, config.raw)
    writer = GGUFWriter(file, "llama")
    write_facts(writer, dict(config.raw) | {"rope_theta": rope.theta})
    with Checkpoint(folder, quant.model_file_base_name if quant else None) as checkpoint:
        check_tensors(config, quant, checkpoint)
        embeddings = read_embeddings(config, checkpoint)
        final_norm, head = read_head(config, quant, checkpoint, embeddings)
        writer.add_tensor("token_embd.weight", embeddings.float().numpy())
        writer.add_tensor("output_norm.weight", final_norm["norm"].numpy())
        if not config.tie_word_embeddings:
            writer.add_tensor("output.weight", floats(head))
        for index in range(config.num_layers):
            write_layer(writer, f"blk.{index}.", read_layer(config, quant, checkpoint, index), config.head_dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_layer(writer: GGUFWriter, prefix: str, weights: LayerWeights, head_dim: int) -> None:
    """Norms and linears of one layer."""
    for name, theirs in NORMS.items():
        writer.add_tensor(f"{prefix}{theirs}.weight", weights.norms[name].numpy())
    for name, theirs in LINEARS.items():
        weight = floats(weights.linears[name])
        if name in ("q", "k"):
            weight = in_pairs(weight, head_dim)
        writer.add_tensor(f"{prefix}{theirs}.weight", np.ascontiguousarray(weight))


def floats(linear: GptqLinear | DenseLinear) -> np.ndarray:
    """[N, K] float32, dequantised."""
    return linear.weight.float().numpy() if isinstance(linear, DenseLinear) else linear.dequantise().T.numpy()


def in_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows (i, i + D/2) of each head as neighbours."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])  # [H, 2, D/2, K]
    return halves.swapaxes(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    main()
