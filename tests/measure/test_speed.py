"""measure/speed.py and `ropewalk bench`: speeds beside the limits of the machine."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk import _core, native
from ropewalk.base.errors import RequestError, ShapeError, UnsupportedError
from ropewalk.faces.cli.main import main
from ropewalk.measure import speed
from ropewalk.measure.speed import measure_speeds
from ropewalk.model.loader import load_model
from their_folder import save_model


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "READ_FLOATS", 1 << 18)
    monkeypatch.setattr(speed, "PROBE_S", 0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed")
    write_checkpoint(path, {"max_position_embeddings": 64})
    return path


@pytest.mark.parametrize("isa", native.available_isas())
def test_limits_do_what_they_count(isa: str) -> None:
    runtime = native.Runtime(isa, 2)
    limits = runtime.limits(1 << 16)
    assert limits.read() == 4 << 16
    assert _core.probe_read(runtime.core, torch.arange(128, dtype=torch.float32).numpy()) == 127 * 64
    # 12 vectors of 16 lanes to a step; of four products, or of one; in 64 parts for each of 2 threads
    assert limits.multiply("int8", 64) == 2 * 64 * 12 * 16 * 8 and limits.multiply("f32", 1) == 2 * 64 * 12 * 16 * 2


def test_limits_refuse_what_they_cannot_take() -> None:
    runtime = native.Runtime("scalar", 1)
    with pytest.raises(ShapeError, match="kind is 'int4'; accepted: 'int8', 'f32'"):
        runtime.limits(64).multiply("int4", 1)
    with pytest.raises(ShapeError, match="steps is out of range"):
        runtime.limits(64).multiply("f32", 0)
    with pytest.raises(ShapeError, match="a multiple of 64"):
        _core.probe_read(runtime.core, torch.zeros(65).numpy())


def test_a_token_of_a_mixture_meets_the_experts_that_are_chosen_for_it(tmp_path: Path) -> None:
    settings = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    theirs = save_model(tmp_path, "qwen3_moe", **settings)
    numbers = {name: parameter.numel() for name, parameter in theirs.named_parameters() if parameter.ndim > 1}
    experts = sum(count for name, count in numbers.items() if ".experts." in name)
    met = sum(numbers.values()) - numbers["model.embed_tokens.weight"] - experts * 4 // 6
    model = load_model(tmp_path, backend="cpu", threads=1, head_bits="16")
    decoding, reading = measure_speeds(model, [8], 1).speeds
    attention = 4 * 4 * 16 * 2  # a product with a key and one with a value, heads, head size, layers
    assert decoding.operations == 2 * met + attention * 8
    held = sum(packed.num_bytes for layer in model.weights.layers for packed in layer.experts.values())
    weights = sum(layer.num_bytes for layer in model.weights.layers) + model.weights.head.num_bytes
    assert decoding.num_bytes == weights - held + held * 2 // 6 + model.cache_bytes(8)
    assert reading.num_bytes == pytest.approx(weights / 8)


def test_bytes_and_operations_are_those_of_the_model(folder: Path) -> None:
    model = load_model(folder, backend="cpu", threads=1)
    found = measure_speeds(model, [8, 16], 2)
    assert [one.name for one in found.speeds] == [
        *("decoding after 8", "decoding after 16", "reading 8", "reading 16"),
    ]
    assert found.kind == "int8" and len(found.limits) == 2
    decoding, reading = found.speeds[0], found.speeds[2]
    layers = sum(layer.num_bytes for layer in model.weights.layers)
    assert decoding.num_bytes == layers + model.weights.head.num_bytes + model.cache_bytes(8)
    assert reading.num_bytes == (layers + model.weights.head.num_bytes) / 8
    config = model.config
    square, kv = config.hidden_size**2, config.hidden_size * config.num_kv_heads * config.head_dim
    weights = config.num_layers * (2 * square + 2 * kv + 3 * config.hidden_size * config.intermediate_size)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim
    head = config.hidden_size * config.vocab_size
    assert decoding.operations == 2 * weights + 8 * attention + 2 * head
    assert reading.operations == 2 * weights + 4 * attention + 2 * head / 8
    for one in found.speeds:
        assert len(one.tokens_s) == 2 and all(value > 0 for value in (*one.tokens_s, *one.read_share))
        for rate, sample, share in zip(one.tokens_s, found.limits, one.operations_share, strict=True):
            assert share == pytest.approx(rate * one.operations / sample.operations)


def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    model = load_model(folder, backend="cpu", threads=1)
    with pytest.raises(RequestError, match="a prompt of 60 tokens and 8 more do not fit a context of 64"):
        measure_speeds(model, [60], 1)
    with pytest.raises(RequestError, match="at least one round and one length are needed, got 0 and 1"):
        measure_speeds(model, [8], 0)
    with pytest.raises(UnsupportedError, match="limits of a CPU, and this is backend 'reference'"):
        measure_speeds(load_model(folder, backend="reference"), [8], 1)


def test_the_command_prints_a_table_and_draws_the_roofline(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "roofline.svg"
    run = ["bench", "--backend", "cpu", "--threads", "1", "--rounds", "1", "--lengths", "16", "--compute", "exact"]
    assert main([*run, "--csv", "-", "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(out)))
    assert [row[0] for row in rows[1:]] == [
        *("limit: reading memory", "limit: f32 products", "decoding after 16", "reading 16"),
    ]
    assert "1 threads, " in err and "compute exact" in err
    for part in (">operations to a byte of memory<", ">reading 16<", "GOP/s<", "GB/s<"):
        assert part in plot.read_text()
    assert main(["bench", "--backend", "cpu", "--lengths", "999999"]) == 2
    assert "do not fit a context of" in capsys.readouterr().err


def test_no_tokenizer_is_needed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["bench", str(folder), "--backend", "cpu", "--threads", "1", "--rounds", "1", "--lengths", "8"]
    assert main(run) == 0
    assert "decoding after 8" in capsys.readouterr().out
