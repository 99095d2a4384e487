"""What forward accepts, in which order it works, and what it leaves in the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_writer import write_checkpoint
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.step import LOGITS_ROWS
from variants import Variant, variants

IDS = [3, 17, 99, 0, 127, 64, 5, 5, 31, 8]
VOCAB = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, dense=True)
    return path


@pytest.fixture(scope="module")
def dynamic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frequencies depend on the length from 8 positions on."""
    path = tmp_path_factory.mktemp("dynamic")
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    write_checkpoint(path, {"rope_scaling": scaling, "max_position_embeddings": 8}, dense=True)
    return path


def exact(folder: Path, **options) -> Model:
    """On the compiled core: the same bits however a sequence is cut."""
    return load_model(folder, compute="exact", cache_type="fp32", threads=1, **options)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return exact(folder, max_input_len=4)


def test_last_is_the_last_row_of_all(model: Model) -> None:
    everything = model.forward(IDS, model.new_cache(), logits="all")
    last = model.forward(IDS, model.new_cache(), logits="last")
    assert everything.shape == (len(IDS), VOCAB) and everything.dtype == torch.float32
    assert last.shape == (1, VOCAB)
    assert torch.equal(last, everything[-1:])


def test_none_fills_the_cache_and_returns_nothing(model: Model) -> None:
    cache = model.new_cache()
    assert model.forward(IDS, cache, logits="none") is None
    assert cache.token_ids == IDS


def test_all_logits_in_row_blocks_are_those_of_single_rows(folder: Path) -> None:
    model = exact(folder, max_seq_len=LOGITS_ROWS + 44)
    ids = [(7 * i) % VOCAB for i in range(LOGITS_ROWS + 44)]
    everything = model.forward(ids, model.new_cache(), logits="all")
    for length in (LOGITS_ROWS - 1, LOGITS_ROWS, LOGITS_ROWS + 1, len(ids)):
        last = model.forward(ids[:length], model.new_cache())
        assert torch.equal(last[0], everything[length - 1])


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.uint8)])
def test_ids_come_as_lists_tuples_arrays_and_tensors(model: Model, convert) -> None:
    cache = model.new_cache()
    model.forward(convert(IDS), cache, logits="none")
    assert cache.token_ids == IDS and all(type(token_id) is int for token_id in cache.token_ids)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "at least one"),
        (torch.tensor([], dtype=torch.long), "at least one"),
        ([1, 2, 128], "token id 128 at position 2 .* 0 to 127"),
        ([1, -1], "token id -1 at position 1"),
        ([1 << 70], "position 0"),
        ([1, 2.0], "2.0 at position 1 is not an integer"),
        ([True], "True at position 0 is not an integer"),
        ([None], "None at position 0"),
        ("abc", "got str"),
        (7, "got int"),
        (None, "got NoneType"),
        ({1, 2}, "got set"),
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([True]), "bool"),
        (torch.tensor([1.0], dtype=torch.bfloat16), "bfloat16"),
        (torch.tensor([[1, 2]]), r"shape \[1, 2\]"),
        (torch.tensor(1), r"shape \[\]"),
        (np.array([[1]]), r"shape \[1, 1\]"),
        (np.array(["1"]), "one-dimensional integers"),
        (np.array([1], dtype=object), "one-dimensional integers"),
    ],
)
def test_bad_ids_are_refused_and_the_cache_is_untouched(model: Model, ids: object, message: str) -> None:
    cache = model.new_cache()
    model.forward(IDS, cache, logits="none")
    with pytest.raises(RequestError, match=message):
        model.forward(ids, cache)
    assert cache.token_ids == IDS


def test_too_many_tokens_are_refused_with_capacity_length_and_need(model: Model) -> None:
    cache = model.new_cache(12)
    model.forward(IDS, cache, logits="none")
    with pytest.raises(RequestError, match=r"3 tokens do not fit: .* holds 10 of at most 12 .* 13 are needed"):
        model.forward([1, 2, 3], cache)
    assert cache.token_ids == IDS
    assert model.forward([1, 2], cache).shape == (1, VOCAB)


