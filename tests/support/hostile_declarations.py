"""Damage to what a folder says around its weights: declarations, names, tokenizer. Importing registers all damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from container_writer import AWQ_CONFIG, compressed_config
from gptq_writer import Kind
from hostile_folders import (
    ABSURD,
    FILE_REPLACEMENTS,
    damage,
    edit_json,
    header_of,
    json_file,
    pick,
    replace_file,
    spoil_bytes,
    spoil_json,
    weight_file,
)
from hostile_weights import Rng  # and its kinds come first


@damage("config: a key of config.json")
def _(folder: Path, rng: Rng) -> None:
    def edit(config: dict[str, Any]) -> None:
        config[pick(rng, config)] = pick(rng, ABSURD)

    edit_json(folder / "config.json", edit)


@damage("config: a key that is absent")
def _(folder: Path, rng: Rng) -> None:
    absent = ["head_dim", "layer_types", "max_window_layers", "use_sliding_window", "sliding_window", "attention_bias"]
    absent += ["quantization_config", "rope_scaling", "rope_parameters", "mlp_bias", "auto_map", "rope_theta"]
    absent += ["hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", "sliding_window_pattern"]
    absent += ["rope_local_base_freq", "logit_scale", "rotary_pct", "use_parallel_residual", "qk_layernorm"]
    absent += ["embedding_multiplier", "logits_scaling", "layer_norm_eps", "norm_epsilon", "use_qk_norm", "use_bias"]
    absent += ["partial_rotary_factor", "original_max_position_embeddings", "max_sequence_length", "compression_config"]

    def edit(config: dict[str, Any]) -> None:
        config[pick(rng, absent)] = pick(rng, ABSURD)

    edit_json(folder / "config.json", edit)


@damage("config: a key dropped")
def _(folder: Path, rng: Rng) -> None:
    edit_json(folder / "config.json", lambda config: config.pop(pick(rng, config)))


@damage("config: RoPE scaling")
def _(folder: Path, rng: Rng) -> None:
    types = ["linear", "dynamic", "yarn", "llama3", "longrope", "su", "ntk", "proportional", "default", "mrope"]
    keys = [
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "alpha",
    ]
    keys += ["low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "truncate", "rope_theta", "type"]
    values = [*ABSURD, 4.0, [1.0] * 16, 1e-300, 2**31]
    scaling = {"rope_type": pick(rng, types), "factor": 4.0, "original_max_position_embeddings": 128}
    for _ in range(int(rng.integers(1, 4))):
        scaling[pick(rng, keys)] = pick(rng, values)
    edit_json(
        folder / "config.json", lambda config: config.update({pick(rng, ["rope_scaling", "rope_parameters"]): scaling})
    )


@damage("config: the quantisation")
def _(folder: Path, rng: Rng) -> None:
    names = ["quantize_config.json", "config.json"]
    path = next((folder / name for name in names if (folder / name).exists()), folder / "config.json")
    keys = ["bits", "group_size", "desc_act", "sym", "format", "checkpoint_format", "lm_head", "meta", "extra_config"]
    keys += ["quant_method", "pack_dtype", "model_file_base_name", "is_marlin_format", "modules_in_block_to_quantize"]
    patterns = ["(", "-:(.+)+!", "-:" + ".*" * 30 + "!", ".*", "-:.*mlp.*", "((a{1,9999}){1,9999}){1,9999}", "(?<=a*)"]
    overrides = [{}, {"bits": 9}, {"bits": 8}, {"group_size": 7}, 4, None, "x", {"format": "marlin"}]

    def edit(config: dict[str, Any]) -> None:
        target = config if path.name == "quantize_config.json" else config.setdefault("quantization_config", {})
        if rng.integers(3) == 0:
            target["dynamic"] = {pick(rng, patterns): pick(rng, overrides)}
        else:
            target[pick(rng, keys)] = pick(rng, [*ABSURD, 2, 8, 16, 64, "marlin", "awq", "gptq_p", "gptq_v2"])

    edit_json(path, edit)


@damage("config: the declaration of another container")
def _(folder: Path, rng: Rng) -> None:
    kinds = [Kind(), Kind(bits=8, group_size=-1), Kind(sym=False), Kind(group_size=16, desc_act=True)]
    claims = [compressed_config(pick(rng, kinds)), AWQ_CONFIG, {"quant_method": "gptq", "bits": 4, "group_size": 32}]
    claims += [{"quant_method": name} for name in ("fp8", "mxfp4", "bitsandbytes", "hqq", "exl2", "modelopt")]

    def edit(config: dict[str, Any]) -> None:
        claim = dict(pick(rng, claims))
        if rng.integers(3) == 0:
            claim[pick(rng, claim)] = pick(rng, ABSURD)
        config["quantization_config"] = claim

    edit_json(folder / "config.json", edit)


@damage("config: anywhere in a JSON file")
def _(folder: Path, rng: Rng) -> None:
    spoil_json(json_file(folder, rng), rng)


@damage("config: bytes of a JSON file")
def _(folder: Path, rng: Rng) -> None:
    spoil_bytes(json_file(folder, rng), rng)


@damage("config: another text")
def _(folder: Path, rng: Rng) -> None:
    texts = [
        b"",
        b"null",
        b"[]",
        b"[" * 5000,
        b'{"a":' * 5000,
        b"\xff\xfe{}",
        b"{}",
        b'{"a": 1' + b"0" * 9999 + b"}",
        b"\0" * 99,
    ]
    json_file(folder, rng).write_bytes(pick(rng, texts))


@damage("config: shapes that the weights do not have")
def _(folder: Path, rng: Rng) -> None:
    keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]

    def edit(config: dict[str, Any]) -> None:
        for key in (pick(rng, keys), pick(rng, [*keys, "vocab_size", "head_dim", "max_position_embeddings"])):
            config[key] = pick(rng, [1, 2, 3, 8, 33, 64, 512, 2**13, 2**20, 2**24, 2**31, 10**9])

    edit_json(folder / "config.json", edit)


@damage("folder: a file missing")
def _(folder: Path, rng: Rng) -> None:
    pick(rng, sorted(folder.iterdir())).unlink()


@damage("folder: a file that is none")
def _(folder: Path, rng: Rng) -> None:
    replace_file(pick(rng, sorted(folder.iterdir())), pick(rng, FILE_REPLACEMENTS))


@damage("folder: odd names beside the weights")
def _(folder: Path, rng: Rng) -> None:
    names = [
        "é ▁.safetensors",
        "a\nb.safetensors",
        "x" * 243 + ".safetensors",
        "\udcff.safetensors",
        ".hidden.safetensors",
    ]
    names += [
        " .safetensors",
        "model-00001-of-00009.safetensors",
        "model.safetensors.index.json",
        "-1.pt",
        "2bit.safetensors",
    ]
    source = weight_file(folder, rng)
    for name in rng.permutation(names)[: int(rng.integers(1, 4))]:
        make = pick(rng, [lambda path: path.touch(), lambda path: path.mkdir(), lambda path: shutil.copy(source, path)])
        if not (folder / name).exists():
            make(folder / name)


@damage("folder: weights under another name")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    names = [
        "é ▁.safetensors",
        "a\nb.safetensors",
        "x" * 243 + ".safetensors",
        "\udcff.safetensors",
        "model.bin",
        "model.pt",
    ]
    path.rename(
        folder / pick(rng, [*names, "adapter_model.safetensors", "model-00001-of-00002.safetensors", "MODEL.GGUF"])
    )


@damage("folder: a tensor in two files")
def _(folder: Path, rng: Rng) -> None:
    twice = pick(rng, ["model-00001-of-00002.safetensors", "gptq_model-4bit-32g.safetensors", "other.safetensors"])
    save_file({"model.norm.weight": torch.ones(3), "model.embed_tokens.weight": torch.ones(2, 2)}, folder / twice)


@damage("folder: a wrong index")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    names = list(header_of(path)[0])
    files = [
        "../config.json",
        "/dev/zero",
        "config.json",
        "none.safetensors",
        path.name,
        "",
        5,
        None,
        "a\0.safetensors",
    ]
    weight_map = {pick(rng, [*names, "nothing"]): pick(rng, files) for _ in range(int(rng.integers(1, 6)))}
    if rng.integers(2):
        weight_map = {**dict.fromkeys(names, path.name), **weight_map}
    index = {"weight_map": weight_map if rng.integers(6) else pick(rng, ABSURD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@damage("tokenizer: anywhere in a JSON file")
def _(folder: Path, rng: Rng) -> None:
    spoil_json(folder / pick(rng, ["tokenizer.json", "tokenizer.json", "tokenizer_config.json"]), rng)


@damage("tokenizer: bytes of a file")
def _(folder: Path, rng: Rng) -> None:
    spoil_bytes(folder / pick(rng, ["tokenizer.json", "tokenizer_config.json"]), rng)


@damage("tokenizer: bytes of tokenizer.model")
def _(folder: Path, rng: Rng) -> None:
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer.model"
    if rng.integers(3):
        spoil_bytes(path, rng)
    else:
        path.write_bytes(pick(rng, [b"", rng.bytes(500), path.read_bytes()[: int(rng.integers(7000))]]))


@damage("tokenizer: special and added tokens")
def _(folder: Path, rng: Rng) -> None:
    if rng.integers(2):
        (folder / "tokenizer.json").unlink()
    keys = ["bos_token", "eos_token", "add_bos_token", "legacy", "unk_token", "chat_template", "added_tokens_decoder"]
    tables = [
        {"9" * 5000: {"content": "a"}},
        {"²": {"content": "a"}},
        {"600": {"content": "z", "special": 1}},
        {"-1": "b"},
    ]
    templates = [
        "{{",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ messages[99].x.y }}",
        "{{ ''.__class__.__mro__ }}",
    ]
    special = {"added_tokens_decoder": tables, "chat_template": templates}
    key = pick(rng, keys)
    value = pick(rng, special[key] if key in special and rng.integers(2) else ABSURD)
    edit_json(folder / "tokenizer_config.json", lambda config: config.update({key: value}))
    added = pick(rng, [{}, {"<a>": 512}, {"": 3}, {"<a>": -1}, {"<a>": 2**40}, {"<a>": "7"}, {"\ud800": 513}, []])
    (folder / "added_tokens.json").write_text(json.dumps(added))


@damage("tokenizer: of another model")
def _(folder: Path, rng: Rng) -> None:
    def edit(document: dict[str, Any]) -> None:
        vocab = document["model"]["vocab"]
        shift = pick(rng, [1, 1000, 2**24, 2**32 - 1])
        for token in list(vocab)[int(rng.integers(len(vocab))) :]:
            vocab[token] += shift

    edit_json(folder / "tokenizer.json", edit)


@damage("nothing")
def _(folder: Path, rng: Rng) -> None:
    pass
