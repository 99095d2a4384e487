"""The model as a transformers model: logits, loss, caches, adapters, settings, unloading."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import ropewalk.hf
from gptq_writer import write_checkpoint
from hf_checkpoint import EXACT, V, checkpoint, fresh_logits, ours, theirs, tokens
from peft_writer import write_adapter
from ropewalk.base.errors import RequestError, UnsupportedError
from ropewalk.generate.evaluate import perplexity
from ropewalk.hf import RopewalkForCausalLM, TokenHistory
from ropewalk.model.loader import load_model


@pytest.fixture(scope="module")
def shared() -> RopewalkForCausalLM:
    return ours()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), *checkpoint())


def forwards(monkeypatch, model: RopewalkForCausalLM) -> list[tuple[int, str]]:
    """Of every call of `Model.forward` from now on: how many tokens, which logits."""
    calls, real = [], model.ropewalk_model.forward

    def forward(ids, cache, logits="last", *args, **options):
        calls.append((len(ids), logits))
        return real(ids, cache, logits, *args, **options)

    monkeypatch.setattr(model.ropewalk_model, "forward", forward)
    return calls


def test_logits_are_those_of_the_engine_bit_for_bit(shared) -> None:
    ids = tokens(40)
    out = shared(ids)
    assert out.logits.shape == (1, 40, V) and out.logits.dtype == torch.float32
    assert torch.equal(out["logits"][0], fresh_logits(shared.ropewalk_model, ids[0].tolist()))


@pytest.mark.parametrize("keep", [1, 2, 7, 39, 40, 100])
def test_logits_to_keep_gives_the_last_rows_whatever_is_cached(shared, keep: int) -> None:
    ids = tokens(40)
    assert torch.equal(shared(ids, logits_to_keep=keep).logits, shared.get_prompt_logits(ids)[:, -keep:])


def test_logits_agree_with_transformers_on_the_same_weights(shared) -> None:
    ids = tokens(60, seed=3)
    with torch.no_grad():
        expected = theirs()(ids).logits
    torch.testing.assert_close(shared(ids).logits, expected, atol=5e-4, rtol=0)


def test_only_what_is_new_is_computed(monkeypatch) -> None:
    model = ours()
    calls = forwards(monkeypatch, model)
    first = tokens(30)
    model(first, logits_to_keep=1)
    model(torch.cat([first, tokens(5, seed=1)], dim=1), logits_to_keep=1)
    model(first[:, :20], logits_to_keep=1)
    assert calls == [(30, "last"), (5, "last"), (1, "last")]


def test_a_loader_can_make_the_last_row_the_default(monkeypatch) -> None:
    model = ours()
    model.logits_by_default = 1
    assert model(tokens(10)).logits.shape == (1, 1, V)
    assert model(tokens(10), logits_to_keep=0).logits.shape == (1, 10, V)


def test_a_history_is_continued_as_a_transformers_cache_is(shared) -> None:
    ids = tokens(30)
    out = shared(ids[:, :10])
    assert out.past_key_values.get_seq_length() == 10
    out = shared(input_ids=ids[:, 10:25], past_key_values=out.past_key_values)
    whole = fresh_logits(shared.ropewalk_model, ids[0].tolist())
    assert torch.equal(out.logits[0], whole[10:25])
    out.past_key_values.crop(12)
    assert torch.equal(shared(ids[:, 12:], past_key_values=out.past_key_values).logits[0], whole[12:])


def test_use_cache_and_return_dict_are_honoured(shared) -> None:
    ids = tokens(4)
    assert shared(ids, use_cache=False).past_key_values is None
    (logits,) = shared(ids, use_cache=False, return_dict=False)
    assert torch.equal(logits, shared(ids).logits)


def test_prompt_logits_take_rows_lists_and_tensors(shared) -> None:
    ids = tokens(9)
    assert torch.equal(shared.get_prompt_logits(ids[0].tolist()), shared.get_prompt_logits(ids))
    assert torch.equal(shared.get_prompt_logits(ids[0])[0], fresh_logits(shared.ropewalk_model, ids[0].tolist()))


def test_the_loss_is_the_cross_entropy_of_the_next_token(shared) -> None:
    ids = tokens(50, seed=2)
    labels = ids.clone()
    labels[:, :20] = -100
    labels[:, 33] = -100
    with torch.no_grad():
        expected = theirs()(ids, labels=labels).loss
    out = shared(input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, expected, atol=1e-4, rtol=0)
    assert torch.equal(out.logits[0], fresh_logits(shared.ropewalk_model, ids[0].tolist())[-1:])


def test_the_loss_agrees_with_the_perplexity_command(shared) -> None:
    ids = tokens(64, seed=5)
    row = perplexity(shared.ropewalk_model, ids[0].tolist(), [64])[0]
    assert float(shared(ids, labels=ids).loss) == pytest.approx(row.mean_nll, rel=1e-6)


def test_the_loss_is_computed_in_blocks_of_rows(monkeypatch) -> None:
    model, ids = ours(max_input_len=16), tokens(50)
    expected = model(ids, labels=ids).loss
    monkeypatch.setattr("ropewalk.faces.hf.runner.LOGITS_BYTES", 4 * V * 8)
    calls = forwards(monkeypatch, model)
    assert torch.allclose(model(ids, labels=ids).loss, expected, rtol=1e-6)
    assert max(rows for rows, kind in calls if kind == "all") == 8
    labels = ids.clone()
    labels[:, :45] = -100
    calls.clear()
    model(ids + 1 - 100 * (ids > 100), labels=labels)  # other tokens, so that nothing is cached
    assert calls == [(16, "none"), (16, "none"), (12, "none"), (6, "all"), (1, "last")]


def test_a_loss_without_a_label_is_nan_as_in_torch(shared) -> None:
    ids = tokens(5)
    assert torch.isnan(shared(ids, labels=torch.full_like(ids, -100)).loss)
    assert torch.isnan(shared(ids[:, :1], labels=ids[:, :1]).loss)


def test_a_conversation_goes_on_after_a_loss(shared) -> None:
    ids = tokens(20)
    history = shared(ids[:, :10]).past_key_values
    shared(tokens(30, seed=9), labels=tokens(30, seed=9))
    expected = fresh_logits(shared.ropewalk_model, ids[0].tolist())[10:]
    assert torch.equal(shared(ids[:, 10:], past_key_values=history).logits[0], expected)


def test_adapters_are_chosen_by_name_and_weight(adapter) -> None:
    model, ids = ours(), tokens(20)
    base = model(ids, logits_to_keep=1).logits
    model.load_adapter_folder(adapter, "storm")
    assert model.adapters == ("storm",) and model.used_adapters == ()
    assert torch.equal(model(ids, logits_to_keep=1).logits, base)
    model.set_adapters([("storm", 0.5)])
    changed = model(ids, logits_to_keep=1).logits
    assert model.used_adapters == (("storm", 0.5),)
    assert torch.equal(changed[0], fresh_logits(model.ropewalk_model, ids[0].tolist(), adapters=[("storm", 0.5)])[-1:])
    assert not torch.equal(changed, base)
    model.set_adapters(None)
    assert torch.equal(model(ids, logits_to_keep=1).logits, base)


def test_a_change_of_adapters_within_a_history_is_noticed(adapter) -> None:
    model, ids = ours(), tokens(20)
    model.load_adapter_folder(adapter, "storm")
    history = model(ids[:, :15]).past_key_values
    model.set_adapters(["storm"])
    out = model(ids[:, 15:], past_key_values=history)
    expected = fresh_logits(model.ropewalk_model, ids[0].tolist(), adapters=["storm"])[15:]
    assert torch.equal(out.logits[0], expected)
    model.unload_adapter("storm")
    assert model.adapters == () and model.used_adapters == ()
    model.load_adapter_folder(adapter, "storm")  # the new one of the same name is a different one
    model.set_adapters(["storm"])
    assert torch.equal(model(ids).logits[0, 15:], expected)


def test_adapters_can_be_given_as_text_and_on_single_instances(adapter) -> None:
    model, ids = ours(), tokens(20)
    model.load_adapter_folder(adapter, "storm")
    model.set_adapters("storm:0.5@1")
    assert model.used_adapters == (("storm", 0.5, (1,)),)
    expected = fresh_logits(model.ropewalk_model, ids[0].tolist(), adapters="storm:0.5@1")
    assert torch.equal(model(ids).logits[0], expected)
    model.set_adapters(model.used_adapters)
    assert torch.equal(model(ids).logits[0], expected)


def test_adapters_that_are_not_loaded_are_refused_and_those_in_use_stay(adapter) -> None:
    model = ours()
    model.load_adapter_folder(adapter, "storm")
    model.set_adapters(["storm"])
    with pytest.raises(RequestError, match="no adapter 'poet' is loaded"):
        model.set_adapters(["poet"])
    assert model.used_adapters == (("storm", 1.0),)


def test_a_layer_order_changed_underneath_is_followed() -> None:
    model, ids = ours(), tokens(12)
    history = model(ids[:, :8]).past_key_values
    model.ropewalk_model.set_layer_order("0,0,1")
    out = model(ids[:, 8:], past_key_values=history)
    assert torch.equal(out.logits[0], fresh_logits(model.ropewalk_model, ids[0].tolist())[8:])


def test_the_configuration_is_that_of_the_folder_with_the_context_that_was_loaded() -> None:
    model = ours(max_seq_len=512, alpha_value=2.5)
    config = model.config
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 64, V)
    assert config.max_position_embeddings == 512
    assert not hasattr(config, "quantization_config")
    assert config.name_or_path == str(checkpoint()[0])
    assert model.generation_config.eos_token_id == 2
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_scalings_that_transformers_does_not_know_do_not_hinder_it(tmp_path) -> None:
    write_checkpoint(
        tmp_path, {"rope_scaling": {"type": "ntk-by-parts", "factor": 2.0}, "original_max_position_embeddings": 128}
    )
    model = ropewalk.hf.from_pretrained(tmp_path)
    assert model(tokens(5)).logits.shape == (1, 5, V)


def test_the_generation_settings_of_the_folder_are_used(tmp_path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "top_k": 7, "eos_token_id": [2, 9]})
    )
    settings = ropewalk.hf.from_pretrained(tmp_path).generation_config
    assert (settings.do_sample, settings.top_k, settings.eos_token_id) == (True, 7, [2, 9])


def test_the_weights_stay_out_of_the_module() -> None:
    model = RopewalkForCausalLM.from_pretrained(checkpoint()[0], **EXACT)
    assert not list(model.parameters()) and not model.state_dict() and not list(model.children())
    assert not model.training
    assert model.eval() is model and model.to("cpu") is model and model.to(torch.float32) is model


def test_a_model_loaded_already_can_be_wrapped() -> None:
    loaded = load_model(checkpoint()[0], **EXACT)
    assert RopewalkForCausalLM(loaded).ropewalk_model is loaded


REFUSED = {
    "batch": (lambda m: m(tokens(6).view(2, 3)), UnsupportedError, "holds 2 sequences.*call once for each"),
    "embeddings": (
        lambda m: m(tokens(3), inputs_embeds=torch.zeros(1, 3, 64)),
        UnsupportedError,
        "inputs_embeds is",
    ),
    "hidden states": (
        lambda m: m(tokens(3), output_hidden_states=True),
        UnsupportedError,
        "output_hidden_states is",
    ),
    "attentions": (lambda m: m(tokens(3), output_attentions=True), UnsupportedError, "output_attentions is not"),
    "padding": (
        lambda m: m(tokens(3), attention_mask=torch.tensor([[0, 1, 1]])),
        UnsupportedError,
        "hides 1 tokens.*without padding",
    ),
    "no ids": (lambda m: m(), RequestError, r"input_ids must be an integer tensor of shape \[1, T\], got NoneType"),
    "floats": (lambda m: m(torch.zeros(1, 3)), RequestError, r"got torch.float32 of shape \[1, 3\]"),
    "empty": (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), RequestError, "there are no token ids"),
    "unknown id": (lambda m: m(torch.tensor([[3, V]])), RequestError, "token id 128 at position 1 is out of range"),
    "too long": (lambda m: m(tokens(257)), RequestError, "the prompt has 257 tokens, 1 more than the context of 256"),
    "long labels": (lambda m: m(tokens(3), labels=tokens(4)), RequestError, r"as long as input_ids \(3\), got 4"),
    "label": (lambda m: m(tokens(2), labels=torch.tensor([[1, -5]])), RequestError, "token ids or -100, got -5"),
    "rows": (
        lambda m: m(tokens(3), logits_to_keep=-1),
        RequestError,
        "logits_to_keep must be an integer",
    ),
    "cache": (lambda m: m(tokens(3), past_key_values=()), RequestError, "what an earlier call.*got tuple"),
    "training": (lambda m: m.train(), UnsupportedError, "cannot be trained"),
    "checkpointing": (lambda m: m.gradient_checkpointing_enable(), UnsupportedError, "cannot be trained"),
    "gradients": (lambda m: m.enable_input_require_grads(), UnsupportedError, "cannot be trained"),
    "new adapter": (lambda m: m.add_adapter(None), UnsupportedError, "cannot be trained"),
    "peft adapter": (lambda m: m.load_adapter("x"), UnsupportedError, "load_adapter_folder"),
    "peft choice": (lambda m: m.set_adapter("x"), UnsupportedError, "use set_adapters"),
    "saving": (lambda m: m.save_pretrained("x"), UnsupportedError, "copy its folder"),
    "device": (lambda m: m.to("meta"), UnsupportedError, "cannot be moved or converted"),
    "half": (lambda m: m.half(), UnsupportedError, "cannot be moved or converted"),
    "bfloat16": (lambda m: m.bfloat16(), UnsupportedError, "cannot be moved or converted"),
    "double": (lambda m: m.double(), UnsupportedError, "cannot be moved or converted"),
    "cuda": (lambda m: m.cuda(), UnsupportedError, "cannot be moved or converted"),
    "second card": (lambda m: m.cuda(1), UnsupportedError, "cannot be moved or converted"),
    "trainable": (lambda m: m.requires_grad_(), UnsupportedError, "cannot be trained"),
    "hub": (lambda m: m.push_to_hub("x"), UnsupportedError, "copy its folder"),
    "no prompt": (lambda m: m.generate(torch.zeros(1, 0, dtype=torch.long)), RequestError, "there are no token ids"),
    "dtype": (lambda m: m.to(torch.float16), UnsupportedError, "cannot be moved or converted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name_and_the_model_goes_on(shared, case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(shared)
    ids = tokens(8)
    assert torch.equal(shared(ids).logits[0], fresh_logits(shared.ropewalk_model, ids[0].tolist()))


def test_conversions_to_what_the_model_has_are_nothing(shared) -> None:
    assert shared.float() is shared and shared.cpu() is shared and shared.requires_grad_(False) is shared


def test_reading_reports_its_progress_and_can_be_cancelled() -> None:
    model, seen = ours(max_input_len=8), []
    model.watch(lambda done, total: seen.append((done, total)), lambda: len(seen) >= 3)
    with pytest.raises(RequestError, match="cancelled"):
        model(tokens(30), logits_to_keep=1)
    assert seen == [(4, 30), (8, 30), (12, 30)]
    model.watch()
    assert torch.equal(model(tokens(30)).logits[0], fresh_logits(model.ropewalk_model, tokens(30)[0].tolist()))


def test_unloading_frees_the_model_and_refuses_further_calls() -> None:
    model = ours()
    history = model(tokens(5)).past_key_values
    gone = weakref.ref(model.ropewalk_model)
    model.unload()
    gc.collect()
    assert gone() is None
    for call in (lambda: model(tokens(5)), lambda: model.generate(tokens(5)), lambda: model.adapters):
        with pytest.raises(RequestError, match="has been unloaded: load it again"):
            call()
    assert isinstance(history, TokenHistory) and model.last_stats is None
    model.unload()


MEASURE = """
import gc, sys
import torch
import ropewalk.hf

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

small = ropewalk.hf.from_pretrained(sys.argv[1], threads=1)
small(torch.tensor([[3, 4, 5]]))
small.unload()
gc.collect()
before = resident()
model = ropewalk.hf.from_pretrained(sys.argv[2], threads=1, max_seq_len=2048)
model.generate(torch.randint(3, 100, (1, 2000)), max_new_tokens=3, do_sample=False)
loaded = resident()
held = model.ropewalk_model.weight_bytes + model.ropewalk_model.cache_bytes(2000)
model.unload()
print(held, loaded - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc/self/statm")
def test_unloading_gives_the_memory_back(tmp_path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 4096}
    write_checkpoint(tmp_path, shape | {"max_position_embeddings": 2048}, dense=True)
    command = [sys.executable, "-c", MEASURE, str(checkpoint()[0]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, loaded, left = map(int, done.stdout.split())
    assert held > 40e6 and loaded > 0.8 * held
    assert left < 0.1 * held


def test_without_transformers_the_remedy_is_named() -> None:
    program = "import sys; sys.modules['transformers'] = None\nimport ropewalk.hf"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 'ropewalk.hf needs transformers: pip install "ropewalk[hf]"' in done.stderr
