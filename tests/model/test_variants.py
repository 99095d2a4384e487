"""model/variants.py and measure/compare.py: one set of weights, computed in several ways, each as if loaded so."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch

from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.base.errors import ConfigError, RequestError, UnsupportedError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.generate.evaluate import perplexity
from ropewalk.measure.compare import compare_perplexity, curves_csv
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.variants import adapter_variant, open_variant, scaling_variant, variant_model
from ropewalk.rope.spellings import AS_LOADED, SCALINGS

IDS = torch.randint(0, 64, (96,), generator=torch.Generator().manual_seed(1)).tolist()
RUN = {"backend": "reference", "compute": "exact", "cache_type": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(folder, {"vocab_size": 64, "max_position_embeddings": 16}, dense=True)
    write_adapter(folder / "storm", folder, exact, 1)
    return folder


@pytest.fixture(scope="module")
def folder_of_codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    write_checkpoint(folder, {"vocab_size": 64, "max_position_embeddings": 64})
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, max_seq_len=16, **RUN)


def logits(model: Model, adapters: list[tuple[str, float]] | None = None) -> torch.Tensor:
    return model.forward(IDS[:32], model.new_cache(), logits="all", adapters=adapters)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_variant_computes_what_a_model_loaded_with_that_scaling_does(folder: Path, model: Model, name: str) -> None:
    made, adapters = open_variant(model, scaling_variant(model, name, 4.0), 32)
    scaling = {"rope_type": "default"} if name == "none" else {"rope_type": name, "factor": 4.0}
    loaded = load_model(folder, max_seq_len=32, rope_scaling=scaling, **RUN)
    assert torch.equal(logits(made), logits(loaded)) and adapters is None


def test_a_variant_shares_the_weights_and_leaves_the_model_as_it_is(model: Model) -> None:
    before = model.forward(IDS[:16], model.new_cache(), logits="all")
    made = variant_model(model, scaling_variant(model, "yarn", 2.0).rope, 32, layer_order=[0, 0, 1])
    assert made.weights is model.weights and len(made.instances) == 3 and made.max_seq_len == 32
    assert torch.equal(model.forward(IDS[:16], model.new_cache(), logits="all"), before)
    assert not model.accepts(made.new_cache())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_other_arithmetic_and_another_cache_share_the_packed_weights(
    folder_of_codes: Path, backend: str, compute: str
) -> None:
    other = {"exact": "int8", "int8": "exact"}[compute]
    model = load_model(folder_of_codes, backend=backend, compute=compute, cache_type="fp16", head_bits=16)
    made = variant_model(model, compute=other, cache_format=CacheFormat.parse("q8"))
    loaded = load_model(folder_of_codes, backend=backend, compute=other, cache_type="q8", head_bits=16)
    assert torch.equal(logits(made), logits(loaded))
    assert not torch.equal(logits(made), logits(model))
    for ours, theirs in zip(made.weights.layers, model.weights.layers, strict=True):
        assert all(ours.linears[name] is theirs.linears[name] for name in theirs.linears)
    assert made.weight_bytes == model.weight_bytes and (made.backend.compute, model.backend.compute) == (other, compute)


def test_arithmetic_that_the_weights_do_not_serve_is_refused(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="for compute=.fp16. the model must be loaded anew"):
        variant_model(model, compute="fp16")


@pytest.mark.parametrize("head_bits", ["auto", 8, 4])
def test_other_arithmetic_is_refused_where_it_would_hold_the_head_otherwise(
    folder_of_codes: Path, head_bits: str | int
) -> None:
    model = load_model(folder_of_codes, backend="reference", compute="int8", head_bits=head_bits)
    if head_bits == "auto":
        with pytest.raises(UnsupportedError, match=r"held for compute='int8' \(head_bits=auto\): .* loaded anew"):
            variant_model(model, compute="exact")
        return
    loaded = load_model(folder_of_codes, backend="reference", compute="exact", head_bits=head_bits)
    assert torch.equal(logits(variant_model(model, compute="exact")), logits(loaded))


def test_an_adapter_brings_the_scaling_that_it_notes(folder: Path, model: Model) -> None:
    plain = adapter_variant(model, "storm", folder / "storm")
    assert plain.rope == model.rope
    made, adapters = open_variant(model, plain, 32)
    assert adapters == [("storm", 1.0, None)] and not torch.equal(logits(made, adapters), logits(made))
    config = folder / "storm" / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace("{", '{"rope_scaling": {"rope_type": "linear", "factor": 4.0},', 1))
    assert adapter_variant(model, "storm", folder / "storm").rope.method.name == "linear"
    config.write_text(text)


def test_curves_are_those_of_each_scaling_alone(model: Model) -> None:
    variants = [scaling_variant(model, AS_LOADED, 1.0), scaling_variant(model, "linear", 2.0)]
    seen: list[tuple[int, int]] = []
    curves = compare_perplexity(model, IDS, [8, 32], variants, progress=lambda *step: seen.append(step))
    assert [curve.name for curve in curves] == [AS_LOADED, "linear"]
    for curve, variant in zip(curves, variants, strict=True):
        alone = perplexity(open_variant(model, variant, 32)[0], IDS, [8, 32])
        assert [row.mean_nll for row in curve.rows] == [row.mean_nll for row in alone]
    assert seen == sorted(seen) and seen[-1] == (4 * 96, 4 * 96)
    table = list(csv.DictReader(io.StringIO(curves_csv(curves))))
    assert [(row["variant"], row["length"]) for row in table] == [
        (AS_LOADED, "8"),
        (AS_LOADED, "32"),
        ("linear", "8"),
        ("linear", "32"),
    ]


def test_once_cancelled_no_variant_begins(model: Model) -> None:
    variants = [scaling_variant(model, "none", 1.0)] * 3
    assert compare_perplexity(model, IDS, [8], variants, cancelled=lambda: True) == []


def test_what_is_no_scaling_is_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="scaling 'spiral' is not known; accepted are as loaded, none, linear"):
        scaling_variant(model, "spiral", 2.0)
    with pytest.raises(ConfigError, match="factor"):
        scaling_variant(model, "yarn", -1.0)
