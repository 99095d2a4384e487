"""Adapters made by PEFT: the same logits as PEFT on transformers, on every backend, in every combination."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_writer import write_checkpoint
from peft_writer import peft_logits, write_adapter
from ropewalk.model import Model
from variants import Variant, variants

TOLERANCE = 5e-4  # logits have a standard deviation of about 1; float32 sums in two orders differ by 1e-5
INT8_ERROR = 0.1  # of the standard deviation: what quantised activations cost two layers of 64 features
IDS = [(37 * i + 11) % 128 for i in range(40)]


@dataclass
class Base:
    """A checkpoint with adapters for it, by name."""

    folder: Path
    exact: dict[str, torch.Tensor]
    adapters: dict[str, Path] = field(default_factory=dict)

    def expected(self, *chosen: tuple[str, float], ids: list[int] = IDS) -> torch.Tensor:
        return peft_logits(self.folder, self.exact, [(self.adapters[name], weight) for name, weight in chosen], ids)

    def load(self, variant: Variant, *names: str, **options: Any) -> Model:
        model = variant.load(self.folder, cache_type="fp32", **options)
        for name in names:
            model.load_adapter(self.adapters[name], name)
        return model


ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 16},
    "wide": {"r": 24, "lora_alpha": 24, "target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "r": 9},
    "regex": {"target_modules": r".*\.layers\.1\..*(k_proj|up_proj)"},
    "lower": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "upper": {"layers_to_transform": 1},
    "fanned": {"fan_in_fan_out": True},
    "patterns": {"rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"down_proj": 20}},
    "excluded": {"exclude_modules": ["o_proj"], "target_modules": ["q_proj", "o_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "gate_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "pickled": {"pickled": True},
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"dense": True},
    "gptq-act-order": {"desc_act": True, "sym": False},
}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param)
    made = Base(folder, write_checkpoint(folder, **KINDS[request.param]))
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        made.adapters[name] = write_adapter(folder / name, folder, made.exact, seed, **settings)
    return made


def run(model: Model, *chosen: tuple[str, float], ids: list[int] = IDS) -> torch.Tensor:
    return model.forward(ids, model.new_cache(), logits="all", adapters=chosen)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_adapter_gives_the_logits_of_peft(base: Base, name: str) -> None:
    expected = base.expected((name, 1.0))
    model = base.load(Variant("reference", "exact"), name)
    plain = model.forward(IDS, model.new_cache(), logits="all")
    assert (run(model, (name, 1.0)) - expected).abs().max() <= TOLERANCE
    assert (plain - expected).abs().max() > 100 * TOLERANCE  # the adapter matters


@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_every_backend_gives_the_logits_of_peft_for_stacked_weighted_adapters(base: Base, variant: Variant) -> None:
    chosen = [("all", 0.7), ("attention", -0.5), ("patterns", 1.25), ("embeddings", 0.8), ("head", 0.6)]
    expected = base.expected(*chosen)
    model = base.load(variant, *(name for name, _ in chosen))
    assert (run(model, *chosen) - expected).abs().max() <= TOLERANCE
    assert (run(model, *reversed(chosen)) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_int8_activations_cost_no_more_with_adapters(base: Base, variant: Variant) -> None:
    expected = base.expected(("all", 1.0), ("wide", 0.5))
    model = base.load(variant, "all", "wide")
    error = run(model, ("all", 1.0), ("wide", 0.5)) - expected
    assert error.square().mean().sqrt() <= INT8_ERROR * expected.std()
