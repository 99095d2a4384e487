"""Options, messages and the order of work when a folder becomes a model."""

from __future__ import annotations

import logging
import sys
import weakref
from pathlib import Path

import pytest

import ropewalk
from gptq_writer import write_checkpoint
from ropewalk.base.errors import CheckpointError, ConfigError, NativeError, RopewalkError
from ropewalk.model import loader
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model

LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader")
    write_checkpoint(path, desc_act=True)
    return path


def reference(folder: Path, **options) -> Model:
    return load_model(folder, backend="reference", **options)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("compute", "fast", "compute must be one of 'auto', 'int8', 'fp16', 'exact', got 'fast'"),
        ("compute", None, "compute must be one of"),
        ("backend", "cuda", "backend must be one of 'auto', 'cpu', 'gpu', 'reference', got 'cuda'"),
        ("backend", ["cpu"], "backend must be one of"),
        ("cache_type", "q5", "cache_type: there is no 'q5'; accepted are fp32, fp16, q8"),
        ("max_seq_len", 0, "max_seq_len must be a positive integer, got 0"),
        ("max_seq_len", "4096", "max_seq_len must be a positive integer, got '4096'"),
        ("max_seq_len", 1 << 40, "max_seq_len must be at most"),
        ("max_input_len", 0, "max_input_len must be a positive integer"),
        ("max_input_len", None, "max_input_len must be a positive integer"),
        ("max_input_len", 2.5, "max_input_len must be a positive integer"),
        ("max_attention_size", -1, "max_attention_size must be a positive integer"),
        ("cache_memory", 0, "cache_memory must be a positive integer, got 0"),
        ("cache_memory", "4G", "cache_memory must be a positive integer, got '4G'"),
        ("threads", 0, "threads must be a positive integer"),
        ("threads", True, "threads must be a positive integer"),
        ("threads", 2, 'threads=2 is an option of backend="cpu"'),
        ("gpu_layers", -1, "gpu_layers must be an integer from 0 on, got -1"),
        ("gpu_layers", 8, 'gpu_layers=8 is an option of backend="gpu"; leave it out for "reference"'),
        ("gpu_split", "10;20", "gpu_split must be GiB for each card, such as '10,20', got '10;20'"),
        ("gpu_split", "10,-1", "gpu_split must be a positive number of GiB for each card, got '10,-1'"),
        ("gpu_split", 10, "gpu_split must be GiB for each card"),
        ("gpu_split", "10", "gpu_split='10' is an option of backend=\"gpu\""),
        ("compute", "fp16", 'compute=\'fp16\' is arithmetic of backend="gpu"; backend="reference" computes in'),
        ("isa", "avx2", "isa='avx2' is an option of backend=\"cpu\""),
        ("device", "abacus", "device='abacus' cannot be used here"),
        ("device", 3.5, "device=3.5 cannot be used here"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_accepted(folder: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(folder, **{"backend": "reference", option: value})
    assert message in str(caught.value)


@pytest.mark.parametrize("rope_option", ["alpha_value", "compress_pos_emb", "rope_theta"])
def test_wrong_rope_options_are_refused(folder: Path, rope_option: str) -> None:
    for value in (-1.0, float("nan"), "four"):
        with pytest.raises(RopewalkError, match=rope_option):
            reference(folder, **{rope_option: value})


def test_the_cpu_backend_has_no_other_device(folder: Path) -> None:
    with pytest.raises(ConfigError, match='device=\'cuda\' needs backend="gpu" or "reference"'):
        load_model(folder, backend="cpu", device="cuda")


@pytest.mark.parametrize("not_a_path", [None, 7, b"model"])
def test_a_folder_must_be_a_path(not_a_path: object) -> None:
    with pytest.raises(ConfigError, match="must be a path"):
        load_model(not_a_path, backend="reference")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RopewalkError, match="nowhere"):
        reference(tmp_path / "nowhere")


def test_without_the_compiled_core_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ropewalk._core", None)
    for attribute in ("_core", "native"):
        monkeypatch.delitem(vars(ropewalk), attribute, raising=False)  # not delattr: asking would import it
    native = [name for name in sys.modules if name.split(".")[:2] == ["ropewalk", "native"]]
    for module in (*native, "ropewalk.backends.cpu"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(NativeError, match="pip install .*reference"):
        load_model(folder)


def test_progress_counts_layers_and_the_head(folder: Path) -> None:
    seen = []
    reference(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_what_was_read_of_a_layer_is_gone_before_the_next_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_layer, read = loader.read_layer, []

    def watched_read(config, quant, checkpoint, index):
        assert [qweight() for qweight in read] == [None] * index
        weights = read_layer(config, quant, checkpoint, index)
        read.append(weakref.ref(weights.linears["down"].qweight))
        return weights

    monkeypatch.setattr(loader, "read_layer", watched_read)
    load_model(folder, threads=1)
    assert len(read) == 2


@pytest.mark.parametrize(
    "error, message", [(OSError(5, "I/O error"), "I/O error"), (MemoryError(), "not enough memory")]
)
def test_failures_while_reading_name_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(loader, "read_layer", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        reference(folder)
    assert str(folder) in str(caught.value)


def test_loading_logs_the_rope_decision_and_the_memory(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ropewalk")
    model = reference(folder, compress_pos_emb=2.0)
    lines = [record.getMessage() for record in caplog.records if record.name == "ropewalk.model.loader"]
    assert lines[0] == model.rope.describe() and "compress_pos_emb" in lines[0]
    assert (
        "llama, 2 layers" in lines[1]
        and "4-bit" in lines[1]
        and "cache of 512 positions: 128.0 KiB, 4.0 GiB for all" in lines[1]
    )
    assert len(lines) == 2


@pytest.mark.parametrize("options, expected", [({}, 256), ({"compress_pos_emb": 2.0}, 512), ({"max_seq_len": 99}, 99)])
def test_the_default_length_is_what_rope_covers(folder: Path, options: dict, expected: int) -> None:
    model = reference(folder, **options)
    assert model.max_seq_len == model.new_cache().capacity == expected


def test_more_context_than_rope_covers_warns_with_the_remedy(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = reference(folder, max_seq_len=1024)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    for part in ("1024", "256", "alpha_value=4"):
        assert part in warnings[0]
    assert model.max_seq_len == 1024


def test_covered_context_does_not_warn(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference(folder, max_seq_len=512, rope_scaling=LINEAR)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_weight_bytes_count_a_tied_table_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (False, True):
        path = tmp_path / str(tied)
        write_checkpoint(path, {"tie_word_embeddings": tied}, dense=True)
        sizes[tied] = reference(path, head_bits=16).weight_bytes
    hidden, inner, vocab, kv = 64, 96, 128, 32
    layer = 2 * (2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * inner) + 4 * 2 * hidden
    assert sizes[True] == 2 * layer + 4 * hidden + 2 * vocab * hidden
    assert sizes[False] == sizes[True] + 2 * vocab * hidden


def test_memory_of_the_cache_is_planned_by_length(folder: Path) -> None:
    model = reference(folder)
    cache = model.new_cache(100)
    assert cache.num_bytes == 0
    model.forward([1] * 100, cache)
    assert model.cache_bytes(100) == cache.num_bytes == model.cache_used == 2 * 2 * 2 * 16 * 128 * 2  # two pages


def test_a_quantised_model_takes_a_fraction_of_a_dense_one(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dense=True)
    tables = 2 * 2 * 128 * 64  # embeddings and head, float16 in both
    whole = reference(tmp_path, head_bits=16).weight_bytes - tables
    assert reference(folder, head_bits=16).weight_bytes - tables < 0.5 * whole
