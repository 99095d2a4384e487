"""backends/gpu/graphs.py without a card: when a step is captured, on which buffers, and that a replay has its bits.

A capture stands in that runs the launches again on the held buffers: what a card does with them shows only there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from gptq_writer import write_checkpoint
from ropewalk.backends.gpu.graphs import KEPT, MOST_ROWS, StepGraphs
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.step import Span

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a card the graphs themselves are used")


class Captures:
    """Counts captures and replays."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self, launches: Callable[[], None]) -> Callable[[], None]:
        self.made += 1

        def replay() -> None:
            self.replayed += 1
            launches()

        return replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, {"num_hidden_layers": 1})
    return path


def loaded(folder: Path) -> Model:
    return load_model(folder, backend="gpu", device="cpu", max_seq_len=64)


def with_graphs(folder: Path) -> tuple[Model, Captures]:
    model, captures = loaded(folder), Captures()
    model.backend._graphs = StepGraphs(captures)
    return model, captures


def test_the_first_step_of_a_kind_is_launched_the_second_captured_and_all_have_the_same_bits(folder: Path) -> None:
    plain, (model, captures) = loaded(folder), with_graphs(folder)
    mine, theirs = model.new_cache(), plain.new_cache()
    for number, token_id in enumerate((3, 17, 99, 5)):
        got = model.forward([token_id], mine, "all")
        assert torch.equal(got, plain.forward([token_id], theirs, "all"))
        assert (captures.made, captures.replayed) == (int(number > 0), number)


def test_another_sequence_replays_the_same_graph(folder: Path) -> None:
    plain, (model, captures) = loaded(folder), with_graphs(folder)
    for _ in range(2):
        model.forward([3], model.new_cache())
    got = model.forward([9], model.new_cache(), "all")
    assert captures.made == 1 and captures.replayed == 2
    assert torch.equal(got, plain.forward([9], plain.new_cache(), "all"))


def test_steps_of_more_sequences_are_of_another_kind(folder: Path) -> None:
    model, captures = with_graphs(folder)
    for count in (1, 1, 2, 2, 1, 2):
        model.step([Span([3], model.new_cache()) for _ in range(count)])
    assert (captures.made, captures.replayed) == (2, 4)


def test_prompts_and_steps_with_changes_are_launched(folder: Path) -> None:
    model, captures = with_graphs(folder)
    for _ in range(2):
        model.step([Span([3, 4], model.new_cache()), Span([3], model.new_cache())])
        model.forward([1] * 3, model.new_cache())
    assert captures.made == 0
    graphs = model.backend._graphs
    assert not graphs._kinds


def test_what_cannot_be_captured_is_launched_and_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tries = loaded(folder), []

    def refuse(launches: Callable[[], None]) -> Callable[[], None]:
        tries.append(1)
        raise RuntimeError("operation not permitted")

    model.backend._graphs = StepGraphs(refuse)
    plain = loaded(folder)
    mine, theirs = model.new_cache(), plain.new_cache()
    for token_id in (3, 17, 99):
        assert torch.equal(model.forward([token_id], mine), plain.forward([token_id], theirs))
    assert len(tries) == 1
    said = [message for message in caplog.messages if "no CUDA graph" in message]
    assert said == ["steps of 1 rows are launched kernel by kernel: no CUDA graph (operation not permitted)"]


def test_a_cancelled_step_runs_nothing_that_was_put_off(folder: Path) -> None:
    model, captures = with_graphs(folder)
    cache = model.new_cache()
    model.forward([3], cache)
    assert model.forward([4], cache, cancelled=lambda: True) is None
    assert cache.length == 1 and captures.made == 0


def test_a_graph_holds_no_page(folder: Path) -> None:
    model, _ = with_graphs(folder)
    for _ in range(3):
        model.forward([3], model.new_cache())
    assert model.cache_used == 0


def test_kinds_that_have_not_been_used_for_long_are_forgotten(folder: Path) -> None:
    model, _ = with_graphs(folder)
    graphs = model.backend._graphs
    graphs._kinds.update({number: None for number in range(KEPT)})
    model.forward([3], model.new_cache())
    assert len(graphs._kinds) == KEPT and 0 not in graphs._kinds
    assert MOST_ROWS == 16
