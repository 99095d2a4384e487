"""Adapters made by PEFT: the same logits as PEFT on transformers, on every backend, in every combination."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from accuracy import FACTOR, assert_as_accurate, error_of
from gptq_writer import write_checkpoint
from peft_writer import ALL, peft_logits, train_adapter, write_adapter
from ropewalk.base.errors import RequestError
from ropewalk.engine.engine import Engine
from ropewalk.generate.routing import route
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json
from transformers_model import Logits, their_logits
from variants import Variant, variants

IDS = [(37 * i + 11) % 128 for i in range(40)]
# Stacked adapters make a few tokens so sensitive that the error of one text is a matter of chance: this is longer.
LONG = torch.randint(0, 128, (160,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Base:
    """A checkpoint with adapters for it, by name."""

    folder: Path
    exact: dict[str, torch.Tensor]
    adapters: dict[str, Path] = field(default_factory=dict)

    def expected(self, *chosen: tuple[str, float], ids: list[int] = IDS) -> Logits:
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
    assert_as_accurate(run(model, (name, 1.0)), *expected)
    assert error_of(plain, expected.exact).rms > 1e4 * expected.plain_error.rms  # it matters


@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_every_backend_gives_the_logits_of_peft_for_stacked_weighted_adapters(base: Base, variant: Variant) -> None:
    chosen = [("all", 0.7), ("attention", -0.5), ("patterns", 1.25), ("embeddings", 0.8), ("head", 0.6)]
    expected = base.expected(*chosen, ids=LONG)
    model = base.load(variant, *(name for name, _ in chosen))
    assert_as_accurate(run(model, *chosen, ids=LONG), *expected)
    assert_as_accurate(run(model, *reversed(chosen), ids=LONG), *expected)


@pytest.mark.parametrize("base", ["gptq-act-order"], indirect=True)  # dense layers do not round their activations
@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_int8_activations_cost_no_more_with_adapters(base: Base, variant: Variant) -> None:
    """Adapters make a model more sensitive to any rounding, to that of float32 as well: the two grow alike."""
    chosen = [("all", 1.0), ("wide", 0.5)]
    model = base.load(variant, "all", "wide")

    def cost(expected: Logits, *adapters: tuple[str, float]) -> float:
        return error_of(run(model, *adapters, ids=LONG), expected.exact).rms / expected.plain_error.rms

    without = cost(their_logits(base.folder, base.exact, LONG))
    assert cost(base.expected(*chosen, ids=LONG), *chosen) <= FACTOR * without


@pytest.mark.parametrize("variant", variants(backend="cpu"), ids=str)
def test_chunks_and_threads_change_no_bit_with_adapters(base: Base, variant: Variant) -> None:
    names = ("wide", "embeddings", "head", "saved")
    chosen = [(name, 0.5) for name in names]
    results = [
        run(base.load(variant, *names, max_input_len=chunk, threads=threads), *chosen)
        for chunk, threads in ((1, 1), (7, 2), (40, 3))
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_adapters_change_between_requests_of_one_conversation(base: Base, variant: Variant) -> None:
    """Each turn extends the last and goes through what the cache has: the result is that of a fresh run."""
    model = base.load(variant, "all", "attention")
    cache = model.new_cache()
    turns = [(), [("all", 1.0)], [("all", 1.0)], [("all", 0.5)], [("attention", 1.0), ("all", 0.5)], None]
    for number, adapters in enumerate(turns, 1):
        prompt = IDS[: 6 * number]
        cache.truncate(model.reusable_prefix(cache, prompt, adapters))
        logits = model.forward(prompt[cache.length :], cache, adapters=adapters)
        fresh = model.forward(prompt, model.new_cache(), adapters=adapters)
        if variant.backend == "cpu":
            assert torch.equal(logits, fresh)
        if adapters:
            assert_as_accurate(logits, *base.expected(*adapters, ids=prompt).from_row(len(prompt) - 1))


@pytest.mark.parametrize("variant", variants(compute="exact", backend="cpu"), ids=str)
def test_adapters_follow_their_layers_through_any_order(base: Base, variant: Variant) -> None:
    model = base.load(variant, "all", "upper")
    plain = run(model, ("all", 1.0))
    model.set_layer_order("1,0,1")
    changed = run(model, ("upper", 1.0))
    assert not torch.equal(changed, run(model))
    model.set_layer_order("0-1")
    assert torch.equal(run(model, ("all", 1.0)), plain)


def test_layers_lent_by_a_second_model_take_no_adapter(base: Base) -> None:
    own = base.load(Variant("reference", "exact"), "upper", second_folder=base.folder, layer_order="a:0,a:1")
    lent = base.load(Variant("reference", "exact"), "upper", second_folder=base.folder, layer_order="a:0,b:1")
    assert torch.equal(run(lent, ("upper", 1.0)), run(lent))
    assert torch.equal(run(lent), run(own))
    assert not torch.equal(run(own, ("upper", 1.0)), run(own))


@pytest.fixture(scope="module")
def model(base: Base) -> Model:
    return base.load(Variant("reference", "exact"), "all", "attention")


def test_a_prefix_is_reused_only_under_the_same_set(model: Model) -> None:
    cache = model.new_cache()
    model.forward(IDS[:10], cache, adapters=["all"])
    reusable = {
        "same": ["all"],
        "equal": [("all", 1), ("attention", 0.0)],
        "none": None,
        "other weight": [("all", 0.5)],
        "other": ["attention"],
        "more": ["all", "attention"],
    }
    found = {name: model.reusable_prefix(cache, IDS, adapters) for name, adapters in reusable.items()}
    assert found == {"same": 10, "equal": 10, "none": 0, "other weight": 0, "other": 0, "more": 0}
    cache.truncate(4)
    model.forward(IDS[4:8], cache)
    assert model.reusable_prefix(cache, IDS, ["all"]) == 4


def test_an_adapter_loaded_anew_under_an_old_name_is_another(base: Base) -> None:
    model = base.load(Variant("reference", "exact"), "all")
    cache = model.new_cache()
    before = model.forward(IDS, cache, adapters=["all"])
    model.unload_adapter("all")
    assert model.adapters == ()
    with pytest.raises(RequestError, match=r"no adapter 'all' is loaded \(loaded: none\)"):
        model.forward(IDS, model.new_cache(), adapters=["all"])
    model.load_adapter(base.adapters["wide"], "all")
    assert model.reusable_prefix(cache, IDS, ["all"]) == 0
    after = model.forward(IDS, model.new_cache(), adapters=["all"])
    other = base.load(Variant("reference", "exact"), "wide")
    assert torch.equal(after, other.forward(IDS, other.new_cache(), adapters=["wide"]))
    assert not torch.equal(after, before)


def test_a_name_alone_counts_one(model: Model) -> None:
    assert torch.equal(
        model.forward(IDS, model.new_cache(), adapters=["all"]),
        model.forward(IDS, model.new_cache(), adapters=(("all", 1.0),)),
    )


def test_weights_of_zero_and_empty_sets_give_the_bits_of_the_model(model: Model) -> None:
    plain = model.forward(IDS, model.new_cache())
    for adapters in ([], (), [("all", 0)], [("all", 0.0), ("attention", 0)]):
        assert torch.equal(model.forward(IDS, model.new_cache(), adapters=adapters), plain)


def test_many_sets_in_turn_give_the_same_as_the_first_time(model: Model) -> None:
    first = run(model, ("all", 0.25))
    for step in range(12):
        run(model, ("all", 1 + step), ids=IDS[:2])
    assert torch.equal(run(model, ("all", 0.25)), first)


@pytest.mark.parametrize(
    "adapters, message",
    [
        ("nobody", "no adapter 'nobody' is loaded"),
        ({"all": 1.0}, "must be a list such as"),
        (7, "must be a list such as"),
        (["nobody"], r"no adapter 'nobody' is loaded \(loaded: 'all', 'attention'\)"),
        ([7], "must be a name or .* got 7"),
        ([("all", 1.0, 2.0)], "the instances of 'all' must be None, a list of numbers, or text"),
        ([["all"], 1.0], "must be a name"),
        ([("all", 1.0), "all"], "'all' is named twice"),
        ([("all", "1")], "weight of 'all' must be a finite number, got '1'"),
        ([("all", float("nan"))], "must be a finite number, got nan"),
        ([("all", True)], "must be a finite number"),
        ([("all", None)], "must be a finite number"),
    ],
)
def test_a_wrong_choice_of_adapters_is_refused_and_changes_nothing(model: Model, adapters: Any, message: str) -> None:
    cache = model.new_cache()
    with pytest.raises(RequestError, match=message):
        model.forward(IDS, cache, adapters=adapters)
    with pytest.raises(RequestError, match=message):
        model.reusable_prefix(cache, IDS, adapters)
    assert cache.length == 0


@pytest.mark.parametrize("name", ["", None, 7])
def test_an_adapter_needs_a_name(base: Base, model: Model, name: Any) -> None:
    with pytest.raises(RequestError, match="must be a non-empty string"):
        model.load_adapter(base.adapters["all"], name)


def test_a_name_is_given_once(base: Base, model: Model) -> None:
    with pytest.raises(RequestError, match="'all' is loaded already: unload it first"):
        model.load_adapter(base.adapters["wide"], "all")
    with pytest.raises(RequestError, match="no adapter 'wide'"):
        model.unload_adapter("wide")


SCALED = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("noted_by", ["argument", "folder"])
def test_a_rope_other_than_the_models_is_warned_about(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture, noted_by: str
) -> None:
    folder = Path(shutil.copytree(base.adapters["all"], tmp_path / "adapter"))
    if noted_by == "folder":
        edit(folder, rope_scaling=SCALED)
    note = {"rope_scaling": SCALED} if noted_by == "argument" else {}
    base.load(Variant("reference", "exact"), rope_scaling=SCALED).load_adapter(folder, "scaled", **note)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    base.load(Variant("reference", "exact")).load_adapter(folder, "scaled", **note)
    assert "made for another RoPE" in caplog.text and "linear, factor 4" in caplog.text


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_two_adapters_route_the_text_they_were_made_for(base: Base) -> None:
    """Prompts that the model itself writes under an adapter are least surprising under that adapter."""
    model = base.load(Variant("reference", "exact"), "all", "wide")
    for name in (None, "all", "wide"):
        adapters = [] if name is None else [name]
        ids = [5]
        for _ in range(24):
            ids.append(int(model.forward(ids, model.new_cache(), adapters=adapters)[0].argmax()))
        routing = route(Scheduler(model), ids)
        assert routing.adapter == name
        assert [scored for scored, _ in routing.scores] == [None, "all", "wide"]
        logits = model.forward(ids, model.new_cache(), logits="all", adapters=routing.adapters)
        nll = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))
        assert dict(routing.scores)[name] == pytest.approx(float(nll.exp()), rel=1e-5)
        assert (name or "no adapter") in routing.describe()


def text(kind: str, seed: int, num_tokens: int) -> list[int]:
    """Two kinds of made-up text: one climbs through the vocabulary in threes, the other chants from a few words."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "climbs":
        start = int(torch.randint(0, 128, (1,), generator=generator))
        return [(start + 3 * i) % 128 for i in range(num_tokens)]
    words = [[7, 90, 12], [7, 33], [101, 12, 12, 5]]
    choices = torch.randint(0, 3, (num_tokens,), generator=generator).tolist()
    return [token_id for choice in choices for token_id in words[choice]][:num_tokens]


