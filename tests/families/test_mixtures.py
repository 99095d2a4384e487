"""Mixtures of experts as folders: what is held, what is read when it is needed, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from container_writer import compressed_config, random_linear
from gptq_writer import Kind
from ropewalk.base.errors import CheckpointError, ConfigError, UnsupportedError
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.loader import load_model
from their_folder import save_model

IDS = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(3)).tolist()
SETTINGS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
GATE = "model.layers.1.mlp.experts.4.gate_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixture")
    save_model(made, "qwen3_moe", **SETTINGS)
    return made


def changed(folder: Path, to: Path, edit: Callable[[dict[str, torch.Tensor]], Any] = len, **config: Any) -> Path:
    """A copy of the folder with other tensors or keys of config.json."""
    to.mkdir()
    raw = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**raw, **config}))
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def all_logits(folder: Path, **options: Any) -> torch.Tensor:
    model = load_model(folder, backend="cpu", **options)
    return model.forward(IDS, model.new_cache(), logits="all")


def expert_bytes(folder: Path) -> int:
    """Of one layer."""
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if name.startswith("model.layers.0.mlp.experts.")]
    return sum(tensors[name].numel() * tensors[name].element_size() for name in names)


@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_a_model_that_holds_few_experts_gives_the_bits_of_one_that_holds_all(folder: Path, compute: str) -> None:
    want = all_logits(folder, compute=compute)
    model = load_model(folder, backend="cpu", compute=compute, expert_memory=expert_bytes(folder) * 6 // 5)
    cache = model.new_cache()
    parts = [model.forward(IDS[:30], cache, logits="all")]
    parts += [model.forward([token_id], cache, logits="all") for token_id in IDS[30:]]
    assert torch.equal(torch.cat(parts), want)
    held = sum(packed.num_bytes for layer in model.weights.layers for packed in layer.experts.values())
    assert held <= expert_bytes(folder) * 6 // 5


@pytest.mark.parametrize("bits", [2, 4])
def test_experts_packed_as_compressed_tensors_have_a_bound_too(folder: Path, tmp_path: Path, bits: int) -> None:
    kind, rng = Kind(bits=bits), np.random.default_rng(1)

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            module, (out_features, in_features) = name.removesuffix(".weight"), tensors.pop(name).shape
            tensors |= random_linear(module, in_features, out_features, "compressed-tensors", kind, rng)[0]

    declared = compressed_config(kind, actorder=None)
    declared["ignore"] += ["re:.*self_attn.*", "re:.*mlp.gate$"]
    made = changed(folder, tmp_path / "made", quantise, quantization_config=declared)
    want = all_logits(made)
    room = 6 * 3 * (64 * 32 * bits // 8 + 32 * 64 // 8) * 6 // 5  # codes, a little for scales; one layer of two
    model = load_model(made, backend="cpu", expert_memory=room)
    assert torch.equal(model.forward(IDS, model.new_cache(), logits="all"), want)
    assert 0 < sum(packed.num_bytes for layer in model.weights.layers for packed in layer.experts.values()) <= room


def test_room_for_less_than_one_layer_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="expert_memory: 1000 bytes .* do not hold the experts of one layer"):
        load_model(folder, backend="cpu", expert_memory=1000)
    with pytest.raises(ConfigError, match='an option of backend="cpu"'):
        load_model(folder, backend="reference", expert_memory=1 << 30)
    for value in (0, -5, True, "8GiB"):
        with pytest.raises(ConfigError, match="expert_memory must be a positive integer"):
            load_model(folder, expert_memory=value)
    with pytest.raises(ConfigError, match="this model has no experts"):
        load_model(demo_model_path(), backend="cpu", expert_memory=1 << 30)


def test_a_file_that_changes_while_experts_are_read_from_it_ends_the_call(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path / "copy")
    model = load_model(copy, backend="cpu", expert_memory=expert_bytes(folder))
    save_file({"other": torch.zeros(5)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="has changed"):
        model.forward(IDS, model.new_cache())


def test_experts_that_are_held_need_no_files(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path / "copy")
    model = load_model(copy, backend="cpu")
    (copy / "model.safetensors").unlink()
    assert torch.equal(model.forward(IDS, model.new_cache(), logits="all"), all_logits(folder))


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


DAMAGE = {
    "an expert is missing": (without(f"{GATE}.weight"), f"{GATE}: both .qweight and .weight are missing"),
    "of another width": (replaced(f"{GATE}.weight", 48, 64), f"{GATE}.weight has shape \\[48, 64\\]"),
    "one too many": (replaced("model.layers.0.mlp.experts.6.up_proj.weight", 32, 64), "experts.6.up_proj.weight is un"),
    "no router": (
        without("model.layers.0.mlp.gate.weight"),
        "layers.0.mlp.gate: both .qweight and .weight are missing",
    ),
    "of a dense layer": (replaced("model.layers.0.mlp.down_proj.weight", 64, 96), "mlp.down_proj.weight is unexpected"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_mixtures_are_refused_by_the_name_of_the_tensor(folder: Path, tmp_path: Path, name: str) -> None:
    edit, message = DAMAGE[name]
    with pytest.raises(CheckpointError, match=message):
        load_model(changed(folder, tmp_path / "damaged", edit))


KEYS = {
    "num_experts": [0, 1025, -1, "six", 6.5],
    "num_experts_per_tok": [0, 7, "two"],
    "moe_intermediate_size": [0, 2**21, []],
    "mlp_only_layers": [3, ["one"], [True], "0"],
    "decoder_sparse_step": [0, -1, "1"],
    "norm_topk_prob": ["yes", 1],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in KEYS.items() for value in values])
def test_keys_of_mixtures_are_checked(folder: Path, tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        load_model(changed(folder, tmp_path / "changed", **{key: value}))


def write_lora(folder: Path, module: str, in_features: int, out_features: int) -> Path:
    folder.mkdir()
    target = module.rpartition(".")[2]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": f".*layers.0.*{target}", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.{module}.lora_"
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, in_features, generator=generator), torch.randn(out_features, 2, generator=generator))
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, folder / "adapter_model.safetensors")
    return folder


def test_adapters_change_attention_and_not_experts(folder: Path, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    attention = write_lora(tmp_path / "attention", module, 64, 64)
    model = load_model(folder, backend="cpu", compute="exact", cache_type="fp32")
    model.load_adapter(attention, "attention")
    got = model.forward(IDS, model.new_cache(), logits="all", adapters=["attention"])
    matrices = load_file(attention / "adapter_model.safetensors")
    a, b = (matrices[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    merged = changed(
        folder,
        tmp_path / "merged",
        lambda tensors: tensors.update({f"{module}.weight": tensors[f"{module}.weight"] + 2 * b @ a}),
    )
    want = all_logits(merged, compute="exact", cache_type="fp32")
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    expert = write_lora(tmp_path / "expert", "model.layers.0.mlp.experts.3.up_proj", 64, 32)
    with pytest.raises(
        UnsupportedError, match="experts.3.up_proj.lora_A.weight is for an expert: adapters that change"
    ):
        model.load_adapter(expert, "expert")