def test_an_unknown_logits_mode_is_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="'last', 'all', 'none', got 'some'"):
        model.forward(IDS, model.new_cache(), logits="some")


def test_a_cache_of_another_model_is_refused(model: Model, folder: Path) -> None:
    other = exact(folder).new_cache()
    with pytest.raises(RequestError, match="another model"):
        model.forward(IDS, other)
    with pytest.raises(RequestError, match="another model"):
        model.reusable_prefix(other, IDS)
    with pytest.raises(RequestError, match="new_cache.*got dict"):
        model.forward(IDS, {})


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "64"])
def test_a_cache_needs_a_positive_size(model: Model, size: object) -> None:
    with pytest.raises(ConfigError, match="max_seq_len must be a positive integer"):
        model.new_cache(size)


def test_a_cache_larger_than_the_model_was_loaded_for_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match=f"loaded for {model.max_seq_len}; load it with max_seq_len=100000"):
        model.new_cache(100000)


def test_progress_rises_to_the_total(model: Model) -> None:
    seen = []
    model.forward(IDS, model.new_cache(), progress=lambda done, total: seen.append((done, total)))
    done = [step for step, _ in seen]
    assert done == sorted(done) and done[-1] == len(IDS) and {total for _, total in seen} == {len(IDS)}
    assert len(seen) == 3 * model.config.num_layers  # three chunks of at most 4


@pytest.mark.parametrize("questions, complete", [(0, 0), (1, 0), (2, 4), (3, 4), (5, 8)])
def test_a_cancelled_prefill_keeps_the_complete_chunks(model: Model, questions: int, complete: int) -> None:
    asked = []

    def cancelled() -> bool:  # two layers: asked twice per chunk of 4
        asked.append(1)
        return len(asked) > questions

    cache = model.new_cache()
    assert model.forward(IDS, cache, logits="all", cancelled=cancelled) is None
    assert cache.token_ids == IDS[:complete]
    rest = model.forward(IDS[complete:], cache)
    assert torch.equal(rest, model.forward(IDS, model.new_cache()))


