"""Several sequences in one step: each result is that of the sequence alone, and what is refused changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ropewalk
from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.base.errors import RequestError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from variants import Variant, variants


class Owner:
    """Stands for a model."""


VOCAB = 128
ADAPTERS = (None, "storm", "storm:0.5+poet", "ends", "poet@0", "poet")
every_variant = pytest.mark.parametrize("variant", variants(), ids=str)
dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, act-order, frequencies that depend on the length from 64 positions on, and three adapters."""
    path = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(path, dynamic, family="qwen2", desc_act=True, sym=False)
    write_adapter(path / "storm", path, exact, 1)
    write_adapter(path / "poet", path, exact, 2, r=7, target_modules=["q_proj", "o_proj", "down_proj"])
    write_adapter(path / "ends", path, exact, 3, target_modules=["v_proj", "embed_tokens", "lm_head"])
    return path


def loaded(folder: Path, variant: Variant, **options: Any) -> Model:
    model = variant.load(folder, max_seq_len=256, cache_type="fp32", **options)
    for name in ("storm", "poet", "ends"):
        model.load_adapter(folder / name, name)
    return model


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def same(got: torch.Tensor | None, expected: torch.Tensor | None, variant: Variant) -> bool:
    """Equal bits on the compiled core; torch, in the reference, sums in another order for another number of rows."""
    if got is None or expected is None:
        return got is expected
    if variant.backend == "cpu":
        return torch.equal(got, expected)
    # In "int8" a last bit more or less may round an activation to the next step.
    return got.shape == expected.shape and torch.allclose(
        got, expected, atol=5e-2 if variant.compute == "int8" else 1e-4
    )


@dataclass(frozen=True)
class Sequence:
    """What a cache holds before a step, and what the step adds."""

    cached: int
    added: int
    logits: str = "last"
    adapters: str | None = None
    seq_len: int | None = None
    seed: int = 0

    def span(self, model: Model) -> Span:
        """The span of the step, with a cache that holds what was there before."""
        ids, cache = ids_of(self.cached + self.added, self.seed), model.new_cache()
        if self.cached:
            model.forward(ids[: self.cached], cache, "none", adapters=self.adapters, seq_len=self.seq_len)
        return Span(ids[self.cached :], cache, self.logits, self.adapters, self.seq_len)

    def alone(self, model: Model) -> torch.Tensor | None:
        """What forward gives for it."""
        span = self.span(model)
        return model.forward(span.token_ids, span.cache, span.logits, None, None, span.seq_len, span.adapters)


MIX = [
    Sequence(0, 70, "all", "storm"),  # over the end of a page, and of several chunks
    Sequence(63, 1, seed=1),
    Sequence(64, 1, "last", "poet", seed=2),
    Sequence(5, 3, "none", seed=3),
    Sequence(30, 8, "all", "ends", seed=4),
    Sequence(100, 9, "last", "storm:0.5+poet", seed=5),
    Sequence(0, 1, "all", "poet@0", seed=6),
    Sequence(20, 2, "last", "storm", 200, seed=7),  # rotated for a length to come
    Sequence(0, 66, "none", seed=8),
    Sequence(1, 1, "last", "poet", seed=9),
]


@every_variant
@pytest.mark.parametrize("chunk", [1, 7, 50, 2048])
def test_every_span_has_the_logits_of_its_sequence_alone(folder: Path, variant: Variant, chunk: int) -> None:
    model = loaded(folder, variant, max_input_len=chunk)
    whole = loaded(folder, variant)
    spans = [sequence.span(model) for sequence in MIX]
    results = model.step(spans)
    for sequence, span, result in zip(MIX, spans, results, strict=True):
        assert same(result, sequence.alone(whole), variant), sequence
        assert span.cache.token_ids == ids_of(sequence.cached + sequence.added, sequence.seed)
    following = [replace(span, token_ids=[9], logits="last") for span in spans]  # the keys are those of forward, too
    for sequence, result in zip(MIX, model.step(following), strict=True):
        alone = sequence.span(whole)
        whole.forward(alone.token_ids, alone.cache, "none", None, None, alone.seq_len, alone.adapters)
        expected = whole.forward([9], alone.cache, "last", None, None, alone.seq_len, alone.adapters)
        assert same(result, expected, variant), sequence


