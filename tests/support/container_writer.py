"""Writes AWQ and compressed-tensors modules and checkpoints, with the exact float weights as an oracle.

Packing is spelled out number by number in numpy, from the layouts' definitions; nothing is shared with the reader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from gptq_writer import Kind, group_index, linears_of, model_config, plain_tensors, quantise

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output 8 c + AWQ_ORDER[i] has bits 4 i of word c
AWQ_CONFIG: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """[R, N] codes of 4 bits -> [R, N/8] int32."""
    rows, columns = codes.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for row in range(rows):
        for word in range(columns // 8):
            for field, column in enumerate(AWQ_ORDER):
                words[row, word] |= np.uint32(int(codes[row, 8 * word + column]) << (4 * field))
    return words.view(np.int32)


def pack_fields(codes: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] unsigned fields -> [R, ceil(C * bits / 32)] int32, the first in the lowest bits; the end is zeros."""
    per_word = 32 // bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // per_word) * per_word), np.uint64)
    padded[:, : codes.shape[1]] = codes
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    words = (padded.reshape(len(padded), -1, per_word) << shifts).sum(axis=2)
    return words.astype(np.uint32).view(np.int32)


def compressed_config(kind: Kind, **weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it; `weights` replaces keys of the one group."""
    channel = kind.group_size == -1
    group = {
        "num_bits": kind.bits,
        "type": "int",
        "symmetric": kind.sym,
        "group_size": None if channel else kind.group_size,
        "strategy": "channel" if channel else "group",
        "dynamic": False,
        "actorder": "group" if kind.desc_act else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": group | weights, "input_activations": None},
        },
        "ignore": ["lm_head"],
    }


def awq_linear(name: str, codes: np.ndarray, scales: torch.Tensor, zeros: np.ndarray) -> dict[str, torch.Tensor]:
    """codes [K, N], scales [G, N], zeros [G, N]."""
    return {
        f"{name}.qweight": torch.from_numpy(pack_awq(codes)),
        f"{name}.qzeros": torch.from_numpy(pack_awq(zeros)),
        f"{name}.scales": scales,
    }


def compressed_linear(
    name: str, codes: np.ndarray, scales: torch.Tensor, zeros: np.ndarray, g_idx: np.ndarray, kind: Kind
) -> dict[str, torch.Tensor]:
    """codes [K, N], scales [G, N], zeros [G, N], g_idx [K]; kind.era 3: zero points as bytes."""
    tensors = {
        f"{name}.weight_packed": torch.from_numpy(pack_fields(codes.T, kind.bits)),
        f"{name}.weight_scale": scales.T.contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.T.shape),
    }
    if not kind.sym and kind.era == 3:
        tensors[f"{name}.weight_zero_point"] = torch.from_numpy(zeros.T - (1 << (kind.bits - 1))).to(torch.int8)
    elif not kind.sym:
        packed = pack_fields(zeros, kind.bits).T  # [N * bits / 32, G]: packed down the outputs
        tensors[f"{name}.weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(packed))
    if kind.desc_act:
        tensors[f"{name}.weight_g_idx"] = torch.from_numpy(g_idx).int()
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def random_linear(
    name: str, in_features: int, out_features: int, container: str, kind: Kind, rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one linear in "awq" or "compressed-tensors", and its float32 weight [N, K]."""
    weight = rng.standard_normal((in_features, out_features)).astype(np.float32) / np.sqrt(in_features)
    g_idx = group_index(in_features, kind, rng)
    codes, scales, zeros = quantise(weight, g_idx, kind)
    exact = scales.float()[g_idx] * torch.from_numpy(codes - zeros[g_idx]).float()  # [K, N]
    if container == "awq":
        return awq_linear(name, codes, scales, zeros), exact.T.contiguous()
    return compressed_linear(name, codes, scales, zeros, g_idx, kind), exact.T.contiguous()


def write_container(
    folder: Path,
    container: str,
    kind: Kind | None = None,
    config_overrides: dict[str, Any] | None = None,
    declaration: dict[str, Any] | None = None,
    declared_in: str = "config.json",
    family: str = "llama",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Write a tiny checkpoint; returns the exact float32 state dict. `declaration` replaces the usual one."""
    kind = kind or Kind()
    rng = np.random.default_rng(seed)
    config = model_config(family, config_overrides)
    tensors, exact = plain_tensors(config, torch.float16, rng)
    for name, K, N, has_bias in linears_of(config):
        stored, exact[f"{name}.weight"] = random_linear(name, K, N, container, kind, rng)
        tensors |= stored
        if has_bias:
            bias = torch.from_numpy(rng.standard_normal(N)).half()
            tensors[f"{name}.bias"], exact[f"{name}.bias"] = bias, bias.float()
    if not config["tie_word_embeddings"]:
        head = torch.from_numpy(rng.standard_normal((config["vocab_size"], config["hidden_size"]))).half()
        tensors["lm_head.weight"], exact["lm_head.weight"] = head, head.float()
    if declaration is None:
        awq = AWQ_CONFIG | {"group_size": kind.group_size, "zero_point": not kind.sym}
        declaration = awq if container == "awq" else compressed_config(kind)
    folder.mkdir(parents=True, exist_ok=True)
    if declared_in == "config.json":
        config["quantization_config"] = declaration
    else:
        (folder / declared_in).write_text(json.dumps(declaration))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return exact
