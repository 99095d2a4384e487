"""Write a GPTQ checkpoint of a real model's shape with random packed weights: arithmetic and memory, no language.

    python scripts/bench/random_checkpoint.py FOLDER --shape 1.1b [--bits 4] [--group-size 128] [--act-order]

Codes are random words and scales are sized so that activations keep a natural magnitude through the layers. Weights
have no mean: with one of half a step, as all 16 codes around 8 have it, every row leaned the same way after a few
layers, and the routers of a mixture sent all of them to the same experts. The tokenizer has a token for each byte, and
for every other id a word made up for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

SHAPES = {
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "tiny": {  # to try a script out
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "tiny-moe": {  # the same, as a mixture
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
    },
}
LAYERS_PER_SHARD = 4
BITS = (2, 3, 4, 8)


def main() -> None:
    """Write the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--bits", type=int, choices=BITS, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    args = parser.parse_args()
    write_random_checkpoint(args.folder, args.shape, args.group_size, args.act_order, args.layers, args.bits)


def write_random_checkpoint(
    folder: Path,
    shape: str,
    group_size: int = 128,
    act_order: bool = False,
    num_layers: int | None = None,
    bits: int = 4,
) -> None:
    """Write config.json, the shards and their index to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(shape, group_size, act_order, num_layers, bits)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    num_layers = config["num_hidden_layers"]
    starts = range(0, num_layers, LAYERS_PER_SHARD)
    weight_map, total = {}, 0
    for shard, first in enumerate(tqdm(starts, desc="writing", unit="shard"), start=1):
        tensors = outer_tensors(config, generator) if first == 0 else {}
        for layer in range(first, min(first + LAYERS_PER_SHARD, num_layers)):
            tensors |= layer_tensors(config, layer, group_size, act_order, generator, bits)
        name = f"model-{shard:05d}-of-{len(starts):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, config["vocab_size"])


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """tokenizer.json: <unk>, <s>, </s>, the 256 bytes, and a word for every other id, so that each token is text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *alphabet]
    names += [f"\u0120w{number}" for number in range(len(names), vocab_size)]  # U+0120 stands for a space
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def model_config(shape: str, group_size: int, act_order: bool, num_layers: int | None, bits: int = 4) -> dict:
    """The config.json of a Llama of this shape, or of another family that the shape names."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPES[shape],
        "quantization_config": {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": act_order,
            "sym": True,
            "checkpoint_format": "gptq",
        },
    }
    return config if num_layers is None else {**config, "num_hidden_layers": num_layers}


def outer_tensors(config: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Embeddings, head and final norm."""
    size = (config["vocab_size"], config["hidden_size"])
    return {
        "model.embed_tokens.weight": torch.randn(size, generator=generator).half(),
        "lm_head.weight": (torch.randn(size, generator=generator) * config["hidden_size"] ** -0.5).half(),
        "model.norm.weight": torch.ones(config["hidden_size"], dtype=torch.float16),
    }


def layer_tensors(
    config: dict, layer: int, group_size: int, act_order: bool, generator: torch.Generator, bits: int
) -> dict[str, torch.Tensor]:
    """One decoder layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, kv = head_dim * config["num_attention_heads"], head_dim * config["num_key_value_heads"]
    linears = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (queries, hidden),
        **mlp_linears(config, hidden, inner),
    }
    groups = {rows: group_index(rows, group_size, act_order, generator) for rows, _ in linears.values()}
    prefix = f"model.layers.{layer}."
    tensors = {
        f"{prefix}{norm}_layernorm.weight": torch.ones(hidden, dtype=torch.float16)
        for norm in ("input", "post_attention")
    }
    if "num_experts" in config:
        router = torch.randn((config["num_experts"], hidden), generator=generator) * hidden**-0.5
        tensors[f"{prefix}mlp.gate.weight"] = router.half()
        tensors |= {
            f"{prefix}self_attn.{norm}_norm.weight": torch.ones(head_dim, dtype=torch.float16) for norm in ("q", "k")
        }
    for name, (rows, columns) in linears.items():
        tensors |= gptq_tensors(prefix + name, rows, columns, groups[rows], group_size, generator, bits)
    return tensors


def mlp_linears(config: dict, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """Input and output features by name, of one block or of all experts."""
    prefixes = ["mlp."]
    if "num_experts" in config:
        inner = config["moe_intermediate_size"]
        prefixes = [f"mlp.experts.{expert}." for expert in range(config["num_experts"])]
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {prefix + name: size for prefix in prefixes for name, size in sizes.items()}


def group_index(rows: int, group_size: int, act_order: bool, generator: torch.Generator) -> torch.Tensor:
    """g_idx: sequential, or shuffled as act-order leaves it."""
    index = (torch.arange(rows) // group_size).int()
    return index[torch.randperm(rows, generator=generator)] if act_order else index


def gptq_tensors(
    name: str, rows: int, columns: int, index: torch.Tensor, group_size: int, generator: torch.Generator, bits: int
) -> dict[str, torch.Tensor]:
    """One symmetric linear; the scales undo the standard deviation of its codes (4.2 with 4 bits)."""
    groups = -(-rows // group_size)
    spread = 0.5 + torch.rand((groups, columns), generator=generator)
    middle = 1 << bits - 1
    deviation = (2 * sum(i * i for i in range(middle)) / (1 << bits)) ** 0.5
    codes = torch.randint(0, 1 << bits, (rows // 32, 32, columns), dtype=torch.uint8, generator=generator)
    return {
        f"{name}.qweight": packed(codes.masked_fill_(codes == 0, middle), bits),  # so the mean is the middle
        f"{name}.qzeros": packed(torch.full((columns // 32, 32, groups), middle - 1), bits).T.contiguous(),
        f"{name}.scales": (spread * rows**-0.5 / deviation).half(),
        f"{name}.g_idx": index.clone(),
    }


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[blocks, 32, N] codes -> [blocks * bits, N] int32, a stream of bits down each column."""
    words = torch.zeros((codes.shape[0], bits, codes.shape[2]), dtype=torch.int64)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[:, word] |= codes[:, place].long() << shift
        if shift + bits > 32:
            words[:, word + 1] |= codes[:, place].long() >> 32 - shift
    return words.flatten(0, 1).to(torch.int32)  # the lower half of each


if __name__ == "__main__":
    main()
