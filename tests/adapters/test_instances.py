"""The same layer with a different LoRA each time, beside transformers with the layers written out and PEFT on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accuracy import assert_as_accurate, error_of
from gptq_writer import write_checkpoint
from peft_writer import ALL, peft_logits, write_adapter
from ropewalk.adapters.request import AdapterUse, parse_request
from ropewalk.base.errors import RequestError
from ropewalk.config.layer_order import parse_layer_order
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.model import Model
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_byte_level_json
from transformers_model import Logits
from variants import Variant, variants

NUM_LAYERS = 3
IDS = [(37 * i + 11) % 128 for i in range(30)]
REFERENCE = Variant("reference", "exact")
CORE = Variant("cpu", "exact")  # the same bits however a sequence is cut


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ act-order model of three layers with the adapters storm and poet, and one that changes the ends too."""
    path = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(path, {"num_hidden_layers": NUM_LAYERS}, desc_act=True, sym=False)
    save_file(exact, path / "exact.bin")
    write_adapter(path / "storm", path, exact, 1)
    write_adapter(path / "poet", path, exact, 2, r=7, target_modules=["q_proj", "o_proj", "down_proj"])
    write_adapter(path / "ends", path, exact, 3, target_modules=["v_proj", "embed_tokens", "lm_head"])
    return path


def loaded(folder: Path, variant: Variant = REFERENCE, **options) -> Model:
    model = variant.load(folder, cache_type="fp32", **options)
    for name in ("storm", "poet", "ends"):
        model.load_adapter(folder / name, name)
    return model


def run(model: Model, adapters: str | None, ids: list[int] = IDS) -> torch.Tensor:
    return model.forward(ids, model.new_cache(), logits="all", adapters=adapters)


def their_logits(folder: Path, scratch: Path, order: str, adapters: str) -> Logits:
    """The layers of the order written out, and for each use an adapter of the written-out model."""
    uses = parse_layer_order(order, NUM_LAYERS).uses
    exact = load_file(folder / "exact.bin")
    state = {name: tensor for name, tensor in exact.items() if not name.startswith("model.layers.")}
    for position, use in enumerate(uses):
        state |= copied(exact, "model.layers", use.layer, position, use.weight, ("o_proj", "down_proj"))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": len(uses)}
    scratch.mkdir()
    (scratch / "config.json").write_text(json.dumps(config))
    written = []
    for number, chosen in enumerate(parse_request(adapters)):
        positions = range(len(uses)) if chosen.instances is None else chosen.instances
        tensors = load_file(folder / chosen.name / "adapter_model.safetensors")
        copies = {
            name: tensor for name, tensor in tensors.items() if chosen.instances is None and ".layers." not in name
        }
        for position in positions:
            use = uses[position]
            factors = ("o_proj.lora_B", "down_proj.lora_B")
            copies |= copied(tensors, "base_model.model.model.layers", use.layer, position, use.weight, factors)
        settings = json.loads((folder / chosen.name / "adapter_config.json").read_text())
        if chosen.instances is not None:
            targets = [name for name in settings["target_modules"] if name in ALL]
            settings |= {"target_modules": targets, "layers_to_transform": list(positions), "layers_pattern": "layers"}
        (scratch / str(number)).mkdir()
        (scratch / str(number) / "adapter_config.json").write_text(json.dumps(settings))
        save_file(copies, scratch / str(number) / "adapter_model.safetensors")
        written.append((scratch / str(number), chosen.weight))
    return peft_logits(scratch, state, written, IDS)