def test_adapters_trained_on_different_text_route_text_of_their_own_kind(tmp_path: Path) -> None:
    exact = write_checkpoint(tmp_path, desc_act=True)
    model = Variant("reference", "int8").load(tmp_path)
    for kind in ("climbs", "chants"):
        model.load_adapter(train_adapter(tmp_path / kind, tmp_path, exact, text(kind, 0, 512)), kind)
    for kind in ("climbs", "chants"):
        for seed in (1, 2, 3):  # not what it was trained on
            routing = route(Scheduler(model), text(kind, seed, 40))
            scores = dict(routing.scores)
            assert routing.adapter == kind
            assert scores[kind] < 0.5 * min(score for name, score in scores.items() if name != kind)


FAMILIES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen2", {}, {"bits": 8}),
    ("qwen3", {}, {"bits": 3, "desc_act": True}),
    ("mistral", {}, {"bits": 2, "sym": False}),
    ("llama", {"tie_word_embeddings": True}, {"bits": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}, {"quantised_lm_head": True, "group_size": -1}),
]


@pytest.mark.parametrize("family, overrides, options", FAMILIES)
def test_adapters_work_on_every_family_and_bit_width(
    tmp_path: Path, family: str, overrides: dict[str, Any], options: dict[str, Any]
) -> None:
    exact = write_checkpoint(tmp_path, overrides, family=family, **options)
    targets = [*ALL, "embed_tokens", "lm_head"]
    base = Base(tmp_path, exact, {"a": write_adapter(tmp_path / "a", tmp_path, exact, target_modules=targets)})
    expected = base.expected(("a", 1.0))
    for variant in variants(compute="exact"):
        assert_as_accurate(run(base.load(variant, "a"), ("a", 1.0)), *expected)