def test_an_exception_in_a_callback_keeps_the_complete_chunks(model: Model) -> None:
    def fail(done: int, total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    cache = model.new_cache()
    with pytest.raises(KeyboardInterrupt):
        model.forward(IDS, cache, progress=fail)
    assert cache.token_ids == IDS[:4]


@pytest.mark.parametrize(
    "cached, asked, reusable",
    [
        (IDS, IDS, len(IDS) - 1),
        (IDS, [*IDS, 1, 2], len(IDS)),
        (IDS, IDS[:3], 2),
        (IDS, [3, 17, 98], 2),
        (IDS, [4], 0),
        ([], IDS, 0),
    ],
)
def test_a_prefix_is_reusable_except_for_the_last_token(model: Model, cached, asked, reusable) -> None:
    cache = model.new_cache()
    if cached:
        model.forward(cached, cache, logits="none")
    assert model.reusable_prefix(cache, asked) == reusable


def test_reusable_prefix_checks_ids(model: Model) -> None:
    with pytest.raises(RequestError, match="token id 128 at position 0"):
        model.reusable_prefix(model.new_cache(), [128])


def test_length_dependent_frequencies_are_those_of_the_whole_call(dynamic_folder: Path) -> None:
    whole = exact(dynamic_folder, max_seq_len=32)
    chunked = exact(dynamic_folder, max_seq_len=32, max_input_len=3)
    ids = IDS + IDS
    expected = whole.forward(ids, whole.new_cache(), logits="all")
    got = chunked.forward(ids, chunked.new_cache(), logits="all")
    assert torch.equal(got, expected)


def test_keys_rotated_for_another_length_are_not_reused(dynamic_folder: Path) -> None:
    model = exact(dynamic_folder, max_seq_len=32)
    cache = model.new_cache()
    model.forward(IDS, cache, logits="none")  # 10 positions: beyond the original 8
    assert model.reusable_prefix(cache, IDS) == len(IDS) - 1
    assert model.reusable_prefix(cache, [*IDS, 1]) == 0
    cache.truncate(0)
    model.forward(IDS[:4], cache, logits="none")
    assert model.reusable_prefix(cache, IDS[:8]) == 4  # up to the original length all frequencies are the same
    assert model.reusable_prefix(cache, IDS) == 0


def test_a_reused_prefix_gives_the_logits_of_a_fresh_run_where_frequencies_change(dynamic_folder: Path) -> None:
    model = exact(dynamic_folder, max_seq_len=32)
    cache = model.new_cache()
    for length in (5, 8, 9, 9, 15):
        cache.truncate(model.reusable_prefix(cache, (IDS + IDS)[:length]))
        got = model.forward((IDS + IDS)[cache.length : length], cache)
        fresh = model.forward((IDS + IDS)[:length], model.new_cache())
        assert torch.equal(got, fresh)


def test_logits_that_memory_cannot_hold_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("cannot allocate memory")

    cache = model.new_cache()
    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(RequestError, match='logits="all" of 10 tokens takes 5120 bytes.*fewer tokens at a time'):
        model.forward(IDS, cache, logits="all")
    assert cache.length == 0


@pytest.mark.parametrize("variant", variants(backend="cpu"), ids=str)
@pytest.mark.parametrize("kind", ["folder", "dynamic_folder"])
def test_any_history_of_a_cache_gives_the_bits_of_a_fresh_run(
    kind: str, variant: Variant, request: pytest.FixtureRequest
) -> None:
    """Prompts that share prefixes, each fed through what the cache still has, in chunks of any size."""
    folder = request.getfixturevalue(kind)
    models = [variant.load(folder, max_seq_len=40, max_input_len=chunk) for chunk in (1, 3, 40)]
    prompts = st.lists(st.sampled_from([5, 99]), min_size=1, max_size=40)

    @settings(max_examples=25, deadline=None)
    @given(history=st.lists(prompts, min_size=1, max_size=4), chosen=st.sampled_from(models))
    def check(history: list[list[int]], chosen: Model) -> None:
        cache = chosen.new_cache()
        for prompt in history:
            cache.truncate(chosen.reusable_prefix(cache, prompt))
            logits = chosen.forward(prompt[cache.length :], cache)
            fresh = models[-1].forward(prompt, models[-1].new_cache())
            assert torch.equal(logits, fresh)

    check()


@pytest.mark.parametrize("variant", variants(backend="cpu"), ids=str)
def test_the_number_of_threads_changes_no_bit(tmp_path: Path, variant: Variant) -> None:
    write_checkpoint(tmp_path, {"hidden_size": 256, "intermediate_size": 608}, desc_act=True)
    ids = [(37 * i) % VOCAB for i in range(150)]
    results = []
    for threads in (1, 2, 3, 7):
        model = variant.load(tmp_path, threads=threads)
        results.append(model.forward(ids, model.new_cache(), logits="all"))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_a_sequence_handed_over_in_parts_has_the_frequencies_of_the_whole(dynamic_folder: Path) -> None:
    model = exact(dynamic_folder, max_seq_len=32)
    expected = model.forward(IDS, model.new_cache(), logits="all")
    cache = model.new_cache()
    parts = [model.forward(ids, cache, logits="all", seq_len=len(IDS)) for ids in (IDS[:3], IDS[3:])]
    assert torch.equal(torch.cat(parts), expected)
    assert model.reusable_prefix(cache, IDS) == len(IDS) - 1


@pytest.mark.parametrize("seq_len", [0, -5, 1.5, True, "10"])
def test_the_length_to_be_reached_is_a_positive_integer(model: Model, seq_len: object) -> None:
    with pytest.raises(RequestError, match="seq_len must be a positive integer"):
        model.forward(IDS, model.new_cache(), seq_len=seq_len)
