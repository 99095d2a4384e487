"""containers/awq.py: the order of the fields, the turned words, and modules that are not what they are declared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_weights import Q0, assert_reads_exactly, edit, refusal
from container_writer import AWQ_CONFIG, pack_awq, write_container
from gptq_writer import Kind, pack_rows, write_checkpoint
from ropewalk.containers.awq import fields_in_order, to_gptq_words

ASYMMETRIC = Kind(sym=False)


def test_the_fields_of_a_word_are_in_the_kernels_order() -> None:
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    assert fields_in_order(word)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_words_hold_the_same_codes_as_gptqs(data: st.DataObject) -> None:
    rows, columns = (8 * data.draw(st.integers(1, 6)) for _ in range(2))
    codes = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, 16, (rows, columns))
    words = torch.from_numpy(pack_awq(codes))
    assert np.array_equal(to_gptq_words(words).numpy(), pack_rows(codes, 4))
    assert np.array_equal(fields_in_order(words).numpy(), codes)


def test_a_matrix_of_several_chunks_is_turned_like_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.from_numpy(np.random.default_rng(1).integers(-(2**31), 2**31, (64, 6), dtype=np.int32))
    whole = to_gptq_words(words)
    monkeypatch.setattr("ropewalk.containers.awq.CHUNK_WORDS", 3 * 8 * 6)
    assert torch.equal(to_gptq_words(words), whole)


@pytest.mark.parametrize(
    "declaration",
    [
        None,
        {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "checkpoint_format": "gemm", "format": "gemm"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32},
    ],
    ids=["autoawq", "early autoawq", "gptqmodel", "auto-round"],
)
@pytest.mark.parametrize("place", ["config.json", "quant_config.json"])
def test_every_writers_declaration_is_read(tmp_path: Path, declaration: dict | None, place: str) -> None:
    exact = write_container(tmp_path, "awq", ASYMMETRIC, declaration=declaration, declared_in=place)
    assert_reads_exactly(tmp_path, exact)


@pytest.mark.parametrize("kind", [Kind(), Kind(group_size=-1, sym=False), Kind(scales_dtype=torch.bfloat16)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_groups_scales_and_biases_are_read_exactly(tmp_path: Path, kind: Kind, family: str) -> None:
    assert_reads_exactly(tmp_path, write_container(tmp_path, "awq", kind, family=family))


def test_a_module_that_was_left_dense_is_read_dense(tmp_path: Path) -> None:
    exact = write_container(tmp_path, "awq", ASYMMETRIC)
    dense = exact[f"{Q0}.weight"].half()
    edit(tmp_path, **{f"{Q0}.{part}": None for part in ("qweight", "qzeros", "scales")}, **{f"{Q0}.weight": dense})
    assert_reads_exactly(tmp_path, exact | {f"{Q0}.weight": dense.float()})


def test_gptq_weights_that_are_declared_as_awq_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_files=())
    config = '{"w_bit": 4, "q_group_size": 32, "version": "GEMM"}'
    (tmp_path / "quant_config.json").write_text(config)
    assert f"{Q0}.qweight has shape [8, 64]: codes packed along the inputs, as GPTQ does" in refusal(tmp_path)


@pytest.mark.parametrize("declared_as", ["gptq", "nothing"])
def test_awq_weights_that_are_not_declared_as_such_are_refused(tmp_path: Path, declared_as: str) -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32} if declared_as == "gptq" else {}
    write_container(tmp_path, "awq", ASYMMETRIC, declaration=gptq)
    assert f"{Q0}.qweight has shape [64, 8]: codes packed along the outputs, as AWQ does" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qzeros": None}, "qzeros is missing"),
        ({"scales": torch.ones(3, 64).half()}, r"scales has shape [3, 64], expected [2, 64]"),
        ({"qzeros": torch.zeros(2, 8)}, "qzeros has dtype F32, accepted I32"),
        ({"qweight": torch.zeros(64, 9, dtype=torch.int32)}, "qweight has shape [64, 9], expected [64, 8]"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx is unexpected: AWQ has no order of rows"),
    ],
)
def test_a_damaged_module_is_refused_by_tensor(tmp_path: Path, changes: dict, message: str) -> None:
    write_container(tmp_path, "awq", ASYMMETRIC)
    edit(tmp_path, **{f"{Q0}.{part}": tensor for part, tensor in changes.items()})
    assert f"{Q0}.{message}" in refusal(tmp_path)


def test_sizes_that_fill_no_whole_words_are_refused(tmp_path: Path) -> None:
    write_container(tmp_path, "awq", ASYMMETRIC, declaration=AWQ_CONFIG)
    config = (tmp_path / "config.json").read_text().replace('"intermediate_size": 96', '"intermediate_size": 100')
    (tmp_path / "config.json").write_text(config)
    assert "64 inputs and 100 outputs cannot be stored as AWQ" in refusal(tmp_path)
