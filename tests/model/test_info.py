"""model/info.py: the facts that `ropewalk info` shows, without reading a weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_writer import write_checkpoint
from ropewalk.base.errors import CheckpointError, RopewalkError, UnsupportedError
from ropewalk.model.info import model_info
from ropewalk.model.loader import load_model


def test_the_facts_are_those_of_the_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"max_position_embeddings": 4096}, bits=3, group_size=64, desc_act=True, sym=False)
    info = model_info(tmp_path, head_bits=16)
    assert info.family == "llama"
    assert info.linears == {"3-bit, groups of 64": 7 * info.num_layers, "dense F16": 1}
    assert (info.format, info.act_order, info.symmetric) == ("gptq", True, False)
    assert info.quant_source.endswith("config.json")
    assert list(info.cache_bytes) == [2048, 4096]
    assert info.files == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}
    assert info.weight_bytes == info.files["model.safetensors"]
    text = info.describe()
    for part in ("3-bit, groups of 64", "act-order", "asymmetric", "RoPE scaling", "4,096 positions"):
        assert part in text


def test_the_linears_of_experts_count(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "random_checkpoint.py"
    command = [sys.executable, script, tmp_path, "--shape", "tiny-moe", "--group-size", "64"]
    subprocess.run(command, check=True, capture_output=True)
    info = model_info(tmp_path)
    assert (info.num_experts, info.experts_per_token) == (16, 4)
    assert info.linears == {"4-bit, groups of 64": 2 * (4 + 16 * 3), "dense F16": 3}  # two routers and the head
    assert "4 of 16 experts a token" in info.describe()


def test_memory_of_the_cache_is_what_the_model_allocates(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for cache_type in ("fp16", "fp32"):
        info = model_info(tmp_path, 100, cache_type=cache_type)
        model = load_model(tmp_path, 100, backend="reference", cache_type=cache_type)
        assert info.cache_bytes[100] == model.cache_bytes(100)


def test_the_context_decision_is_that_of_loading(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    info = model_info(tmp_path, compress_pos_emb=4.0)
    model = load_model(tmp_path, backend="reference", compress_pos_emb=4.0)
    assert info.rope == model.rope.describe()
    assert info.max_seq_len == model.max_seq_len
    assert "compress_pos_emb" in info.rope_decided_by


def test_undeclared_and_dense_weights_are_told_apart(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "bare", config_files=(), bits=8, group_size=-1)
    bare = model_info(tmp_path / "bare")
    assert bare.quant_source == "inferred from shapes"
    assert bare.linears["8-bit, one group"] == 7 * bare.num_layers
    write_checkpoint(tmp_path / "dense", dense=True)
    dense = model_info(tmp_path / "dense")
    assert (dense.format, dense.act_order) == (None, None)
    assert set(dense.linears) == {"dense F16"}


def test_it_becomes_json(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family="mistral")
    data = json.loads(json.dumps(model_info(tmp_path).to_json()))
    assert data["family"] == "mistral"
    assert all(int(length) > 0 for length in data["cache_bytes"])


def test_what_loading_would_refuse_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "short", drop=("model.norm.weight",))
    with pytest.raises(CheckpointError, match="model.norm.weight is missing"):
        model_info(tmp_path / "short")
    write_checkpoint(tmp_path / "other", label="marlin")
    with pytest.raises(UnsupportedError):
        model_info(tmp_path / "other")
    with pytest.raises(RopewalkError, match="nowhere"):
        model_info(tmp_path / "nowhere")
