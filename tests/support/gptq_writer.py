"""Writes tiny GPTQ (or dense) checkpoint folders of every kind, with the exact float weights as an oracle.

`write_checkpoint` is what tests call. Nothing here shares code with the reader: packing goes through explicit bit
arrays (`numpy.packbits`), so a mistake in the reader cannot be repeated here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

# Bit planes of the planar format: (width, offset in the code), in storage order.
PLANES = {3: ((2, 0), (1, 2)), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class Kind:
    """How the linears are stored; the arguments of `write_checkpoint` of the same names."""

    bits: int = 4
    group_size: int = 32
    desc_act: bool = False
    sym: bool = True
    format: str = "gptq"
    word_borrow: bool = False
    era: int = 4
    g_idx: str = "auto"
    bias: str = "none"
    scales_dtype: torch.dtype = torch.float16
    zero_point_zero: bool = False

    @property
    def planar(self) -> bool:
        return self.bits in (5, 6, 7) or (self.bits == 3 and self.format == "gptq_p")


def pack_rows(codes: np.ndarray, bits: int, planar: bool = False) -> np.ndarray:
    """uint codes [K, N] -> int32 words [K*bits/32, N]; a column is one little-endian bit stream (or bit planes)."""
    bit_array = (codes[:, :, None] >> np.arange(bits)) & 1  # [K, N, bits]
    if planar:
        blocks = bit_array.reshape(-1, 32, codes.shape[1], bits)  # [K/32, 32, N, bits]
        stream = np.concatenate(
            [
                blocks[..., low : low + width].transpose(2, 0, 1, 3).reshape(codes.shape[1], len(blocks), -1)
                for width, low in PLANES[bits]
            ],
            axis=2,
        ).reshape(codes.shape[1], -1)  # [N, K*bits]
    else:
        stream = bit_array.transpose(1, 0, 2).reshape(codes.shape[1], -1)  # [N, K*bits]
    packed = np.packbits(stream.astype(np.uint8), axis=1, bitorder="little")  # [N, K*bits/8]
    return np.ascontiguousarray(packed).view("<i4").T.copy()


def pack_columns(codes: np.ndarray, bits: int, planar: bool = False) -> np.ndarray:
    """uint codes [G, N] -> int32 words [G, N*bits/32]."""
    return np.ascontiguousarray(pack_rows(codes.T, bits, planar).T)


def pack_zeros(zeros: np.ndarray, kind: Kind) -> np.ndarray:
    """True zero points [G, N] -> int32 qzeros [G, N*bits/32] as the writer of this kind of file stores them."""
    if kind.planar or kind.format in ("gptq_v2", "gptq_p"):
        return pack_columns(zeros, kind.bits, kind.planar)
    if kind.word_borrow and kind.bits in (2, 4, 8):
        ones = sum(1 << shift for shift in range(0, 32, kind.bits))
        words = pack_columns(zeros, kind.bits).view(np.uint32)
        return (words - np.uint32(ones)).view(np.int32)
    return pack_columns((zeros - 1) % (1 << kind.bits), kind.bits)


def quantise(weight: np.ndarray, g_idx: np.ndarray, kind: Kind) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Round-to-nearest codes [K, N], scales [G, N] (of kind.scales_dtype) and zeros [G, N] of a float weight [K, N]."""
    top = (1 << kind.bits) - 1
    groups = int(g_idx.max()) + 1
    scales = np.empty((groups, weight.shape[1]), np.float32)
    zeros = np.empty((groups, weight.shape[1]), np.int64)
    for group in range(groups):
        rows = weight[g_idx == group]
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        if kind.sym:
            scales[group] = 2 * np.maximum(-low, high) / top
            zeros[group] = 1 << (kind.bits - 1)
        else:
            scales[group] = (high - low) / top
            zeros[group] = np.clip(np.rint(-low / scales[group]), 0, top)
    stored = torch.from_numpy(scales).to(kind.scales_dtype)
    codes = np.rint(weight / stored.float().numpy()[g_idx]) + zeros[g_idx]
    return np.clip(codes, 0, top).astype(np.int64), stored, zeros


