"""Memory of a card: running out of it is a sentence with numbers, and the pages get what is free but for a reserve."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from gptq_writer import write_checkpoint
from ropewalk.backends.gpu import backend as backend_module
from ropewalk.backends.gpu.backend import GpuBackend
from ropewalk.backends.gpu.memory import told_in_numbers
from ropewalk.backends.split import Place, SplitBackend
from ropewalk.base.errors import CheckpointError, ConfigError, RequestError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.model import pages
from ropewalk.model.loader import load_model
from ropewalk.model.pages import ContextPages, check_cache_memory, choose_cache_memory

GIB = 1 << 30
CARD = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """A card of so many GiB, of which so many are free, and so many that torch holds for tensors to come."""

    def has(total: float, free: float, held: float = 0) -> None:
        sizes = int(free * GIB), int(total * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: sizes)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(held * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)

    return has


def backend(device: torch.device = CARD) -> SimpleNamespace:
    return SimpleNamespace(device=device, shares=((device, 1.0),))


def context(gib: float) -> ContextPages:
    return ContextPages(4096, CacheFormat.parse("fp16"), int(gib * GIB) // 64)


def test_pages_may_take_what_is_free_on_the_card_but_for_a_reserve(card) -> None:
    card(total=24, free=18)
    assert choose_cache_memory(context(2), None, backend()) == 18 * GIB - 24 * GIB // 20
    card(total=8, free=5)
    assert choose_cache_memory(context(2), None, backend()) == 5 * GIB - GIB // 2
    card(total=8, free=1, held=4)  # what torch holds is free for pages too
    assert choose_cache_memory(context(2), None, backend()) == 5 * GIB - GIB // 2


def test_they_take_no_more_than_is_of_use_and_at_least_one_context(card, caplog: pytest.LogCaptureFixture) -> None:
    card(total=80, free=70)
    assert choose_cache_memory(context(0.5), None, backend()) == 8 * GIB
    assert not caplog.records
    card(total=8, free=1)
    assert choose_cache_memory(context(2), None, backend()) == 2 * GIB
    assert "takes 2.0 GiB once it is full, and 512.0 MiB are free" in caplog.text


def test_more_than_the_card_has_is_refused(card) -> None:
    card(total=8, free=8)
    with pytest.raises(ConfigError, match=r"more than this machine has \(8.0 GiB\)"):
        check_cache_memory(context(2), 9 * GIB, backend())


def test_the_fullest_of_several_places_decides(card, monkeypatch: pytest.MonkeyPatch) -> None:
    card(total=8, free=2.5)
    monkeypatch.setattr(pages, "available_bytes", lambda: 100 * GIB)
    monkeypatch.setattr(pages, "physical_bytes", lambda: 200 * GIB)
    places = [Place(backend(), 1), Place(backend(torch.device("cpu")), 3)]
    split = SplitBackend(places, (0, 1, 2, 3))
    assert choose_cache_memory(context(2), None, split) == 8 * GIB  # a quarter of each page lies on the card
    card(total=8, free=60)
    monkeypatch.setattr(pages, "available_bytes", lambda: 12 * GIB)
    assert choose_cache_memory(context(2), None, split) == 8 * GIB  # three quarters in half of the machine's memory


def test_a_failed_allocation_says_what_was_wanted_and_what_is_free(card) -> None:
    card(total=8, free=0.25, held=7)
    with (
        pytest.raises(RequestError) as caught,
        told_in_numbers(CARD, "computing 2048 rows", RequestError, "use a smaller max_input_len"),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert str(caught.value) == (
        "cuda:0 has too little memory for computing 2048 rows: 256.0 MiB of 8.0 GiB are free, and this program holds "
        "0 bytes; use a smaller max_input_len"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, {"num_hidden_layers": 1})
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a card has numbers in it")
def test_loading_says_which_weights_did_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend_module.linear, "pack", fail)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, backend="gpu", device="cpu")
    for part in (
        str(folder),
        "not enough memory to load",
        "the weights of lm_head",  # the first
        "gpu_layers",
    ):
        assert part in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a card has numbers in it")
def test_a_step_that_does_not_fit_is_a_refused_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(folder, backend="gpu", device="cpu", max_seq_len=64)

    def fail(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ropewalk.backends.gpu.layers.prepare", fail)
    cache = model.new_cache()
    with pytest.raises(RequestError, match="too little memory for computing 2 rows.*smaller max_input_len"):
        model.forward([1, 2], cache)
    assert cache.length == 0 and model.cache_used == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a second card, where there is none")
def test_kernels_are_launched_on_the_card_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    def current(device: torch.device) -> nullcontext:
        entered.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", current)
    second = GpuBackend("fp16", torch.device("cpu"))
    second.device = torch.device("cuda", 1)
    x, y = torch.ones(1, 8), torch.ones(1, 8)
    second.add_(x, y, 2.0)
    assert x.tolist() == [[3.0] * 8]
    second.rms_norm(x, torch.ones(8), 1e-6)
    second.embed(torch.ones(4, 8), torch.tensor([1]))
    assert entered == [second.device] * 3
