"""model/head.py: a head stored in floats is held in codes, by one rule on every backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.gptq.linear import DenseLinear, GptqLinear
from ropewalk.model.backends import make_backend
from ropewalk.model.head import RUN_INPUTS, held_head, rounded_bits
from ropewalk.model.info import model_info
from ropewalk.model.loader import load_model
from ropewalk.model.options import LoadOptions
from variants import Variant, variants

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def head(num_outputs: int = 37, num_inputs: int = 160, dtype: torch.dtype = torch.float16) -> DenseLinear:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * torch.rand(num_outputs, 1, generator=generator)
    return DenseLinear("lm_head", weight.to(dtype), torch.arange(num_outputs, dtype=torch.float32))


def runs_of(weight: torch.Tensor, bits: int) -> list[torch.Tensor]:
    return list(weight.float().split(RUN_INPUTS[bits], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_weight_is_within_half_a_step_of_its_run(bits: int, dtype: torch.dtype) -> None:
    stored = head(dtype=dtype)
    held = held_head(stored, bits, "exact")
    assert isinstance(held, GptqLinear) and held.bits == bits and held.scales.dtype == torch.float16
    got = held.dequantise().T  # [V, C]
    for want, rounded in zip(runs_of(stored.weight, bits), runs_of(got, bits), strict=True):
        low, high = want.amin(1).clamp_max(0), want.amax(1).clamp_min(0)
        step = torch.maximum(high, -low) / 127 if bits == 8 else (high - low) / 15
        # Half a step; with 4 bits the zero point is rounded too, and scales are rounded to 11 bits.
        allowed = step * (0.5 + 127 / 2048) if bits == 8 else step * (1.0 + 15 / 2048)
        assert bool(((want - rounded).abs() <= allowed[:, None]).all())
    assert torch.equal(held.bias, stored.bias)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_the_nearest_ones(bits: int) -> None:
    stored = head(5, 64)
    held = held_head(stored, bits, "int8")
    groups = held.group_index()
    codes, scales = held.codes().float(), held.scales.float()[groups]  # [C, V]
    exact = stored.weight.float().T / scales + held.zeros.float()[groups]
    lowest = 1 if bits == 8 else 0
    assert torch.equal(codes, exact.round().clamp(lowest, 2**bits - 1))


def test_zeros_stay_zeros_and_scales_outside_of_float16_are_kept_in_float32() -> None:
    weight = torch.zeros(3, 64)
    assert not bool(held_head(DenseLinear("lm_head", weight, None), 8, "exact").dequantise().any())
    weight[1] = 1e-6
    weight[2] = torch.linspace(-1e8, 1e8, 64)
    held = held_head(DenseLinear("lm_head", weight, None), 8, "exact")
    assert held.scales.dtype == torch.float32
    torch.testing.assert_close(held.dequantise().T[1:], weight[1:], rtol=5e-3, atol=4e5)
    assert float(held.dequantise()[0, 1]) == pytest.approx(1e-6, rel=1e-3)


def test_rows_are_rounded_alike_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = held_head(head(), 8, "int8")
    monkeypatch.setattr("ropewalk.gptq.rounding.BLOCK_FLOATS", 3 * 160)
    parts = held_head(head(), 8, "int8")
    assert torch.equal(whole.qweight, parts.qweight) and torch.equal(whole.scales, parts.scales)


def test_the_arithmetic_decides_where_no_number_is_given() -> None:
    assert [rounded_bits("auto", compute) for compute in ("int8", "exact", "fp16")] == [8, None, None]
    assert [rounded_bits(bits, "exact") for bits in (8, "4", 16)] == [8, 4, None]
    stored = head()
    assert held_head(stored, "auto", "exact") is stored and held_head(stored, 16, "int8") is stored
    codes = held_head(stored, 8, "int8")
    assert held_head(codes, 4, "int8") is codes  # a head that is stored in codes stays as it is


def test_rows_that_do_not_fill_words_stay_as_stored_or_are_refused() -> None:
    odd = replace(head(), weight=torch.ones(4, 36).half())
    assert isinstance(held_head(odd, 8, "int8"), GptqLinear)
    with pytest.raises(UnsupportedError, match="head_bits=4: lm_head has 36 inputs, and a multiple of 8 is needed"):
        held_head(odd, 4, "int8")
    odd = replace(odd, weight=torch.ones(4, 35).half())
    assert held_head(odd, "auto", "int8") is odd


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head")
    write_checkpoint(path, {"tie_word_embeddings": request.param})
    return path


def logits(folder: Path, variant: Variant, **options: object) -> torch.Tensor:
    model = variant.load(folder, **options)
    return model.forward(IDS, model.new_cache(), logits="all")


@pytest.mark.parametrize("variant", variants(), ids=str)
def test_logits_are_close_to_those_of_the_stored_head_and_exact_keeps_it(folder: Path, variant: Variant) -> None:
    stored = logits(folder, variant, head_bits=16)
    assert torch.equal(logits(folder, variant), logits(folder, variant, head_bits=8)) == (variant.compute == "int8")
    assert torch.equal(logits(folder, variant), stored) == (variant.compute == "exact")
    error = [float((logits(folder, variant, head_bits=bits) - stored).norm() / stored.norm()) for bits in (8, 4)]
    assert 0 < error[0] < 0.01 < error[1] < 0.15


@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_its_activations_are_not_rounded(variant: Variant) -> None:
    backend = make_backend(LoadOptions(backend=variant.backend, compute="int8", isa=variant.isa))
    stored = head(64, 160)
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1))
    held = held_head(stored, 8, "int8")
    exact = x.double() @ held.dequantise().double() + held.bias
    torch.testing.assert_close(backend.linear(x, backend.pack([held])).double(), exact, rtol=1e-5, atol=1e-5)


def test_memory_is_planned_as_it_is_used(folder: Path) -> None:
    options = {"backend": "cpu", "threads": 1}
    planned = {bits: model_info(folder, backend="cpu", head_bits=bits).weight_bytes for bits in (16, 8, 4)}
    used = {bits: load_model(folder, head_bits=bits, **options).weight_bytes for bits in (16, 8, 4)}
    for bits in (8, 4):
        assert abs((planned[bits] - planned[16]) - (used[bits] - used[16])) <= 64  # where groups begin
    assert model_info(folder, backend="cpu").weight_bytes == planned[8]
    assert model_info(folder, backend="cpu", compute="exact").weight_bytes == planned[16]


def test_keys_and_values_do_not_depend_on_it(folder: Path, tmp_path: Path) -> None:
    models = [load_model(folder, backend="cpu", threads=1, head_bits=bits) for bits in (8, 16)]
    cache = models[0].new_cache()
    models[0].forward(IDS, cache)
    models[0].save_cache(cache, tmp_path / "kept")
    assert models[1].load_cache(tmp_path / "kept").length == len(IDS)


@pytest.mark.parametrize("value", [True, 5, "2", None])
def test_other_numbers_are_refused(folder: Path, value: object) -> None:
    with pytest.raises(ConfigError, match="head_bits must be one of 'auto', '8', '4', '16', got"):
        load_model(folder, head_bits=value)
