"""A small random model of any family, made and saved by transformers: its spelling of config.json, its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptq_writer import Kind, quantised_linear

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_model(folder: Path, family: str, seed: int = 0, **settings: Any) -> torch.nn.Module:
    """Save a model of random float32 weights with these settings of its config.json besides TINY; the model itself."""
    config = transformers.AutoConfig.for_model(family, **{**TINY, **settings}, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.data = 0.1 * noise
        elif "norm" in name.rpartition(".")[0].rpartition(".")[2] or ".norms." in name:
            parameter.data = parameter.data + 0.1 * noise  # around 1, or around 0 where 1 is added to it
        else:
            parameter.data = noise / (1 if "embed" in name else parameter.shape[1] ** 0.5)
    model.tie_weights()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model


def quantise_model(folder: Path, seed: int = 0) -> None:
    """Put random GPTQ weights, 4 bits in groups of 32 with act-order, in the place of the linears of all layers."""
    rng, path = np.random.default_rng(seed), folder / "model.safetensors"
    tensors, kind = load_file(path), Kind(desc_act=True, sym=False)
    for name, tensor in list(tensors.items()):
        module, _, part = name.rpartition(".")
        if part == "weight" and tensor.ndim == 2 and ".layers." in name and "norm" not in module:
            stored, _ = quantised_linear(module, tensor.shape[1], tensor.shape[0], kind, rng)
            tensors |= stored
            del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "sym": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[T, V] float32."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]
