"""What files and options may say, the compiled core takes: a model is refused before it is loaded, or runs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk import _core, native
from ropewalk.base import limits
from ropewalk.base.errors import ConfigError, NativeError, ShapeError
from ropewalk.config.quantisation import BITS_BY_FORMAT
from ropewalk.files.folder import Checkpoint
from ropewalk.model.loader import load_model

RUNTIME = native.Runtime(None, 1)
CORE = RUNTIME.core
HUGE = 1 << 57  # as large as numpy makes them


def test_the_limits_of_files_and_options_are_those_of_the_core():
    ours = {
        "HEADS": limits.MAX_HEADS,
        "HEAD_DIM": limits.MAX_HEAD_DIM,
        "POSITIONS": limits.MAX_SEQ_LEN,
        "EXPERTS": limits.MAX_EXPERTS,
        "THREADS": limits.MAX_THREADS,
    }
    assert {name: _core.LIMITS[name] for name in ours} == ours
    widest = {
        "fused q, k and v": 3 * limits.MAX_HEADS * limits.MAX_HEAD_DIM,
        "fused gate and up": 2 * limits.MAX_FEATURES,
        "head": limits.MAX_VOCAB,
        "adapters of one linear": 1000 * limits.MAX_RANK,
        "rows of a prompt": limits.MAX_SEQ_LEN,
    }
    assert {name: size for name, size in widest.items() if size > _core.LIMITS["FEATURES"]} == {}


def test_every_number_of_bits_that_a_configuration_can_declare_is_packed():
    for bits in {bits for accepted in BITS_BY_FORMAT.values() for bits in accepted}:
        packed = native.pack_gptq(
            RUNTIME,
            np.zeros((bits, 32), np.int32),
            bits=bits,
            in_features=32,
            scales=np.ones((1, 32), np.float32),
            zeros=np.zeros((1, 32), np.uint8),
            group_starts=np.array([0, 32]),
            planar=bits in (5, 6, 7),
        )
        assert packed.num_bytes > 0


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_the_largest_head_attends(dtype):
    """A head of 8192 was accepted by config.json and refused by the core, once all weights had been read."""
    size = limits.MAX_HEAD_DIM
    cache = native.KvCache(RUNTIME, 1, size, 64, dtype)
    k, v, q = (torch.randn(5, 1, size, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    cache.append_(k, v, 0)
    if dtype == "f16":
        k, v = k.half().float(), v.half().float()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(0, 1) for t in (q, k, v)), is_causal=True
    )
    assert torch.allclose(cache.attend(q, 0, None, "exact").double(), expected[0], atol=1e-4)


def test_a_model_with_the_largest_head_runs(tmp_path):
    config = {"hidden_size": 32, "head_dim": 8192, "num_attention_heads": 1, "num_key_value_heads": 1}
    write_checkpoint(tmp_path, {**config, "num_hidden_layers": 1}, dense=True)
    model = load_model(tmp_path, max_seq_len=8, threads=1)
    assert bool(model.forward([1, 2, 3], model.new_cache()).isfinite().all())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_dim": 8194}, "head_dim must be an integer from 2 to 8192, found 8194"),
        ({"num_attention_heads": 1 << 15}, "num_attention_heads must be an integer from 1 to 16384"),
        ({"hidden_size": 1 << 21}, "hidden_size must be an integer from 1 to 1048576"),
        ({"vocab_size": 1 << 25}, "vocab_size must be an integer from 1 to 16777216"),
        ({"max_position_embeddings": 1 << 25}, "speaks of 33554432 positions, and at most 16777216 can be run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_core_does_not_take_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, change, message):
    write_checkpoint(tmp_path, dense=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_model(tmp_path, threads=1)


def test_a_norm_takes_the_largest_epsilon_that_a_configuration_can_have(tmp_path):
    write_checkpoint(tmp_path, {"rms_norm_eps": 1.0}, dense=True)
    model = load_model(tmp_path, max_seq_len=8, threads=1)
    assert bool(model.forward([1, 2, 3], model.new_cache()).isfinite().all())


@pytest.mark.parametrize("threads", [1025, 2**40])
def test_too_many_threads_are_a_wrong_option(tmp_path, threads):
    write_checkpoint(tmp_path, dense=True)
    with pytest.raises(ConfigError, match=f"threads must be at most 1024, got {threads}"):
        load_model(tmp_path, threads=threads)
    with pytest.raises(NativeError, match=f"threads must be between 1 and 1024, got {threads}"):
        native.Runtime(None, threads)


def empty(*shape: int) -> np.ndarray:
    """An array without elements, however large its sizes are."""
    return np.lib.stride_tricks.as_strided(np.zeros(0, np.float32), shape, (4,) * len(shape))


EMPTY_GIANTS = {
    "gate": lambda: _core.activate(CORE, empty(0, HUGE), "silu", True, empty(0, HUGE)),
    "sum": lambda: _core.add(CORE, empty(0, HUGE), empty(0, HUGE), 1.0),
    "norm": lambda: _core.rms_norm(CORE, empty(0, HUGE, 8), np.ones(8, np.float32), 1e-6, empty(0, HUGE, 8)),
    "rotation": lambda: _core.rotate(CORE, empty(0, HUGE, 8), empty(0, 4), empty(0, 4)),
    "angles": lambda: _core.rotate(CORE, empty(0, 1, 8), empty(0, HUGE), empty(0, HUGE)),
    "attention": lambda: _core.attend(
        CORE, empty(0, HUGE, 8), _core.KvCache(1, 8, 8, "f16"), 0, 0, 1.0, 0.0, "int8", empty(0, 8)
    ),
    "append": lambda: _core.append(CORE, _core.KvCache(1, 8, 8, "f16"), empty(0, HUGE, 8), empty(0, HUGE, 8), 0),
}


@pytest.mark.parametrize("name", EMPTY_GIANTS)
def test_sizes_of_empty_arrays_are_bounded_before_they_are_multiplied(name):
    with pytest.raises(ShapeError, match="a dimension can have at most"):
        EMPTY_GIANTS[name]()


def test_more_heads_than_any_model_has_are_refused():
    x = np.zeros((1, limits.MAX_HEADS + 1, 2), np.float32)
    with pytest.raises(ShapeError, match="x has 16385 heads; accepted: at most 16384"):
        native.rotate_(RUNTIME, x, np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))


def test_linears_side_by_side_have_at_most_so_many_outputs():
    part = (_core.LIMITS["FEATURES"], None, None)
    with pytest.raises(ShapeError, match="the output features of all parts are out of range"):
        _core.LowRank(np.zeros((1, 1, 4, 16), np.float32), None, 8, "f32", [part, part])


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: _core.dense_linear(np.zeros((4, 8), np.float32), "f32", [0.0] * 4), "bias is a list"),
        (lambda: _core.LowRank(np.zeros((1, 1, 4, 16), np.float32), None, 8, "f32", [(8, 5, None)]), "b is a int"),
        (
            lambda: _core.LowRank(np.zeros((1, 1, 4, 16), np.int8), "s", 8, "i8", [(8, None, None)]),
            "needs a part of a rank above 0",
        ),
        (
            lambda: _core.LowRank(
                np.zeros((1, 1, 4, 16), np.int8), "s", 8, "i8", [(8, np.zeros((1, 1, 16), np.int8), "t")]
            ),
            "scales of b is a str",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_array_where_none_is_accepted_too_is_refused(call, name):
    with pytest.raises(ShapeError, match=re.escape(name)):
        call()


@pytest.mark.parametrize("name", ["order", "bias"])
def test_packing_refuses_what_is_neither_array_nor_none(name):
    with pytest.raises(ShapeError, match=f"{name} is a list; accepted: a numpy array or None"):
        arguments = {
            "qweight": np.zeros((4, 16), np.int32),
            "bits": 4,
            "planar": False,
            "in_features": 32,
            "scales": np.ones((1, 16), np.float32),
            "zeros": np.zeros((1, 16), np.uint8),
            "group_starts": np.array([0, 32]),
            "order": None,
            "bias": None,
        }
        _core.pack_gptq(CORE, **{**arguments, name: [0] * 32})
