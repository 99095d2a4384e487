"""Whole models on the GPU backend: near the reference, and the same bits in chunks, beside others and after a rollback.

In Triton's interpreter where there is no card; the checkpoints are tiny, as a launch takes milliseconds there.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accuracy import error_of
from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_sentencepiece

pytest.importorskip("triton", reason="the kernels are written in Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 400
FP16_ERROR = 5e-3  # of the largest logit: float16 has 11 bits, and a tiny model adds few products
NAMES = ("storm", "poet", "ends")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, act-order, asymmetric zeros; adapters of two ranks, one of the embeddings and the head; a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(path, {"vocab_size": VOCAB}, family="qwen2", desc_act=True, sym=False)
    for seed, modules in enumerate((None, ["q_proj", "o_proj", "down_proj"], ["v_proj", "embed_tokens", "lm_head"])):
        settings = {} if modules is None else {"target_modules": modules, "r": 7 - seed}
        write_adapter(path / NAMES[seed], path, exact, seed, **settings)
    return write_sentencepiece(path)


def on_gpu(folder: Path, compute: str = "fp16", adapters: Several[str] = (), **options: Any) -> Model:
    model = load_model(folder, backend="gpu", device=DEVICE, compute=compute, **{"max_seq_len": 256} | options)
    for name in adapters:
        model.load_adapter(folder / name, name)
    return model


def on_reference(folder: Path, adapters: Several[str] = (), **options: Any) -> Model:
    model = load_model(folder, backend="reference", compute="exact", **{"max_seq_len": 256} | options)
    for name in adapters:
        model.load_adapter(folder / name, name)
    return model


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model: Model, ids: list[int], **options: Any) -> torch.Tensor:
    return model.forward(ids, model.new_cache(), logits="all", **options).cpu()


def assert_near(got: torch.Tensor, want: torch.Tensor, compute: str) -> None:
    largest = float(want.abs().max())
    assert error_of(got, want.numpy()).most <= (FP16_ERROR if compute == "fp16" else 1e-3) * largest


KINDS: dict[str, dict[str, Any]] = {
    "act-order": {"desc_act": True, "sym": False},
    "mistral with a window": {"family": "mistral", "config_overrides": {"sliding_window": 9}},
    "qwen3 with norms of heads": {"family": "qwen3", "bits": 8},
    "3 bits, one group": {"bits": 3, "group_size": -1},
    "dense and tied": {"dense": True, "config_overrides": {"tie_word_embeddings": True}},
    "planar 5 bits": {"bits": 5, "desc_act": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_has_the_logits_of_the_reference(tmp_path: Path, kind: str) -> None:
    settings = dict(KINDS[kind])
    write_checkpoint(tmp_path, settings.pop("config_overrides", None), **settings)
    compute = "exact" if kind == "act-order" else "fp16"
    assert_near(logits_of(on_gpu(tmp_path, compute), IDS), logits_of(on_reference(tmp_path), IDS), compute)


IDS = [(37 * i + 11) % 128 for i in range(20)]


@dataclass(frozen=True)
class Sequence:
    """What a cache holds before a step, and what the step adds."""

    cached: int
    added: int
    adapters: str | None = None
    seed: int = 0

    def span(self, model: Model) -> Span:
        ids, cache = ids_of(self.cached + self.added, self.seed), model.new_cache()
        if self.cached:
            model.forward(ids[: self.cached], cache, "none", adapters=self.adapters)
        return Span(ids[self.cached :], cache, "all", self.adapters)


MIX = [
    Sequence(0, 19, "storm"),
    Sequence(63, 1, seed=1),  # the last position of a page
    Sequence(64, 2, "storm:0.5+poet", seed=2),
    Sequence(5, 3, "ends", seed=3),
    Sequence(30, 1, seed=4),
]


@pytest.mark.parametrize("compute", ["fp16", "exact"])
def test_every_span_of_a_step_has_the_bits_of_its_sequence_alone(folder: Path, compute: str) -> None:
    model = on_gpu(folder, compute, NAMES, max_input_len=11)  # chunks end inside spans
    whole = on_gpu(folder, compute, NAMES)
    spans = [sequence.span(model) for sequence in MIX]
    for sequence, span, got in zip(MIX, spans, model.step(spans), strict=True):
        alone = sequence.span(whole)
        expected = whole.forward(alone.token_ids, alone.cache, "all", adapters=alone.adapters)
        assert torch.equal(got, expected), sequence
        assert span.cache.length == sequence.cached + sequence.added


def test_chunks_of_a_prompt_change_no_bit(folder: Path) -> None:
    ids = ids_of(70)
    whole = logits_of(on_gpu(folder), ids)
    for chunk in (1, 33):
        rows = ids if chunk > 1 else ids[:20]  # a launch of a row takes as long as one of many
        assert torch.equal(logits_of(on_gpu(folder, max_input_len=chunk), rows), whole[: len(rows)])


def test_adapters_change_logits_as_on_the_reference(folder: Path) -> None:
    model, reference = on_gpu(folder, "fp16", NAMES), on_reference(folder, NAMES)
    plain = logits_of(reference, IDS)
    for adapters in ("storm", "storm:0.5+poet@1", "ends"):
        want = logits_of(reference, IDS, adapters=adapters)
        assert_near(logits_of(model, IDS, adapters=adapters), want, "fp16")
        assert float((want - plain).abs().max()) > 10 * FP16_ERROR * float(want.abs().max())  # they matter


def test_layer_orders_repeat_layers_with_keys_of_their_own(folder: Path) -> None:
    order = "0-1,0@0.5,1"
    want = logits_of(on_reference(folder, layer_order=order), IDS)
    model = on_gpu(folder)
    model.set_layer_order(order)
    assert_near(logits_of(model, IDS), want, "fp16")


def test_a_rollback_leaves_nothing_behind(folder: Path) -> None:
    model, ids = on_gpu(folder), ids_of(24)
    want = logits_of(model, ids)[-4:]
    cache = model.new_cache()
    model.forward(ids[:20] + ids_of(9, 5), cache, "none")
    cache.truncate(20)
    assert torch.equal(model.forward(ids[20:], cache, "all").cpu(), want)


def test_a_shared_prefix_gives_the_bits_of_computing_it(folder: Path) -> None:
    model, ids = on_gpu(folder), ids_of(76)
    first = model.new_cache()
    model.forward(ids[:70], first, "none")
    model.share(first)
    second = model.new_cache()
    model.attach(second, ids[:-1])
    assert second.length == 70
    assert torch.equal(model.forward(ids[70:], second, "all"), model.forward(ids[70:], first, "all"))


def test_one_row_steps_are_those_of_the_prompt(folder: Path) -> None:
    model, ids = on_gpu(folder), ids_of(9)
    cache = model.new_cache()
    rows = [model.forward([token_id], cache, "all") for token_id in ids]
    assert torch.equal(torch.cat(rows).cpu(), logits_of(model, ids))


def test_an_engine_writes_the_same_text_alone_together_and_with_guesses(folder: Path) -> None:
    model, tokenizer = on_gpu(folder), load_tokenizer(folder)
    params = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    prompts = ["The quick brown fox. The quick brown", "A ropewalk is"]
    plain = Engine(model, tokenizer)
    alone = [plain.generate(prompt, params).text for prompt in prompts]
    guessing = Engine(model, tokenizer, speculation="ngram")
    assert [guessing.generate(prompt, params).text for prompt in prompts] == alone
    streams = [plain.stream(prompt, params) for prompt in prompts]
    assert [stream.finish_reason for stream in streams] == ["length", "length"]


def test_replies_do_not_depend_on_the_form_of_a_step(folder: Path) -> None:
    model = on_gpu(folder)
    sequence = replace(MIX[4], added=3)
    span = sequence.span(model)
    several = model.step([span])[0]
    again = sequence.span(model)
    singly = [model.forward([token_id], again.cache, "all") for token_id in again.token_ids]
    assert torch.equal(several, torch.cat(singly))