def copied(
    tensors: dict[str, torch.Tensor], layers: str, source: int, target: int, factor: float, scaled: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The tensors of one layer under another number; what the layer adds to the sum is multiplied by its weight."""
    prefix = f"{layers}.{source}."
    return {
        f"{layers}.{target}.{name.removeprefix(prefix)}": tensor * (factor if any(s in name for s in scaled) else 1.0)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


CASES = [
    ("0-2", "storm@1"),
    ("0,1,1,1,2", "storm@1+poet@2"),  # layer 1 three times: with storm, with poet, plain
    ("0,1*3@0.5,2", "storm:0.5@1+storm:-1@2+poet@2-3"),  # with residual weights, and other weights of one adapter
    ("0-2,0-2", "storm:0.7@0,3-4+poet+ends:0.5"),
    ("2,1,0,1", "ends@0-1,3"),  # restricted: embeddings and head stay those of the model
]


@pytest.mark.parametrize("order, adapters", CASES)
def test_each_instance_has_the_adapters_it_was_given(folder: Path, tmp_path: Path, order: str, adapters: str) -> None:
    expected = their_logits(folder, tmp_path / "theirs", order, adapters)
    plain = run(loaded(folder, layer_order=order), None)
    assert error_of(plain, expected.exact).rms > 1e4 * expected.plain_error.rms  # adapters matter
    for variant in variants(compute="exact"):
        model = loaded(folder, variant, layer_order=order, max_input_len=7)
        assert_as_accurate(run(model, adapters), *expected)


@pytest.mark.parametrize("variant", variants(backend="cpu"), ids=str)
def test_chunks_threads_and_decoding_change_no_bit(folder: Path, variant: Variant) -> None:
    adapters = "storm:0.7@0,3-4+poet+ends:0.5"
    results = []
    for chunk, threads in ((1, 1), (7, 2), (40, 3)):
        results.append(
            run(loaded(folder, variant, layer_order="0-2,0-2", max_input_len=chunk, threads=threads), adapters)
        )
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_all_instances_are_the_same_as_none_named(folder: Path) -> None:
    model = loaded(folder, layer_order="0,1,1,2")
    assert torch.equal(run(model, "storm@0-3"), run(model, "storm"))
    assert torch.equal(run(model, "storm@0-1+storm@2-3"), run(model, "storm"))
    assert not torch.equal(run(model, "ends@0-3"), run(model, "ends"))  # embeddings and head belong to no instance


def test_a_prefix_is_reused_only_under_the_same_instances(folder: Path) -> None:
    model = loaded(folder, CORE, layer_order="0,1,1,2")
    cache = model.new_cache()
    model.forward(IDS[:10], cache, adapters="storm@1+poet@2")
    same = [("poet", 1, [2]), AdapterUse("storm", 1.0, (1,))]
    found = {
        str(other): model.reusable_prefix(cache, IDS, other) for other in (same, "storm@1", "storm@2+poet@1", "storm")
    }
    assert list(found.values()) == [10, 0, 0, 0]
    continued = model.forward(IDS[10:], cache, adapters=same)
    assert torch.equal(continued, run(model, "storm@1+poet@2")[-1:])


def test_instances_are_those_of_the_order_that_runs(folder: Path) -> None:
    model = loaded(folder, layer_order="0,1,1,2")
    before = run(model, "storm@2")
    model.set_layer_order("0,1,2")
    assert torch.equal(run(model, "storm@2"), run(loaded(folder), "storm@2"))
    assert not torch.equal(run(model, "storm@2"), before)
    with pytest.raises(
        RequestError, match="'storm@2-3': there is no layer instance 3: the layer order that runs has 3"
    ):
        run(model, "storm@2-3")
    model.set_layer_order("0,1,1,2")
    assert torch.equal(run(model, "storm@2"), before)


def test_unloading_forgets_the_sets_of_an_adapter(folder: Path) -> None:
    model = loaded(folder)
    before = run(model, "storm@1")
    model.unload_adapter("storm")
    with pytest.raises(RequestError, match="no adapter 'storm' is loaded"):
        run(model, "storm@1")
    model.load_adapter(folder / "poet", "storm")
    assert torch.equal(run(model, "storm@1"), run(model, "poet@1"))
    assert not torch.equal(run(model, "storm@1"), before)


def test_layers_of_a_second_model_take_no_adapter_and_say_so(folder: Path) -> None:
    model = loaded(folder, second_folder=folder, layer_order="a:0-2,b:1")
    with pytest.raises(RequestError, match="instance 3 belongs to the second model"):
        run(model, "storm@2-3")
    assert torch.equal(run(model, "storm@0-2"), run(model, "storm"))


def test_the_engine_takes_requests_as_text(tmp_path: Path) -> None:
    folder = write_byte_level_json(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    exact = write_checkpoint(folder, {"vocab_size": tokenizer.vocab_size}, dense=True)
    model = REFERENCE.load(folder, layer_order="0,1,1")
    model.load_adapter(write_adapter(tmp_path / "storm", folder, exact, 1), "storm")
    engine = Engine(model, tokenizer)
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    text = engine.generate("The quick", params, adapters="storm:0.5@1-2")
    assert text.token_ids == engine.generate("The quick", params, adapters=[("storm", 0.5, [1, 2])]).token_ids
    assert text.token_ids != engine.generate("The quick", params).token_ids
    with pytest.raises(RequestError, match="must be a number at column 7"):
        engine.stream("The quick", params, adapters="storm:x")
    with pytest.raises(RequestError, match="there is no layer instance 3"):
        engine.generate("The quick", params, adapters="storm@3")


def test_what_a_set_changes_in_a_layer_is_laid_out_once_for_all_orders(folder: Path) -> None:
    model = loaded(folder)
    packed = []
    pack = model.backend.pack_low_rank
    model.backend.pack_low_rank = lambda parts: packed.append(len(parts)) or pack(parts)
    before = run(model, "storm")
    assert len(packed) == 4 * NUM_LAYERS  # q, k and v together, o, gate and up together, down
    model.set_layer_order("0,1,1,2")
    run(model, "storm")
    run(model, "storm@1-3")
    model.set_layer_order()
    assert torch.equal(run(model, "storm"), before)
    assert len(packed) == 4 * NUM_LAYERS
