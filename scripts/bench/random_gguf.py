"""Write a GGUF file of a real model's shape with random weights, for comparing speeds with llama.cpp.

    pip install gguf
    python scripts/bench/random_gguf.py FILE --shape 1.1b

The same shapes as random_checkpoint.py, in the types that llama.cpp's own Q4_0 quantisation chooses: Q4_0 for the
embeddings, all linears and the experts of a mixture (4.5 bits a weight, blocks of 32), Q6_K for the head, float32 for
norms and routers. There is no vocabulary: enough for benchmarks that feed token ids.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from tqdm import tqdm

from random_checkpoint import SHAPES, model_config

CODES_4_BIT = 4.2  # standard deviation of codes of 4 bits without a mean, as random_checkpoint.py has them, and why
CODES_6_BIT = 18.5  # and of 6 bits
SUB_SCALE = 32  # of each 16 weights of a block of Q6_K
ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}  # GGUF's names of families


def main() -> None:
    """Write the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    args = parser.parse_args()
    config = model_config(args.shape, 128, False, args.layers)
    writer = GGUFWriter(args.file, ARCHITECTURES[config["model_type"]])
    write_facts(writer, config)
    write_tensors(writer, config, np.random.default_rng(0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def write_facts(writer: GGUFWriter, config: dict) -> None:
    """What config.json says, under GGUF's names."""
    head_dim = head_dim_of(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")


def write_tensors(writer: GGUFWriter, config: dict, rng: np.random.Generator) -> None:
    """All tensors: [outputs, inputs], rows of blocks; those of experts [experts, outputs, inputs]."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    linears = {**attention_linears(config), **feed_forward_linears(config)}
    writer.add_tensor("token_embd.weight", q4_0(rng, vocab, hidden, 1.0), raw_dtype=GGMLQuantizationType.Q4_0)
    for layer in tqdm(range(config["num_hidden_layers"]), desc="making", unit="layer"):
        for name, data in float_tensors(config, rng).items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", data)
        for name, (*experts, outputs, inputs) in linears.items():
            data = q4_0(rng, math.prod(experts) * outputs, inputs, inputs**-0.5).reshape(*experts, outputs, -1)
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    writer.add_tensor("output.weight", q6_k(rng, vocab, hidden, hidden**-0.5), raw_dtype=GGMLQuantizationType.Q6_K)


def head_dim_of(config: dict) -> int:
    """Numbers of a head."""
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


def attention_linears(config: dict) -> dict[str, tuple[int, ...]]:
    """(outputs, inputs) by GGUF's names."""
    hidden, head_dim = config["hidden_size"], head_dim_of(config)
    queries, kv = head_dim * config["num_attention_heads"], head_dim * config["num_key_value_heads"]
    return {
        "attn_q": (queries, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, queries),
    }


def feed_forward_linears(config: dict) -> dict[str, tuple[int, ...]]:
    """(outputs, inputs) by GGUF's names; of a mixture (experts, outputs, inputs)."""
    hidden, inner, experts, ending = config["hidden_size"], config["intermediate_size"], (), ""
    if "num_experts" in config:
        inner, experts, ending = config["moe_intermediate_size"], (config["num_experts"],), "_exps"
    return {
        f"ffn_gate{ending}": (*experts, inner, hidden),
        f"ffn_up{ending}": (*experts, inner, hidden),
        f"ffn_down{ending}": (*experts, hidden, inner),
    }


def float_tensors(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a layer has in float32: norms, and the router of a mixture."""
    hidden = config["hidden_size"]
    tensors = {name: np.ones(hidden, dtype=np.float32) for name in ("attn_norm", "ffn_norm")}
    if "num_experts" in config:
        heads = np.ones(head_dim_of(config), dtype=np.float32)
        router = rng.standard_normal((config["num_experts"], hidden), dtype=np.float32) * np.float32(hidden**-0.5)
        tensors |= {"attn_q_norm": heads, "attn_k_norm": heads, "ffn_gate_inp": router}
    return tensors


def q4_0(rng: np.random.Generator, outputs: int, inputs: int, size: float) -> np.ndarray:
    """Random blocks of 32 weights of standard deviation `size`: a float16 scale and 16 bytes of codes."""
    blocks = np.empty((outputs, inputs // 32, 18), dtype=np.uint8)
    scales = size / CODES_4_BIT * rng.uniform(0.5, 1.5, blocks.shape[:2])
    blocks[..., :2] = scales.astype(np.float16)[..., None].view(np.uint8)
    codes = rng.integers(0, 256, (*blocks.shape[:2], 16), dtype=np.uint8)
    some = codes | codes >> 1 | codes >> 2 | codes >> 3
    blocks[..., 2:] = codes | (~some & 0x11) << 3
    return blocks.reshape(outputs, -1)


def q6_k(rng: np.random.Generator, outputs: int, inputs: int, size: float) -> np.ndarray:
    """Random blocks of 256 weights: 192 bytes of codes, 16 scales of 8 bits, and a float16 scale of those."""
    blocks = np.empty((outputs, inputs // 256, 210), dtype=np.uint8)
    blocks[..., :192] = rng.integers(0, 256, (*blocks.shape[:2], 192), dtype=np.uint8)
    blocks[..., 192:208] = SUB_SCALE
    scale = np.full((*blocks.shape[:2], 1), size / CODES_6_BIT / SUB_SCALE, dtype=np.float16)
    blocks[..., 208:] = scale.view(np.uint8)
    return blocks.reshape(outputs, -1)


if __name__ == "__main__":
    main()
