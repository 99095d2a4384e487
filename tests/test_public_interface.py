"""The documented Python interface, call by call, on a checkpoint that a real quantiser wrote."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch

import ropewalk
from accuracy import assert_as_accurate, error_of
from fixtures import LOCAL_DATA
from ropewalk import native
from ropewalk.base import errors as base_errors
from ropewalk.base.errors import ShapeError
from ropewalk.config.model import load_model_config
from ropewalk.config.quantisation import load_quant_config
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import GptqLinear, read_gptq_linear
from ropewalk.model.model import Model

FOLDER = LOCAL_DATA / "gptq" / "g4-64-qwen2-bias"  # act-order and biases

# The documented arguments of load_model and their defaults.
OPTIONS = {
    "max_seq_len": None,
    "max_input_len": 2048,
    "compute": "auto",
    "backend": "auto",
    "threads": None,
    "isa": None,
    "rope_scaling": None,
    "compress_pos_emb": None,
    "alpha_value": None,
    "rope_theta": None,
    "rope_growth": "rotate",
    "cache_type": "fp16",
    "cache_memory": None,
    "head_bits": "auto",
    "expert_memory": None,
}


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model() -> Model:
    return ropewalk.load_model(FOLDER, **OPTIONS)


@pytest.fixture(scope="module")
def linear() -> GptqLinear:
    config = load_model_config(FOLDER)
    quant = load_quant_config(FOLDER, config.raw)
    name = "model.layers.0.self_attn.q_proj"
    with Checkpoint(FOLDER) as checkpoint:
        return read_gptq_linear(checkpoint, name, config.hidden_size, config.hidden_size, quant.for_module(name))


def test_load_model_has_the_documented_arguments_in_order_with_their_defaults() -> None:
    parameters = inspect.signature(ropewalk.load_model).parameters
    assert list(parameters)[: len(OPTIONS) + 1] == ["folder", *OPTIONS]
    assert {name: parameters[name].default for name in OPTIONS} == OPTIONS


def test_forward_gives_logits_of_all_or_the_last_token(model: Model, expected: dict[str, np.ndarray]) -> None:
    token_ids, V = expected["input_ids"].tolist(), model.config.vocab_size
    every = model.forward(token_ids, model.new_cache(), logits="all")
    assert every.dtype == torch.float32 and every.shape == (len(token_ids), V)
    cache = model.new_cache(len(token_ids) + 1)
    last = model.forward(token_ids, cache)
    assert last.shape == (1, V) and torch.equal(last[0], every[-1])
    assert cache.length == len(token_ids) and cache.token_ids == token_ids
    assert model.forward([0], cache, logits="none") is None and cache.length == cache.capacity


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_forward_takes_token_ids_of_every_documented_kind(model: Model, kind: Any) -> None:
    want = model.forward([1, 2, 3], model.new_cache())
    assert torch.equal(model.forward(kind([1, 2, 3]), model.new_cache()), want)


def test_the_reference_backend_runs_the_same_model(expected: dict[str, np.ndarray]) -> None:
    model = ropewalk.load_model(FOLDER, backend="reference", compute="exact", cache_type="fp32", device="cpu")
    logits = model.forward(expected["input_ids"].tolist(), model.new_cache(), logits="all")
    positions = torch.from_numpy(expected["logits_positions"])
    assert logits[positions].argmax(1).tolist() == expected["logits"].argmax(1).tolist()


def test_config_and_rope_of_a_model_are_frozen(model: Model) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.vocab_size = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.rope.theta = 1.0
    with pytest.raises(TypeError):
        model.config.raw["vocab_size"] = 1


def test_rope_of_a_model_gives_its_frequencies(model: Model, expected: dict[str, np.ndarray]) -> None:
    inverse_frequencies, attention_scale = model.rope.inverse_frequencies(64)
    assert inverse_frequencies.dtype == np.float64 and inverse_frequencies.shape == (model.config.head_dim // 2,)
    np.testing.assert_allclose(inverse_frequencies, expected["rope_inv_freq"], rtol=1e-6)
    assert attention_scale == float(expected["rope_attention_scaling"])


def test_resolve_rope_gives_the_same_from_the_config_alone(model: Model) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    alone = ropewalk.resolve_rope(config)
    assert type(alone) is type(model.rope)
    np.testing.assert_array_equal(alone.inverse_frequencies(64)[0], model.rope.inverse_frequencies(64)[0])
    halved = ropewalk.resolve_rope(config, 1024, compress_pos_emb=2.0)
    np.testing.assert_allclose(2 * halved.inverse_frequencies(64)[0], alone.inverse_frequencies(64)[0], rtol=1e-12)


@pytest.mark.parametrize(
    "override",
    [
        {"compress_pos_emb": 4.0},
        {"alpha_value": 2.0},
        {"rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    ],
    ids=lambda override: next(iter(override)),
)
def test_rope_overrides_of_load_model_are_those_of_resolve_rope(override: dict[str, Any]) -> None:
    model = ropewalk.load_model(FOLDER, max_seq_len=700, threads=1, **override)
    alone = ropewalk.resolve_rope(json.loads((FOLDER / "config.json").read_text()), 700, **override)
    for ours, theirs in zip(model.rope.inverse_frequencies(700), alone.inverse_frequencies(700), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert model.max_seq_len == model.new_cache().capacity == 700
    assert next(iter(override)) in model.rope.describe()


def test_engine_streams_the_text_of_the_greedy_tokens(model: Model) -> None:
    tokenizer = ropewalk.load_tokenizer(FOLDER)
    engine = ropewalk.Engine(model, tokenizer)
    params = ropewalk.SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    pieces = []
    for piece in engine.stream("def main():", params):
        pieces.append(piece)
    ids = tokenizer.encode("def main():")
    start = len(ids)
    for _ in range(12):
        ids.append(int(model.forward(ids, model.new_cache()).argmax()))
    assert engine.generate("def main():", params).token_ids == ids[start:]
    assert len(pieces) > 1
    assert tokenizer.decode(ids) == tokenizer.decode(ids[:start]) + "".join(pieces)
    assert engine.last_stats.new_tokens == 12


def of_kind(kind: str, *tensors: torch.Tensor | None) -> list[Any]:
    return [tensor.numpy() if kind == "numpy" and tensor is not None else tensor for tensor in tensors]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_native_multiplies_with_a_packed_linear(linear: GptqLinear, kind: str) -> None:
    runtime = native.Runtime(threads=1)
    qweight, scales, zeros, starts = of_kind(kind, linear.qweight, linear.scales, linear.zeros, linear.group_starts)
    order, bias = of_kind(kind, linear.order, linear.bias)
    packed = native.pack_gptq(
        runtime,
        qweight,
        bits=linear.bits,
        in_features=linear.in_features,
        scales=scales,
        zeros=zeros,
        group_starts=starts,
        order=order,
        bias=bias,
    )
    weight = native.Linear(runtime, [packed])
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    want, plain = (
        x.to(dtype) @ linear.dequantise().to(dtype) + linear.bias.to(dtype) for dtype in (torch.float64, torch.float32)
    )
    (given,) = of_kind(kind, x)
    exact, int8 = weight(given, compute="exact"), weight(given)
    assert type(exact) is type(int8) is type(given)
    assert_as_accurate(exact, want, plain)
    assert error_of(int8, want).rms > 100 * error_of(exact, want).rms  # the default rounds activations


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_native_rotates_and_attends_in_chunks(kind: str) -> None:
    T, Hq, Hkv, D = 7, 4, 2, 32
    runtime = native.Runtime(threads=1)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(T, heads, D, generator=generator) for heads in (Hq, Hkv, Hkv))
    angles = torch.arange(T)[:, None] * (10000.0 ** (-torch.arange(0, D, 2) / D))  # [T, D/2]
    cos, sin = angles.cos(), angles.sin()
    wide = [each.double() for each in (q, k, v, cos, sin)]
    want, plain = (
        attention(rotated(q, cos, sin), rotated(k, cos, sin), v) for q, k, v, cos, sin in (wide, (q, k, v, cos, sin))
    )
    arrays = of_kind(kind, q.clone(), k.clone(), v, cos, sin)
    native.rotate_(runtime, arrays[0], arrays[3], arrays[4])
    native.rotate_(runtime, arrays[1], arrays[3], arrays[4])
    cache = native.KvCache(runtime, Hkv, D, capacity=16, dtype="f32")
    chunks = []
    for start, end in ((0, 4), (4, T)):
        cache.append_(arrays[1][start:end], arrays[2][start:end], start)
        chunks.append(cache.attend(arrays[0][start:end], start))
    assert all(type(chunk) is type(arrays[0]) for chunk in chunks)
    assert_as_accurate(np.concatenate([np.asarray(chunk) for chunk in chunks]), want, plain)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[T, Hq * D], causal, query head h on key head h // (Hq / Hkv)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (k, v))  # [Hq, T, D]
    scores = q.transpose(0, 1) @ k.mT / q.shape[-1] ** 0.5
    scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.tolist], ids=["float64", "list"])
def test_native_converts_nothing(convert: Any) -> None:
    with pytest.raises(ShapeError):
        native.silu_mul(native.Runtime(threads=1), convert(torch.zeros(2, 8)))


def test_the_folder_may_be_a_string(expected: dict[str, np.ndarray]) -> None:
    model = ropewalk.load_model(str(FOLDER), threads=1)
    assert model.forward(expected["input_ids"].tolist(), model.new_cache()).shape == (1, model.config.vocab_size)
    assert ropewalk.load_tokenizer(str(FOLDER)).source.parent == FOLDER


def test_the_paths_that_people_import_stay() -> None:
    for path, names in {
        "ropewalk.errors": [name for name in vars(base_errors) if name.endswith("Error")],
        "ropewalk.hf": ["RopewalkForCausalLM", "TokenHistory", "from_pretrained"],
        "ropewalk.native": ["Linear", "KvCache", "Runtime", "pack_gptq", "rms_norm", "rotate_"],
        "ropewalk.webui": ["register"],
    }.items():
        module = importlib.import_module(path)
        assert all(hasattr(module, name) for name in names), path
    assert all(getattr(ropewalk.errors, name) is getattr(base_errors, name) for name in ropewalk.errors.__all__)
