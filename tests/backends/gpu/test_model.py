"""Whole models on the GPU backend: near the reference, and the same bits in chunks, beside others and after a rollback.

In Triton's interpreter where there is no card; the checkpoints are tiny, as a launch takes milliseconds there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from accuracy import error_of
from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.app import AppOptions
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import RunningServer
from tokenizer_writer import write_sentencepiece

pytest.importorskip("triton", reason="the kernels are written in Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 400
FP16_ERROR = 5e-3  # of the largest logit: float16 has 11 bits, and a tiny model adds few products
ONE_LAYER = {"num_hidden_layers": 1}  # a row takes the interpreter 50 ms a layer
NAMES = ("storm", "poet", "ends")
IDS = [(37 * i + 11) % 128 for i in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, asymmetric zeros; adapters of several ranks, one of the embeddings and the head; a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(path, {**ONE_LAYER, "vocab_size": VOCAB}, family="qwen2", sym=False)
    for seed, modules in enumerate((None, ["q_proj", "o_proj", "down_proj"], ["v_proj", "embed_tokens", "lm_head"])):
        settings = {} if modules is None else {"target_modules": modules, "r": 7 - seed}
        write_adapter(path / NAMES[seed], path, exact, seed, **settings)
    return write_sentencepiece(path)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return on_gpu(folder, "fp16", NAMES)


@dataclass(frozen=True)
class Known:
    """A prompt that the model has computed as a whole, and keeps for others: attaching to it costs no launch."""

    ids: list[int]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def known(model: Model) -> Known:
    ids, cache = ids_of(68), model.new_cache()
    logits = model.forward(ids, cache, "all")
    model.share(cache)
    return Known(ids, logits)


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
    "planar 5 bits": {"bits": 5, "format": "gptq_p", "desc_act": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_has_the_logits_of_the_reference(tmp_path: Path, kind: str) -> None:
    settings = dict(KINDS[kind])
    write_checkpoint(tmp_path, ONE_LAYER | settings.pop("config_overrides", {}), **settings)
    compute = "exact" if kind == "act-order" else "fp16"
    assert_near(logits_of(on_gpu(tmp_path, compute), IDS), logits_of(on_reference(tmp_path), IDS), compute)


@dataclass(frozen=True)
class Sequence:
    """What a cache holds before a step, and what the step adds. from_known: the first tokens are those of `known`."""

    cached: int
    added: int
    adapters: str | None = None
    from_known: bool = False

    def span(self, model: Model, known: Known) -> Span:
        ids, cache = known.ids[: self.cached + self.added], model.new_cache()
        if self.from_known:
            model.attach(cache, known.ids[: self.cached + 1])  # the last is left to compute
        elif self.cached:
            model.forward(ids[: self.cached], cache, "none", adapters=self.adapters)
        assert cache.length == self.cached
        return Span(ids[self.cached :], cache, "all", self.adapters)

    def alone(self, model: Model, known: Known) -> torch.Tensor:
        span = self.span(model, known)
        return model.forward(span.token_ids, span.cache, "all", adapters=span.adapters)


MIX = [
    Sequence(0, 5, "storm"),
    Sequence(63, 1, from_known=True),  # the last position of a page
    Sequence(64, 2, from_known=True),
    Sequence(2, 3, "ends"),
    Sequence(1, 1, "storm:0.5+poet"),
    Sequence(0, 18),  # more than 16 rows attend in another form
]


def test_every_span_of_a_step_has_the_bits_of_its_sequence_alone(model: Model, known: Known) -> None:
    spans = [sequence.span(model, known) for sequence in MIX]
    for sequence, span, got in zip(MIX, spans, model.step(spans), strict=True):
        assert torch.equal(got, sequence.alone(model, known)), sequence
        assert span.cache.length == sequence.cached + sequence.added


def test_float32_activations_have_the_same_bits_in_any_step_too(folder: Path, known: Known) -> None:
    model, mix = on_gpu(folder, "exact", NAMES, max_input_len=4), [Sequence(0, 5, "storm"), Sequence(0, 3)]
    results = model.step([sequence.span(model, known) for sequence in mix])
    whole = on_gpu(folder, "exact", NAMES)
    for sequence, got in zip(mix, results, strict=True):
        assert torch.equal(got, sequence.alone(whole, known)), sequence


def test_chunks_of_a_prompt_change_no_bit(folder: Path, known: Known) -> None:
    assert torch.equal(on_gpu_logits(folder, known.ids, max_input_len=33), known.logits)
    assert torch.equal(on_gpu_logits(folder, known.ids[:4], max_input_len=1), known.logits[:4])


def on_gpu_logits(folder: Path, ids: list[int], **options: Any) -> torch.Tensor:
    model = on_gpu(folder, **options)
    return model.forward(ids, model.new_cache(), "all")


def test_adapters_change_logits_as_on_the_reference(model: Model, folder: Path) -> None:
    reference = on_reference(folder, NAMES)
    plain = logits_of(reference, IDS)
    for adapters in ("storm", "storm:0.5+poet@0", "ends"):
        want = logits_of(reference, IDS, adapters=adapters)
        assert_near(logits_of(model, IDS, adapters=adapters), want, "fp16")
        assert float((want - plain).abs().max()) > 10 * FP16_ERROR * float(want.abs().max())  # they matter


def test_layer_orders_repeat_layers_with_keys_of_their_own(folder: Path) -> None:
    order = "0,0@0.5,0"
    want = logits_of(on_reference(folder, layer_order=order), IDS)
    model = on_gpu(folder)
    model.set_layer_order(order)
    assert_near(logits_of(model, IDS), want, "fp16")


def test_a_rollback_leaves_nothing_behind(model: Model, known: Known) -> None:
    cache = model.new_cache()
    model.attach(cache, known.ids[:61])
    model.forward(ids_of(9, 5), cache, "none")  # over the end of a page
    cache.truncate(60)
    assert torch.equal(model.forward(known.ids[60:], cache, "all"), known.logits[60:])


def test_a_shared_prefix_gives_the_bits_of_computing_it(model: Model, known: Known) -> None:
    cache = model.new_cache()
    model.attach(cache, known.ids[:67])  # a page that is shared, and one that is copied
    assert cache.length == 66
    assert torch.equal(model.forward(known.ids[66:], cache, "all"), known.logits[66:])


def test_an_engine_writes_the_same_text_alone_together_and_with_guesses(model: Model, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
    prompts = ["The quick, the quick", "A ropewalk is"]
    plain = Engine(model, tokenizer)
    alone = [plain.generate(prompt, params).text for prompt in prompts]
    guessing = Engine(model, tokenizer, speculation="ngram")
    assert guessing.generate(prompts[0], params).text == alone[0]
    together: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: together.update({prompt: plain.generate(prompt, params).text}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [together[prompt] for prompt in prompts] == alone


def test_a_draft_model_on_the_gpu_guesses_and_the_text_is_as_without(model: Model, folder: Path) -> None:
    """The draft is the same model over codes: it guesses most of the text."""
    tokenizer = load_tokenizer(folder)
    params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
    plain = Engine(model, tokenizer).generate("A rope", params)
    draft, asked = on_gpu(folder, cache_type="q8"), []
    forward = draft.forward
    draft.forward = lambda *args, **kwargs: asked.append(args) or forward(*args, **kwargs)
    engine = Engine(model, tokenizer, draft_model=draft)
    assert engine.speculation == "draft"
    assert engine.generate("A rope", params).text == plain.text
    assert len(asked) > 1  # after the prompt as well


@pytest.mark.parametrize("cache_type", ["q8", "q4", "q8_q4"])
def test_models_with_codes_are_near_the_reference_and_keep_their_bits_in_chunks(folder: Path, cache_type: str) -> None:
    model = on_gpu(folder, cache_type=cache_type)
    logits = logits_of(model, IDS)
    want, plain = (logits_of(on_reference(folder, cache_type=kind), IDS) for kind in (cache_type, "fp16"))
    allowed = FP16_ERROR * float(want.abs().max()) + float((want - plain).abs().max()) / 3  # numbers get other codes
    assert float((logits - want).abs().max()) <= allowed
    cache = model.new_cache()
    parts = [model.forward(part, cache, "all").cpu() for part in (IDS[:3], IDS[3:4], IDS[4:])]
    assert torch.equal(torch.cat(parts), logits)
    cache.truncate(4)
    assert torch.equal(model.forward(IDS[4:], cache, "all").cpu(), logits[4:])


def test_a_server_answers_from_it(model: Model, folder: Path) -> None:
    engine = Engine(model, load_tokenizer(folder))
    with RunningServer(engine, AppOptions("tiny")) as server:
        body = {"model": "tiny", "prompt": "A rope", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        answer = server.post("/v1/completions", body)
    params = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == engine.generate("A rope", params).text