def group_index(in_features: int, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """g_idx [K]: sequential, or permuted for act-order (static groups stay sequential: use desc_act=False)."""
    size = in_features if kind.group_size == -1 else kind.group_size
    sequential = np.arange(in_features) // size
    return sequential[rng.permutation(in_features)] if kind.desc_act else sequential


def quantised_linear(
    name: str,
    in_features: int,
    out_features: int,
    kind: Kind,
    rng: np.random.Generator,
    bias: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one quantised linear, and its float32 weight [N, K] = (scale * (code - zero)) transposed."""
    weight = rng.standard_normal((in_features, out_features)).astype(np.float32) / np.sqrt(in_features)
    if kind.zero_point_zero and not kind.sym:
        weight[:, ::5] = np.abs(weight[:, ::5])  # nothing below zero: the zero point is 0
    g_idx = group_index(in_features, kind, rng)
    codes, scales, zeros = quantise(weight, g_idx, kind)
    exact = scales.float()[g_idx] * torch.from_numpy(codes - zeros[g_idx]).float()  # [K, N]
    tensors = {f"{name}.qweight": torch.from_numpy(pack_rows(codes, kind.bits, kind.planar))}
    if kind.era == 0:
        tensors[f"{name}.scales"] = scales.float().T.contiguous()  # [N, 1]
        tensors[f"{name}.zeros"] = (scales.float() * torch.from_numpy(zeros)).T.contiguous()  # [N, 1], premultiplied
    else:
        tensors[f"{name}.qzeros"] = torch.from_numpy(pack_zeros(zeros, kind))
        tensors[f"{name}.scales"] = scales.float() if kind.era == 1 else scales
    stored_g_idx = stored_group_index(g_idx, kind)
    if stored_g_idx is not None:
        tensors[f"{name}.g_idx"] = stored_g_idx
    if bias is not None:
        tensors[f"{name}.bias"] = bias
    return tensors, exact.T.contiguous()


def stored_group_index(g_idx: np.ndarray, kind: Kind) -> torch.Tensor | None:
    choice = ("absent" if kind.era < 2 else "int32") if kind.g_idx == "auto" else kind.g_idx
    match choice:
        case "absent":
            return None
        case "int32":
            return torch.from_numpy(g_idx).int()
        case "int64":
            return torch.from_numpy(g_idx).long()
        case "zeros":
            return torch.zeros(len(g_idx), dtype=torch.int32)
        case "unset":
            return torch.full((len(g_idx),), -1, dtype=torch.int32)
    raise ValueError(f"g_idx={choice!r}")


def model_config(family: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """A tiny config.json of this family (hidden 64, 2 layers, 4 heads over 2, vocabulary 128), then the overrides."""
    config = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    if family == "mistral":
        config["sliding_window"] = 32
    if family == "qwen3":
        config["head_dim"] = 32
    return config | (overrides or {})


def linears_of(config: dict[str, Any]) -> list[tuple[str, int, int, bool]]:
    """(name, K, N, the architecture has a bias there) of every linear but lm_head."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    qwen2, declared = config["model_type"] == "qwen2", config.get("attention_bias", False)
    linears = []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        linears += [(f"{prefix}self_attn.q_proj", hidden, q, qwen2 or declared)]
        linears += [(f"{prefix}self_attn.{x}_proj", hidden, kv, qwen2 or declared) for x in "kv"]
        linears += [(f"{prefix}self_attn.o_proj", q, hidden, declared and not qwen2)]
        linears += [(f"{prefix}mlp.{x}_proj", hidden, inner, config.get("mlp_bias", False)) for x in ("gate", "up")]
        linears += [(f"{prefix}mlp.down_proj", inner, hidden, config.get("mlp_bias", False))]
    return linears


def quantization_config(kind: Kind, dynamic: dict[str, Any] | None, lm_head: bool, label: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "bits": kind.bits,
        "group_size": kind.group_size,
        "desc_act": kind.desc_act,
        "sym": kind.sym,
        "quant_method": "gptq",
    }
    label = kind.format if label is None else label
    if label:
        config["checkpoint_format"] = label
    if dynamic:
        config["dynamic"] = dynamic
    if lm_head:
        config["lm_head"] = True
    if kind.word_borrow:
        config["meta"] = {"quantizer": ["gptqmodel:4.2.5"]}
    return config


def kind_of_module(name: str, kind: Kind, dynamic: dict[str, Any] | None) -> Kind | None:
    """The kind after the `dynamic` rules (first match wins); None when the module stays dense."""
    for pattern, override in (dynamic or {}).items():
        sign, expression = (pattern[0], pattern[2:]) if pattern[:2] in ("-:", "+:") else ("+", pattern)
        if re.match(expression, name):
            return None if sign == "-" else replace(kind, **override)
    return kind


def write_checkpoint(
    folder: Path,
    config_overrides: dict[str, Any] | None = None,
    *,
    bits: int = 4,
    group_size: int = 32,
    desc_act: bool = False,
    sym: bool = True,
    format: str = "gptq",
    word_borrow: bool = False,
    era: int = 4,
    g_idx: str = "auto",
    bias: str = "none",
    scales_dtype: torch.dtype = torch.float16,
    zero_point_zero: bool = False,
    family: str = "llama",
    dense: bool = False,
    dtype: torch.dtype = torch.float16,
    dynamic: dict[str, Any] | None = None,
    quantised_lm_head: bool = False,
    shards: int = 1,
    file_name: str = "model.safetensors",
    config_files: tuple[str, ...] = ("config.json",),
    label: str | None = None,
    extra_tensors: dict[str, torch.Tensor] | None = None,
    drop: tuple[str, ...] = (),
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Writes a tiny random checkpoint; returns the exact float32 state dict of the transformers model it stands for.

    The result has `NAME.weight` [N, K] (and the biases of the architecture) and loads with `load_state_dict`; when the
    embeddings are tied it has no lm_head.weight.

    folder: created when missing; config.json and the weights are written into it.
    config_overrides: merged into `model_config(family)`.
    bits, group_size (-1: one group), desc_act, sym: of the quantiser. bits 5, 6, 7 are planar.
    format: "gptq" (v1 zero points), "gptq_v2" or "gptq_p"; label: what the config calls it instead ("" = no key).
    word_borrow: as gptqmodel writes v1 zeros (whole-word subtraction), with its `meta.quantizer`.
    era: 0 (`zeros` float32 premultiplied, needs group_size=-1), 1 (float32 scales, no g_idx), 2 and later as today.
    g_idx: "auto", "absent", "int32", "int64", "zeros" (wrong on purpose), "unset" (all -1).
    bias: "none" (only those of the architecture, non-zero), "zero" (a zero one on every linear, as AutoGPTQ writes),
        "random" (non-zero on every linear; those not of the architecture are in the result too).
    zero_point_zero: with sym=False, every fifth column has zero point 0.
    dense: no quantisation at all. dtype: of all that is not quantised.
    dynamic: gptqmodel's per-module rules; the modules that they skip are dense.
    quantised_lm_head: lm_head.qweight and so on, of the same kind (or as `dynamic` says).
    shards: more than 1 writes model-0000i-of-0000n.safetensors and the index. file_name: of the single file.
    config_files: where the quantisation is declared, of "config.json", "quantize_config.json"; () = nowhere.
    extra_tensors: added to the file as they are. drop: names of tensors left out of it.
    """
    rng = np.random.default_rng(seed)
    kind = Kind(bits, group_size, desc_act, sym, format, word_borrow, era, g_idx, bias, scales_dtype, zero_point_zero)
    config = model_config(family, config_overrides)
    linears = linears_of(config)
    tensors, exact = plain_tensors(config, dtype, rng)
    if not config["tie_word_embeddings"]:
        linears.append(("lm_head", config["hidden_size"], config["vocab_size"], False))
    for name, K, N, has_bias in linears:
        bias_tensor = _bias(kind.bias, has_bias and name != "lm_head", N, dtype, rng)
        this = None if dense else kind_of_module(name, kind, dynamic)
        if name == "lm_head" and not quantised_lm_head:
            this, bias_tensor = None, None
        if this is None:
            weight = torch.from_numpy(rng.standard_normal((N, K)) / np.sqrt(K)).to(dtype)
            stored = {f"{name}.weight": weight} | ({} if bias_tensor is None else {f"{name}.bias": bias_tensor})
            tensors |= stored
            exact[f"{name}.weight"] = weight.float()
        else:
            stored, exact[f"{name}.weight"] = quantised_linear(name, K, N, this, rng, bias_tensor)
            tensors |= stored
        if bias_tensor is not None and (has_bias or bool(bias_tensor.any())):
            exact[f"{name}.bias"] = bias_tensor.float()
    tensors |= extra_tensors or {}
    stored = {name: tensor for name, tensor in tensors.items() if name not in drop}
    quantization = None if dense else quantization_config(kind, dynamic, quantised_lm_head, label)
    _write_folder(Path(folder), config, quantization, config_files, stored, shards, file_name)
    return exact


def plain_tensors(
    config: dict[str, Any], dtype: torch.dtype, rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    sizes = {"model.norm.weight": hidden}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        sizes[f"{prefix}input_layernorm.weight"] = hidden
        sizes[f"{prefix}post_attention_layernorm.weight"] = hidden
        if config["model_type"] == "qwen3":
            sizes |= {f"{prefix}self_attn.{x}_norm.weight": head for x in "qk"}
    tensors = {name: torch.from_numpy(1 + 0.1 * rng.standard_normal(size)).to(dtype) for name, size in sizes.items()}
    table = torch.from_numpy(rng.standard_normal((config["vocab_size"], hidden))).to(dtype)
    tensors["model.embed_tokens.weight"] = table
    return tensors, {name: tensor.float() for name, tensor in tensors.items()}


def _bias(choice: str, has_bias: bool, size: int, dtype: torch.dtype, rng: np.random.Generator) -> torch.Tensor | None:
    if has_bias or choice == "random":
        return torch.from_numpy(0.1 * rng.standard_normal(size)).to(dtype)
    return torch.zeros(size, dtype=dtype) if choice == "zero" else None


def _write_folder(
    folder: Path,
    config: dict[str, Any],
    quantization: dict[str, Any] | None,
    config_files: tuple[str, ...],
    tensors: dict[str, torch.Tensor],
    shards: int,
    file_name: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if quantization is not None and "config.json" in config_files:
        config = config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if quantization is not None and "quantize_config.json" in config_files:
        (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=1))
    if shards == 1:
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
