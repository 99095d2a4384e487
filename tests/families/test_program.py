"""A recorded layer: what it names, where its buffers lie, and that running it is running its operations one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_writer import model_config, write_checkpoint
from ropewalk.backends.protocol import LayerChange, LowRankPart, RowChange, RowSpan
from ropewalk.backends.reference import attention, layers, pages
from ropewalk.backends.reference.attention import Seen
from ropewalk.config.cache_format import CacheFormat
from ropewalk.config.model import parse_model_config
from ropewalk.families import FAMILIES
from ropewalk.families.program import (
    RESIDUAL,
    Activation,
    AddResidual,
    Append,
    Attend,
    Gate,
    LayerNorm,
    Linear,
    Program,
    RmsNorm,
    View,
)
from ropewalk.families.recorder import LayerShape, Recorder, record
from ropewalk.model.layers import PackedLayer, layer_program, layer_shape
from ropewalk.model.model import Model
from variants import Variant, variants

C, HQ, HKV, D, INNER = 64, 4, 2, 16, 96
SHAPE = LayerShape(C, INNER, HQ, HKV, D, qk_norm=True, window=17)


def views_of(operation: Any) -> Iterator[tuple[str, View]]:
    values = ((field.name, getattr(operation, field.name)) for field in fields(operation))
    return ((name, value) for name, value in values if isinstance(value, View))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, qk_norm=False, window=None)], ids=["norms", "plain"])
def test_every_view_lies_in_its_buffer_and_is_written_before_it_is_read(family: str, shape: LayerShape) -> None:
    for kind in FAMILIES[family].kinds.values():
        check_program(record(kind.layer, shape))


def check_program(program: Program) -> None:
    assert program.widths[RESIDUAL] == C
    written = {RESIDUAL}
    for operation in program.operations:
        for name, view in views_of(operation):
            assert 0 <= view.first < view.end <= program.widths[view.buffer]
            assert name == "out" or view.buffer in written
        out = getattr(operation, "out", None)
        if out is not None:
            assert out.buffer not in written and (out.first, out.end) == (0, program.widths[out.buffer])
            written.add(out.buffer)
    assert written == set(range(len(program.widths)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_names_the_weights_that_the_model_packs(family: str) -> None:
    raw = {**model_config("llama"), "model_type": family, "architectures": [FAMILIES[family].architectures[0]]}
    config = parse_model_config(raw, "config.json")
    operations = layer_program(family, layer_shape(config, 0)).operations
    linears = {operation.weight: operation for operation in operations if isinstance(operation, Linear)}
    groups = config.layer_table(0).groups
    assert set(linears) == set(groups)
    for name, entries in groups.items():
        assert linears[name].out.size == sum(config.sizes[entry.outputs] for entry in entries)
        assert linears[name].x.heads * linears[name].x.size == config.sizes[entries[0].inputs]
    normed = [operation for operation in operations if isinstance(operation, (RmsNorm, LayerNorm))]
    names = {norm.weight for norm in normed} | {norm.bias for norm in normed if isinstance(norm, LayerNorm)}
    assert names - {None} == {norm.field for norm in config.layer_table(0).norms}


def test_sizes_follow_the_equation() -> None:
    program = record(FAMILIES["llama"].kinds["decoder"].layer, SHAPE)
    found = {type(operation): operation for operation in program.operations}
    sizes = {op.weight: (op.x.heads * op.x.size, op.out.size) for op in program.operations if isinstance(op, Linear)}
    assert sizes == {"qkv": (C, (HQ + 2 * HKV) * D), "o": (HQ * D, C), "gate_up": (C, 2 * INNER), "down": (INNER, C)}
    k, v = found[Append].k, found[Append].v
    assert (k.heads, k.size, v.heads, v.size) == (HKV, D, HKV, D)
    assert (v.first, v.end) == ((HQ + HKV) * D, (HQ + 2 * HKV) * D)  # the last columns of qkv
    assert found[Attend].window == 17 and (found[Attend].q.heads, found[Attend].q.size) == (HQ, D)
    assert (found[Gate].gate_up.size, found[Gate].out.size) == (2 * INNER, INNER)
    assert sum(isinstance(operation, AddResidual) for operation in program.operations) == 2


def test_layers_of_one_kind_have_one_program() -> None:
    raw = model_config("qwen2") | {"num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2}
    config = parse_model_config(raw | {"sliding_window": 24}, "config.json")
    programs = [layer_program("qwen2", layer_shape(config, index)) for index in range(4)]
    assert programs[0] is programs[1] and programs[2] is programs[3] and programs[0] != programs[2]


def test_columns_are_split_without_a_rest() -> None:
    recorder = Recorder(C, {})
    first, second = recorder.split(recorder.residual, 1, 3, size=16)
    assert (first, second) == (View(RESIDUAL, 0, 1, 16), View(RESIDUAL, 16, 3, 16))
    with pytest.raises(ValueError, match="not the 64 columns"):
        recorder.split(recorder.residual, 1, 2, size=16)
    assert recorder.program == Program((C,), ())


class OneByOne:
    """A layer through the public operations of a backend, written here without the program."""

    def __init__(self, model: Model, variant: Variant) -> None:
        self.model, self.backend, self.native = model, model.backend, variant.backend == "cpu"
        config = model.config
        if self.native:
            from ropewalk import native

            self.kernels = native
            self.kv = native.KvCache(self.backend.runtime, config.num_kv_heads, config.head_dim, 512, "f32")
        else:
            pool = self.backend.new_pool(config.num_kv_heads, config.head_dim, CacheFormat.parse("fp32"), 1 << 30)
            self.pages = [pool.take(1) for _ in range(8)]

    def linear(self, x: torch.Tensor, layer: PackedLayer, name: str, changes: list[RowChange]) -> torch.Tensor:
        y = self.backend.linear(x, layer.linears[name])
        for rows in changes:
            change = rows.change.get(name)
            if change is not None:
                self.backend.add_low_rank_(y[rows.first : rows.end], x[rows.first : rows.end], change)
        return y

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        if self.native:
            self.kernels.rotate_(self.backend.runtime, x, cos, sin)
        else:
            attention.rotate_(x, cos, sin)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, window: int | None) -> torch.Tensor:
        if self.native:
            self.kv.append_(k, v, start)
            return self.kv.attend(q, start, window)
        pages.append_(self.pages, 0, k, v, start)
        return attention.attend(
            q, *pages.gathered(self.pages, 0, start + len(q)), start, Seen(window, q.shape[2] ** -0.5, None)
        )

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.native:
            return self.kernels.silu_mul(self.backend.runtime, gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return layers.activate(gate, Activation.SILU) * up

    def run_(
        self, x: torch.Tensor, index: int, cos: torch.Tensor, sin: torch.Tensor, start: int, changes: list[RowChange]
    ) -> None:
        config, layer = self.model.config, self.model.weights.layers[index]
        heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.norm_eps
        normed = self.backend.rms_norm(x, layer.norms["attn_norm"], eps)
        fused = self.linear(normed, layer, "qkv", changes).view(len(x), -1, config.head_dim)
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        if "q_norm" in layer.norms:
            q = self.backend.rms_norm(q, layer.norms["q_norm"], eps)
            k = self.backend.rms_norm(k, layer.norms["k_norm"], eps)
        self.rotate_(q, cos, sin)
        self.rotate_(k, cos, sin)
        seen = self.attend(q, k, v, start, config.sliding_windows[index])
        self.backend.add_(x, self.linear(seen, layer, "o", changes), 0.5)
        normed = self.backend.rms_norm(x, layer.norms["mlp_norm"], eps)
        inner = self.silu_mul(self.linear(normed, layer, "gate_up", changes))
        self.backend.add_(x, self.linear(inner, layer, "down", changes), 0.5)


def random_change(model: Model, seed: int) -> LayerChange:
    """A low-rank change of every linear but `o`."""
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def packed(in_features: int, *widths: int) -> Any:
        parts = [
            LowRankPart(torch.randn(3, in_features, generator=generator), torch.randn(n, 3, generator=generator))
            for n in widths
        ]
        return model.backend.pack_low_rank(parts)

    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv, gate_up = packed(hidden, queries, keys, keys), packed(hidden, inner, inner)
    return {"qkv": qkv, "gate_up": gate_up, "down": packed(inner, hidden)}


@pytest.mark.parametrize("variant", variants(), ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_replayed_layer_has_the_bits_of_its_operations_one_by_one(
    variant: Variant, family: str, tmp_path: Path
) -> None:
    overrides = {"sliding_window": 24} if family == "mistral" else {}
    write_checkpoint(tmp_path, overrides, family=family, desc_act=True, sym=False)
    model = variant.load(tmp_path, max_seq_len=256, cache_type="fp32")
    plain, config = OneByOne(model, variant), model.config
    pool = model.backend.new_pool(config.num_kv_heads, config.head_dim, CacheFormat.parse("fp32"), 1 << 30)
    held = tuple(pool.take(1) for _ in range(3))
    generator = torch.Generator().manual_seed(3)
    for start, num_rows in ((0, 70), (70, 1), (71, 30)):  # over the end of a page, one row, some more
        x = torch.randn(num_rows, config.hidden_size, generator=generator)
        expected = x.clone()
        cos, sin = (torch.from_numpy(table) for table in model.rope.rotation_tables(start, start + num_rows, 256))
        changes = [RowChange(num_rows // 2, num_rows, random_change(model, start))]
        plain.run_(expected, 1, cos, sin, start, changes)
        step = model.backend.begin_step(x, cos[None], sin[None], [RowSpan(num_rows, start, held)])
        model.backend.run_layer_(step, model.weights.layers[1].compiled, 0, 0.5, changes)
        assert torch.equal(x, expected)
