"""Which folders are ours, to load or to refuse: those of GPTQ and its relatives, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ropewalk.base.errors import RopewalkError, UnsupportedError
from ropewalk.faces.webui.gptq_folders import is_gptq_like
from ropewalk.faces.webui.model_settings import refusal
from ropewalk.files.embedded import demo_model_path

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def write_folder(folder: Path, changes: dict[str, Any], weights: bool = False) -> Path:
    """A folder that declares nothing but the embedded model's shape, and these."""
    config = json.loads((demo_model_path() / "config.json").read_text())
    config.pop("quantization_config", None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    if weights:
        (folder / "model.safetensors").symlink_to(demo_model_path() / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": GPTQ},
        {"quantization_config": {"bits": 4, "group_size": 32}},
        {"quantization_config": {**GPTQ, "quant_method": "AWQ"}},
        {"quantization_config": GPTQ, "model_type": "falcon", "architectures": ["FalconForCausalLM"]},
        {"gptq_bits": 4, "gptq_groupsize": 128},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
    ],
    ids=["gptq", "no method", "awq", "falcon", "kobold", "compressed-tensors"],
)
def test_what_config_json_declares_is_recognised(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert is_gptq_like(write_folder(tmp_path, changes))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_file_beside_it_is_recognised_damaged_or_not(tmp_path: Path, name: str) -> None:
    (write_folder(tmp_path, {}) / name).write_text('{"bits": "four"')
    assert is_gptq_like(tmp_path)


def test_a_folder_that_declares_nothing_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    assert is_gptq_like(write_folder(tmp_path, {}, weights=True))


@pytest.mark.parametrize(
    "changes",
    [{}, {"quantization_config": {"quant_method": "bitsandbytes"}}, {"quantization_config": {"quant_method": "exl2"}}],
    ids=["dense", "bitsandbytes", "exl2"],
)
def test_folders_for_other_loaders_are_left_to_them(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert not is_gptq_like(write_folder(tmp_path, changes))


def test_a_folder_without_config_json_is_left_to_other_loaders(tmp_path: Path) -> None:
    assert not is_gptq_like(tmp_path)


def test_a_folder_that_can_be_loaded_is_not_refused() -> None:
    assert refusal(demo_model_path()) is None


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, UnsupportedError, "falcon"),
        ({"quantization_config": {**GPTQ, "quant_method": "awq", "version": "gemv"}}, UnsupportedError, "AWQ"),
        ({"hidden_size": 320}, RopewalkError, "config.json"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], kind: type[RopewalkError], message: str
) -> None:
    error = refusal(write_folder(tmp_path, {"quantization_config": GPTQ} | changes, weights=True))
    assert isinstance(error, kind) and message in str(error)