@pytest.mark.parametrize("variant", variants(backend="cpu"), ids=str)
def test_any_mix_of_sequences_has_the_bits_of_each_alone(folder: Path, variant: Variant) -> None:
    models = [loaded(folder, variant, max_input_len=chunk) for chunk in (5, 64)]
    whole = loaded(folder, variant)
    sequences = st.builds(
        Sequence,
        cached=st.sampled_from([0, 1, 62, 63, 64, 70]),
        added=st.integers(1, 70),
        logits=st.sampled_from(["last", "all", "none"]),
        adapters=st.sampled_from(ADAPTERS),
        seq_len=st.sampled_from([None, 150]),
        seed=st.integers(0, 3),
    )

    @settings(max_examples=20, deadline=None)
    @given(mix=st.lists(sequences, min_size=1, max_size=5), model=st.sampled_from(models))
    def check(mix: list[Sequence], model: Model) -> None:
        results = model.step([sequence.span(model) for sequence in mix])
        for sequence, result in zip(mix, results, strict=True):
            assert same(result, sequence.alone(whole), variant)

    check()


@every_variant
def test_a_step_runs_repeated_layers_with_keys_of_their_own(folder: Path, variant: Variant) -> None:
    model = variant.load(folder, max_seq_len=256, layer_order="0-1,0,1@0.5")
    mix = [replace(sequence, adapters=None) for sequence in MIX]
    results = model.step([sequence.span(model) for sequence in mix])
    for sequence, result in zip(mix, results, strict=True):
        assert same(result, sequence.alone(model), variant)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return loaded(folder, Variant("reference", "exact"), max_input_len=4)


def test_a_step_of_no_spans_has_no_results(model: Model) -> None:
    assert model.step([]) == []


def test_the_head_is_computed_for_the_rows_that_are_asked_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, linear = [], model.backend.linear

    def watched(x: torch.Tensor, weight: object, *rest: object) -> torch.Tensor:
        if weight is model.weights.head:
            rows.append(len(x))
        return linear(x, weight, *rest)

    monkeypatch.setattr(model.backend, "linear", watched)
    mix = [Sequence(0, 9, "last"), Sequence(0, 3, "all"), Sequence(0, 6, "none")]
    model.step([sequence.span(model) for sequence in mix])
    assert sum(rows) == 1 + 3