def test_routing_needs_two_tokens_and_can_be_cancelled(model: Model) -> None:
    with pytest.raises(RequestError, match="at least 2 tokens"):
        route(Scheduler(model), [5])
    assert route(Scheduler(model), IDS, lambda: True) is None


def test_the_engine_streams_with_adapters_and_routes(tmp_path: Path) -> None:
    folder = write_byte_level_json(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    exact = write_checkpoint(folder, {"vocab_size": tokenizer.vocab_size}, dense=True)
    model = Variant("reference", "exact").load(folder)
    for seed, name in enumerate(("storm", "poet")):
        model.load_adapter(write_adapter(tmp_path / name, folder, exact, seed), name)
    engine = Engine(model, tokenizer)
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    plain = engine.generate("The quick", params)
    stacked = engine.generate("The quick", params, adapters=[("storm", 1.0), ("poet", 0.5)])
    again = engine.generate("The quick", params, adapters=[("poet", 0.5), ("storm", 1.0)])
    assert plain.token_ids != stacked.token_ids == again.token_ids
    assert (plain.routing, stacked.stats.reused_tokens) == (None, 0)
    assert again.stats.reused_tokens == again.stats.prompt_tokens - 1
    routed = engine.generate("The quick", params, adapters="auto")
    best = min(routed.routing.scores, key=lambda item: item[1])[0]
    assert routed.routing.adapter == best
    assert routed.token_ids == engine.generate("The quick", params, adapters=routed.routing.adapters).token_ids
    with pytest.raises(RequestError, match="no adapter 'best' is loaded"):
        engine.generate("The quick", params, adapters="best")
    with pytest.raises(RequestError, match="no adapter 'nobody'"):
        engine.generate("The quick", params, adapters=["nobody"])
    assert engine.generate("The quick", params).token_ids == plain.token_ids
    assert model.forward(plain.token_ids, model.new_cache(), adapters=["storm", ("poet", 0.5)]).isfinite().all()
