"""model/identify.py and model/listing.py: any folder is named, with what runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from container_writer import write_container
from gptq_writer import model_config, write_checkpoint
from ropewalk.base.errors import CheckpointError, UnsupportedError
from ropewalk.model.identify import identify
from ropewalk.model.listing import list_folder

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def folder_with(folder: Path, *names: str, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("names", "what", "runs_with"),
    [
        (["llama.Q4_K_M.gguf", "README.md"], "a llama.cpp model (GGUF)", "llama.cpp"),
        (["model_index.json", "model.safetensors"], "diffusers", "ComfyUI"),
        (["consolidated.00.pth", "params.json"], "Meta's own files", "once it is converted"),
        (["model.onnx"], "ONNX", "ONNX Runtime"),
        (["rank0.engine"], "TensorRT-LLM", "TensorRT-LLM"),
        (["openvino_model.xml"], "OpenVINO", "OpenVINO"),
        (["llama7b-4bit-128g.pt"], "pickled torch checkpoint", "weights_only=True"),
        (["model.safetensors"], "weights without a config.json", "config.json of the model"),
        (["tokenizer.json"], "a tokenizer without a model", "the weights are missing"),
    ],
)
def test_a_folder_without_config_json_is_told_by_its_files(
    tmp_path: Path, names: list[str], what: str, runs_with: str
) -> None:
    found = identify(folder_with(tmp_path, *names))
    assert found is not None
    assert what in found.what and runs_with in found.runs_with


@pytest.mark.parametrize(
    ("quantization", "what", "runs_with"),
    [
        (GPTQ, "a cohere model with GPTQ weights of 4 bits", "gptqmodel in transformers"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "AWQ weights of 4 bits", "AutoAWQ"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "a layout other than gemm", "AutoAWQ on a GPU"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors weights", "vLLM"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "FP8", "computes in FP8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "repacked for one kernel", "vLLM"),
        ({"quant_method": "fp8"}, "FP8", "computes in FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4", "llama.cpp"),
        ({"quant_method": "modelopt"}, "NVFP4", "TensorRT-LLM"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "bitsandbytes"),
        ({"quant_method": "hqq"}, "HQQ", "hqq"),
        ({"quant_method": "exl2", "bits": 4.65}, "EXL2", "exllamav2"),
        ({"quant_method": "exl3"}, "EXL3", "exllamav3"),
        ({"quant_method": "something"}, "quantised by 'something'", "transformers"),
    ],
)
def test_a_folder_with_config_json_is_told_by_what_it_declares(
    tmp_path: Path, quantization: dict[str, Any], what: str, runs_with: str
) -> None:
    config = {"model_type": "cohere", "quantization_config": quantization}
    found = identify(folder_with(tmp_path, "model.safetensors", config=config))
    assert found is not None
    assert found.family == "cohere"
    assert what in found.what and runs_with in found.runs_with


def test_weights_that_nothing_declares_are_told_by_their_names(tmp_path: Path) -> None:
    config = {"model_type": "olmo2", "text_config": {"model_type": "llama"}}
    folder = folder_with(tmp_path, config=config)
    for tensor, what in (
        ("layer.weight_scale_inv", "FP8"),
        ("layer.q_invperm", "EXL2"),
        ("layer.biases", "MLX"),
        ("layer.qweight", "GPTQ or AWQ weights that nothing declares"),
        ("layer.weight", "an olmo2 model (more than text; its language model is llama) with weights that are not"),
    ):
        save_file({tensor: torch.zeros(1)}, folder / "model.safetensors")
        found = identify(folder)
        assert found is not None and what in found.what
    (folder / "model.safetensors").unlink()
    assert "without its weights" in identify(folder).what
    (folder / "pytorch_model.bin").touch()
    assert "in pickled files" in identify(folder).what


def test_adapters_caches_mlx_files_and_nothing_are_told_apart(tmp_path: Path) -> None:
    adapter = folder_with(tmp_path / "adapter", "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "meta/llama"}')
    assert identify(adapter).what == "a LoRA adapter of 'meta/llama'"
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    assert "the hub's cache of a/b" in identify(tmp_path / "models--a--b").what
    mlx = folder_with(tmp_path / "mlx", "model.safetensors", config={"quantization": {"bits": 4}})
    assert "MLX" in identify(mlx).what and "mlx-lm" in identify(mlx).runs_with
    assert identify(folder_with(tmp_path / "empty")) is None
    assert identify(tmp_path / "absent") is None
    gguf = tmp_path / "x.gguf"
    gguf.touch()
    assert "GGUF" in identify(gguf).what


def test_a_damaged_model_of_ours_is_not_sent_to_another_program(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    damaged = CheckpointError("model.safetensors is truncated")
    assert identify(tmp_path, damaged).runs_with == "ropewalk, once its files are whole: download them again"
    assert "gptqmodel" in identify(tmp_path, UnsupportedError("an odd layout")).runs_with
    foreign = folder_with(tmp_path / "plain", "model.safetensors", config=model_config("llama") | {"model_type": "x"})
    assert "transformers" in identify(foreign, damaged).runs_with


def test_folders_are_listed_with_what_loads_and_what_does_not(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a" / "gptq", desc_act=True)
    write_container(tmp_path / "a" / "awq", "awq")
    write_container(tmp_path / "w4a16", "compressed-tensors")
    write_checkpoint(tmp_path / "dense", dense=True)
    folder_with(tmp_path / "cohere", "model.safetensors", config=model_config("llama") | {"model_type": "plain"})
    folder_with(tmp_path / "gguf" / "deep", "m.gguf")
    folder_with(tmp_path / "a" / "gptq" / "adapters" / "x", "adapter_model.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = {model.name: model for model in list_folder(tmp_path)}  # none of them twice
    assert {name: (model.loads, model.weights) for name, model in found.items()} == {
        "a/awq": (True, "AWQ 4-bit, groups of 32"),
        "a/gptq": (True, "GPTQ 4-bit, groups of 32"),
        "cohere": (False, "a plain model with weights that are not quantised"),
        "dense": (True, "dense F16"),
        "gguf/deep": (False, "a llama.cpp model (GGUF)"),
        "w4a16": (True, "W4A16 4-bit, groups of 32"),
    }
    assert (found["a/gptq"].family, found["a/gptq"].context) == ("llama", 256)
    assert "model_type 'plain' is not supported" in found["cohere"].reason
    assert found["gguf/deep"].runs_with.startswith("llama.cpp")