def test_progress_counts_the_rows_of_all_spans(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    spans = [Span(ids_of(length), model.new_cache()) for length in (3, 6)]
    model.step(spans, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [2, 4, 6, 8, 8, 9] and {total for _, total in seen} == {9}


@pytest.mark.parametrize("questions, lengths", [(0, (0, 0, 0)), (1, (0, 0, 0)), (2, (3, 1, 0)), (4, (3, 5, 0))])
def test_a_cancelled_step_keeps_the_complete_chunks(model: Model, questions: int, lengths: tuple[int, ...]) -> None:
    asked = []

    def cancelled() -> bool:  # two layers: asked twice per chunk of 4
        asked.append(1)
        return len(asked) > questions

    used = model.cache_used
    spans = [Span(ids_of(length, length), model.new_cache(), "all", seq_len=99) for length in (3, 6, 70)]
    assert model.step(spans, cancelled=cancelled) is None
    assert tuple(span.cache.length for span in spans) == lengths
    assert model.cache_used - used == sum(model.cache_bytes(length) for length in lengths)
    for span in spans:
        if span.cache.length < len(span.token_ids):
            model.forward(span.token_ids[span.cache.length :], span.cache, "none", seq_len=99)
        expected = model.forward([*span.token_ids, 9], model.new_cache(), seq_len=99)
        assert torch.allclose(model.forward([9], span.cache, seq_len=99), expected, atol=1e-4)


def test_an_exception_in_the_middle_keeps_the_complete_chunks(model: Model) -> None:
    def fail(done: int, total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    used, spans = model.cache_used, [Span(ids_of(length), model.new_cache()) for length in (3, 70)]
    with pytest.raises(KeyboardInterrupt):
        model.step(spans, progress=fail)
    assert [span.cache.length for span in spans] == [3, 1]
    assert model.cache_used - used == 2 * model.cache_bytes(1)


Edit = Callable[[Span, Model], Any]
REFUSALS: dict[str, tuple[Edit, str]] = {
    "no span": (lambda span, model: (span.token_ids, span.cache), "takes ropewalk.Span, got tuple"),
    "no cache": (lambda span, model: replace(span, cache={}), "new_cache.*got dict"),
    "another model": (
        lambda span, model: replace(span, cache=KvCache(Owner(), None, CacheFormat.parse("fp16"), 9)),
        "another model",
    ),
    "out of range": (lambda span, model: replace(span, token_ids=[1, VOCAB]), "token id 128 at position 1"),
    "nothing": (lambda span, model: replace(span, token_ids=[]), "at least one"),
    "no ids": (lambda span, model: replace(span, token_ids="abc"), "got str"),
    "logits": (lambda span, model: replace(span, logits="some"), "'last', 'all', 'none', got 'some'"),
    "adapters": (lambda span, model: replace(span, adapters=["gone"]), "no adapter 'gone' is loaded"),
    "seq_len": (lambda span, model: replace(span, seq_len=0), "seq_len must be a positive integer or None, got 0"),
    "too long": (lambda span, model: replace(span, token_ids=[1] * 257), "257 tokens do not fit.*at most 256"),
    "small cache": (lambda span, model: replace(span, cache=model.new_cache(2)), "3 tokens do not fit.*at most 2"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("index", [0, 2])
def test_what_is_refused_names_the_span_and_changes_no_cache(model: Model, case: str, index: int) -> None:
    edit, message = REFUSALS[case]
    good = [Sequence(cached, 3, seed=cached).span(model) for cached in (5, 64, 0)]
    before = [(span.cache.token_ids, span.cache.pages, span.cache.segments) for span in good]
    used = model.cache_used
    spans = list(good)
    spans[index] = edit(good[index], model)
    with pytest.raises(RequestError, match=f"^span {index}: .*{message}"):
        model.step(spans)
    assert [(span.cache.token_ids, span.cache.pages, span.cache.segments) for span in good] == before
    assert model.cache_used == used
    assert len(model.step(good)) == 3


def test_the_same_cache_twice_is_refused(model: Model) -> None:
    spans = [Span([1], model.new_cache()) for _ in range(3)]
    with pytest.raises(RequestError, match="^span 3: its cache is that of span 1 too"):
        model.step([*spans, Span([2], spans[1].cache)])
    assert [span.cache.length for span in spans] == [0, 0, 0]


def test_a_cache_of_another_layer_order_is_refused(folder: Path) -> None:
    model = Variant("reference", "exact").load(folder, max_seq_len=256)
    old = model.new_cache()
    model.set_layer_order("0-1,0-1")
    with pytest.raises(RequestError, match="^span 1: .*made for the layer order '0-1', the model now has '0-1,0-1'"):
        model.step([Span([1], model.new_cache()), Span([1], old)])


@pytest.mark.parametrize("spans", [None, 7, "abc", {}])
def test_spans_are_a_list(model: Model, spans: object) -> None:
    with pytest.raises(RequestError, match="spans must be a list of ropewalk.Span"):
        model.step(spans)


def test_forward_refuses_without_naming_a_span(model: Model) -> None:
    with pytest.raises(RequestError, match="^there are no token ids"):
        model.forward([], model.new_cache())


def test_a_span_is_public_with_its_defaults(model: Model) -> None:
    cache = model.new_cache()
    span = ropewalk.Span([1, 2], cache)
    assert (span.logits, span.adapters, span.seq_len) == ("last", None, None) and span.cache is cache


def test_segments_are_enough_to_compute_a_sequence_again(model: Model) -> None:
    """Parts of a sequence whose frequencies follow the length: each has those of the call that made it."""
    ids, cache = ids_of(200), model.new_cache()
    for end, seq_len in ((10, None), (60, 64), (70, 100), (80, 100), (81, None), (200, None)):
        model.forward(ids[cache.length : end], cache, "none", seq_len=seq_len)
    again = model.new_cache()
    for start, end, seq_len in cache.segments:
        assert start == again.length
        model.forward(ids[start:end], again, "none", seq_len=seq_len)
    assert again.segments == cache.segments == [(0, 60, 64), (60, 81, 128), (81, 200, 256)]
    assert torch.allclose(model.forward([9], again), model.forward([9], cache), atol=1e-4)
