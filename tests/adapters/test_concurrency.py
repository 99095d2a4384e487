"""Adapters loaded and used in several threads at once, on models that share their weights and their backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.base.errors import RequestError
from ropewalk.model import model as model_module
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.variants import variant_model

IDS = list(range(24))
THREADS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(folder, dense=True)
    for seed in range(THREADS):
        write_adapter(folder / f"adapter{seed}", folder, exact, seed, r=3)
    return folder


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def load_and_run(model: Model, folder: Path, number: int) -> torch.Tensor:
    """Logits of the model with adapter `number`, under a weight that no set has been laid out for."""
    model.load_adapter(folder / f"adapter{number}", "mine")
    logits = model.forward(IDS, model.new_cache(), logits="all", adapters=[("mine", 0.5)])
    model.unload_adapter("mine")
    return logits


@pytest.mark.parametrize("compute", ["int8", "exact"])
@pytest.mark.usefixtures("hurried")
def test_variants_that_load_adapters_at_the_same_time_compute_what_each_would_alone(folder: Path, compute: str) -> None:
    model = load_model(folder, max_seq_len=32, compute=compute, threads=2)
    expected = [load_and_run(variant_model(model), folder, number) for number in range(THREADS)]
    start = Barrier(THREADS)

    def work(number: int) -> list[torch.Tensor]:
        variant = variant_model(model)
        start.wait()
        return [load_and_run(variant, folder, number) for _ in range(5)]

    with ThreadPoolExecutor(THREADS) as threads:
        for number, found in enumerate(threads.map(work, range(THREADS))):
            assert all(torch.equal(logits, expected[number]) for logits in found)


def test_of_two_threads_that_take_one_name_only_one_gets_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see that the name is free before either has read its files."""
    model = load_model(folder, backend="reference", max_seq_len=32)
    read_adapter, both_read = model_module.read_adapter, Barrier(2)

    def waiting_read(*arguments: object) -> object:
        adapter = read_adapter(*arguments)
        both_read.wait(timeout=60)
        return adapter

    monkeypatch.setattr(model_module, "read_adapter", waiting_read)

    def work(number: int) -> str:
        try:
            model.load_adapter(folder / f"adapter{number}", "shared")
        except RequestError as error:
            return str(error)
        return "loaded"

    with ThreadPoolExecutor(2) as threads:
        first, second = sorted(threads.map(work, range(2)))
    assert first.startswith("an adapter named 'shared' is loaded already") and second == "loaded"
    assert model.adapters == ("shared",)


def test_an_adapter_that_another_thread_unloads_before_it_is_used_is_a_request_error(folder: Path) -> None:
    model = load_model(folder, backend="reference", max_seq_len=32)
    model.load_adapter(folder / "adapter0", "gone")
    key = model.adapter_key("gone")
    model.unload_adapter("gone")
    with pytest.raises(RequestError, match="has just been unloaded"):
        model._adapters.change(key)
