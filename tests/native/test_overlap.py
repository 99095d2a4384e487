"""An output that shares memory with an input is refused: kernels read the one while they write the other."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kernel_support import same_bits
from ropewalk import _core, native
from ropewalk.base.errors import ShapeError

RUNTIME = native.Runtime(None, 1)
CORE = RUNTIME.core


def overlapping(written: str, read: str):
    return pytest.raises(ShapeError, match=re.escape(f"{written} overlaps {read} in memory"))


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def pair(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays that share exactly one element: the last of the first is the first of the second."""
    sizes = int(np.prod(first)), int(np.prod(second))
    memory = f32(sum(sizes) - 1)
    return memory[: sizes[0]].reshape(first), memory[sizes[0] - 1 :].reshape(second)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_linear_refuses_an_output_over_its_input(swapped):
    group = _core.LinearGroup([_core.dense_linear(f32(8, 8), "f32", None)])
    x, out = pair((2, 8), (2, 8))[:: -1 if swapped else 1]
    with overlapping("out", "x"):
        group.run(CORE, "exact", x, out, None)


def test_a_linear_refuses_an_output_over_its_weights():
    weight, out = pair((8, 8), (2, 8))
    bias, other_out = pair((8,), (2, 8))
    group = _core.LinearGroup([_core.dense_linear(weight, "f32", bias)])
    with overlapping("out", "the weight"):
        group.run(CORE, "exact", f32(2, 8), out, None)
    with overlapping("out", "the bias"):
        group.run(CORE, "exact", f32(2, 8), other_out, None)


@pytest.mark.parametrize("which", ["a", "b"])
def test_a_low_rank_change_refuses_an_output_over_its_matrices_or_input(which):
    matrices = {"a": f32(1, 1, 4, 16), "b": f32(1, 3, 16)}
    matrices[which], out = pair(matrices[which].shape, (2, 8))
    change = _core.LowRank(matrices["a"], None, 8, "f32", [(8, matrices["b"], None)])
    group = _core.LinearGroup([_core.dense_linear(f32(8, 8), "f32", None)])
    with overlapping("out", "the matrices of a low-rank change"):
        change.add(CORE, f32(2, 8), out)
    with overlapping("out", "the matrices of a low-rank change"):
        group.run(CORE, "exact", f32(2, 8), out, change)
    x, out = pair((2, 8), (2, 8))
    with overlapping("out", "x"):
        change.add(CORE, x, out)


def test_a_norm_refuses_an_output_over_its_input_or_weight():
    x, out = pair((2, 3, 8), (2, 3, 8))
    with overlapping("out", "x"):
        _core.rms_norm(CORE, x, f32(8), 1e-6, out)
    with overlapping("out", "x"):
        _core.rms_norm(CORE, x, f32(8), 1e-6, x)
    weight, out = pair((8,), (2, 8))
    with overlapping("out", "weight"):
        _core.rms_norm(CORE, f32(2, 8), weight, 1e-6, out)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_a_rotation_refuses_tables_within_what_it_rotates(name):
    tables = {"cos": f32(2, 4), "sin": f32(2, 4)}
    tables[name], x = pair((2, 4), (2, 1, 8))
    with overlapping("x", name):
        _core.rotate(CORE, x, tables["cos"], tables["sin"])


def test_a_gate_refuses_an_output_over_its_input():
    gate_up, out = pair((2, 16), (2, 8))
    with overlapping("out", "gate_up"):
        _core.activate(CORE, gate_up, "silu", True, out)


def test_a_sum_refuses_what_overlaps_the_target():
    x, y = pair((2, 8), (2, 8))
    with overlapping("x", "y"):
        native.add_(RUNTIME, x, y)
    with overlapping("x", "y"):
        native.add_(RUNTIME, x, x)


def test_an_embedding_refuses_an_output_over_its_table():
    table, out = pair((4, 8), (1, 8))
    with overlapping("out", "the table"):
        _core.embed(CORE, _core.dense_linear(table, "f32", None), np.array([0]), out)


def test_attention_refuses_an_output_over_its_queries():
    cache = _core.KvCache(1, 8, 10, "f32")
    _core.append(CORE, cache, f32(2, 1, 8), f32(2, 1, 8), 0)
    q, out = pair((2, 2, 8), (2, 16))
    with overlapping("out", "q"):
        _core.attend(CORE, q, cache, 0, 0, 1.0, 0.0, "int8", out)


def test_neighbours_in_one_array_do_not_overlap():
    """Rows of x and out lie between each other, as the parts of a fused projection do; only a shared column counts."""
    rng = np.random.default_rng(0)
    weight, values = (rng.standard_normal(shape, dtype=np.float32) for shape in ((8, 8), (5, 8)))
    group = _core.LinearGroup([_core.dense_linear(weight, "f32", None)])
    expected = native.Linear(RUNTIME, [native.dense_linear(weight)])(values)
    for x_columns, out_columns in ((slice(0, 8), slice(8, 16)), (slice(8, 16), slice(0, 8))):
        memory = f32(5, 16)
        memory[:, x_columns] = values
        group.run(CORE, "int8", memory[:, x_columns], memory[:, out_columns], None)
        assert same_bits(memory[:, out_columns].copy(), expected) and same_bits(memory[:, x_columns].copy(), values)
    with overlapping("out", "x"):
        group.run(CORE, "int8", memory[:, 0:8], memory[:, 7:15], None)
    with overlapping("out", "x"):
        group.run(CORE, "int8", memory[:, 7:15], memory[:, 0:8], None)


def test_empty_arrays_overlap_nothing():
    memory = f32(4, 8)
    group = _core.LinearGroup([_core.dense_linear(f32(8, 8), "f32", None)])
    group.run(CORE, "exact", memory[:0], memory[:0], None)
