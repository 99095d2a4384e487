"""backends/split.py and model/placement.py: layer instances on several places, with the results of one.

The GPU backend in Triton's interpreter beside the CPU backend, and two reference backends where any two will do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.backends.reference import ReferenceBackend
from ropewalk.backends.split import Place, SplitBackend
from ropewalk.base.errors import ConfigError, ShapeError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.model import backends
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.options import LoadOptions
from ropewalk.model.placement import GIB, Placement, Share, fill, place_instances
from ropewalk.model.plan import plan_loading
from ropewalk.model.step import Span

IDS = [(37 * i + 11) % 128 for i in range(9)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(path, {"num_hidden_layers": 3}, desc_act=True, sym=False)
    write_adapter(path / "storm", path, exact, 1)
    write_adapter(path / "ends", path, exact, 2, target_modules=["v_proj", "embed_tokens", "lm_head"])
    return path


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch, folder: Path):
    """Loads a model over as many reference backends as counts are given."""

    def load(*counts: int, **options: Any) -> Model:
        def make(chosen: LoadOptions, placement: Any = None, experts: Any = None) -> SplitBackend:
            plan = plan_loading(folder, chosen)
            indices = [use.layer for use in plan.order.uses]
            return SplitBackend([Place(ReferenceBackend("exact"), count) for count in counts], indices)

        with monkeypatch.context() as patched:
            patched.setattr("ropewalk.model.loader.make_backend", make)
            model = load_model(folder, backend="reference", compute="exact", max_seq_len=128, **options)
        assert isinstance(model.backend, SplitBackend)
        for name in ("storm", "ends"):
            model.load_adapter(folder / name, name)
        return model

    return load


def whole(folder: Path, **options: Any) -> Model:
    model = load_model(folder, backend="reference", compute="exact", max_seq_len=128, **options)
    assert isinstance(model.backend, ReferenceBackend)
    for name in ("storm", "ends"):
        model.load_adapter(folder / name, name)
    return model


def logits(model: Model, **options: Any) -> torch.Tensor:
    cache = model.new_cache()
    first = model.forward(IDS[:6], cache, "all", **options)
    return torch.cat([first, model.forward(IDS[6:], cache, "all", **options)]).cpu()


@pytest.mark.parametrize("counts", [(3,), (1, 2), (2, 1), (1, 1, 1)])
@pytest.mark.parametrize("adapters", [None, "storm@1-2", "ends+storm"])
def test_places_change_no_bit(folder: Path, split, counts: tuple[int, ...], adapters: str | None) -> None:
    got = logits(split(*counts), adapters=adapters)
    assert torch.equal(got, logits(whole(folder), adapters=adapters))


def test_several_sequences_keep_their_keys_in_every_place(folder: Path, split) -> None:
    results = []
    for model in (split(1, 2), whole(folder)):
        caches = [model.new_cache() for _ in range(2)]
        model.step([Span(IDS[:5], caches[0]), Span(IDS[3:], caches[1])])
        results.append(model.step([Span([7], cache) for cache in caches]))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_a_page_takes_what_it_takes_in_one_place(folder: Path, split) -> None:
    model, plain = split(1, 2), whole(folder)
    assert model.cache_bytes(128) == plain.cache_bytes(128)
    cache = model.new_cache()
    model.forward(IDS, cache)
    assert model.cache_used == plain.cache_bytes(len(IDS)) == sum(pool.used_bytes for pool in model.store._pool._pools)
    del cache
    assert model.cache_used == 0


def test_pages_of_all_places_together_keep_the_limit(split) -> None:
    pool = split(1, 2).backend.new_pool(2, 16, CacheFormat.parse("fp16"), 0)
    with pytest.raises(MemoryError, match="a page of .* bytes: 0 of 0 are in use"):
        pool.take(3)


def test_a_layer_that_runs_in_two_places_is_packed_in_both(folder: Path, split) -> None:
    order = "0-1,0-2"
    model, plain = split(2, 3, layer_order=order), whole(folder, layer_order=order)
    assert torch.equal(logits(model), logits(plain))
    assert model.weight_bytes > plain.weight_bytes == whole(folder).weight_bytes


def test_another_order_is_taken_where_its_layers_are_and_refused_elsewhere(folder: Path, split) -> None:
    model = split(1, 2)
    model.set_layer_order("0,2,1,2")
    assert torch.equal(logits(model), logits(whole(folder, layer_order="0,2,1,2")))
    with pytest.raises(ConfigError, match="layer_order: instance 1 would run on reference on cpu, and its layer was"):
        model.set_layer_order("0,0,1")
    assert str(model.layer_order) == "0,2,1-2"  # as it was


def filled(pool: Any, count: int, recent: bool = False) -> list:
    """Pages of 3 instances with bytes that differ."""
    pages = [pool.take(3, recent) for _ in range(count)]
    for number, page in enumerate(pages):
        for part in pool.parts_of(page):
            part.copy_(torch.arange(part.numel()).add(7 * number).remainder(60).to(torch.uint8))
    return pages


def test_a_page_of_either_kind_has_a_part_in_every_place_and_is_saved_by_its_parts(split) -> None:
    pool = split(1, 2).backend.new_pool(2, 16, CacheFormat.parse("q4+64"), 1 << 20)
    plain = ReferenceBackend("exact").new_pool(2, 16, CacheFormat.parse("q4+64"), 1 << 20)
    for recent in (False, True):
        assert pool.page_bytes(3, recent) == plain.page_bytes(3, recent)
        (page,) = filled(pool, 1, recent)
        parts, copy = pool.parts_of(page), pool.copy(page)
        assert [part.numel() for part in parts] == [plain.page_bytes(1, recent), plain.page_bytes(2, recent)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(pool.parts_of(copy), parts, strict=True))
        assert pool.used_bytes == 2 * plain.page_bytes(3, recent)
        del page, parts, copy
    assert len(pool.parts_of(pool.take(1))) == 1  # an order of one instance has no part in the second place
    other = split(2, 1).backend.new_pool(2, 16, CacheFormat.parse("q4+64"), 0)
    assert plain.layout in pool.layout and pool.layout != other.layout


@pytest.mark.parametrize("cache_type", ["fp16", "q8_q4"])
def test_rows_are_moved_in_every_place(split, cache_type: str) -> None:
    backend, plain = split(1, 2).backend, ReferenceBackend("exact")
    moved = []
    angles = torch.linspace(0, 3, 80 * 4).view(1, 80, 4)
    for each in (backend, plain):
        pool = each.new_pool(2, 16, CacheFormat.parse(cache_type), 1 << 20)
        pages = [pool.take(3) for _ in range(3)]
        for number, page in enumerate(pages):  # the same bytes in each instance, in one place or two
            for part in pool.parts_of(page):
                part.fill_(40 + number)
        each.move_rows_(pages, 70, pages, 30, 80, angles.cos(), angles.sin(), [0, 0, 0])
        moved.append([[part.clone() for part in pool.parts_of(page)] for page in pages])
    for (first, second), (whole,) in zip(*moved, strict=True):
        assert first.unique().tolist() != [40] and second.numel() == 2 * first.numel()
        assert sorted(torch.cat([first, second]).tolist()) == sorted(whole.tolist())
    ones = torch.ones(1, 180, 4)
    with pytest.raises(ShapeError, match="source: positions 70 to 250 lie outside"):
        backend.move_rows_(pages, 70, pages, 30, 180, ones, ones, [0, 0, 0])


def test_only_a_place_compiles_layers_and_each_says_how_another_model_is_loaded_beside_it(split) -> None:
    backend = split(1, 2).backend
    assert [place.name for place in backend.places_of(0)] == ["reference"]
    assert backend.load_options == backend.places[0].backend.load_options
    assert backend.load_options == {"backend": "reference", "compute": "exact", "device": torch.device("cpu")}
    assert backend.shares == ((torch.device("cpu"), 1.0),) == backend.places[0].backend.shares


def test_an_order_that_ends_before_the_last_place_is_complete(folder: Path, split) -> None:
    model = split(1, 2)
    model.set_layer_order("0")
    assert torch.equal(logits(model), logits(whole(folder, layer_order="0")))


@pytest.mark.skipif(DEVICE != "cpu", reason="a card adds in another order than the interpreter")
def test_the_gpu_backend_and_the_cpu_backend_share_a_model(folder: Path) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    model = load_model(folder, gpu_layers=1, device="cpu", compute="exact", threads=1, max_seq_len=128)
    assert (model.backend.name, model.backend.compute) == ("gpu+cpu", "exact")
    model.load_adapter(folder / "storm", "storm")
    for adapters in (None, "storm"):
        want = logits(whole(folder), adapters=adapters)
        assert torch.allclose(logits(model, adapters=adapters), want, atol=2e-3)
    assert model.backend.load_options == {"backend": "gpu", "compute": "exact", "device": torch.device("cpu")}


def test_a_split_over_cards_is_by_gib_of_weights(folder: Path) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    if DEVICE != "cpu":
        pytest.skip("there may be one card")
    model = load_model(folder, gpu_split="0.00003,1", device="cpu", max_seq_len=128)
    assert [place.num_instances for place in model.backend.places] == [1, 2]
    assert model.backend.name == "gpu"
    want = logits(whole(folder))
    assert float((logits(model) - want).abs().max()) < 5e-3 * float(want.abs().max())


def placed(folder: Path, **options: Any) -> Placement | None:
    chosen = LoadOptions(**options)
    return place_instances(folder, plan_loading(folder, chosen), chosen)


@pytest.mark.parametrize(
    "options, shares",
    [
        ({}, None),
        ({"gpu_layers": 3}, None),  # all of them, on one card
        ({"gpu_layers": 99}, None),
        ({"gpu_layers": 2}, [("cuda", 2), (None, 1)]),
        ({"gpu_layers": 2, "device": "cuda:1"}, [("cuda:1", 2), (None, 1)]),
        ({"gpu_split": "1,1"}, [("cuda:0", 3)]),
        ({"gpu_split": "0.00003,1"}, [("cuda:0", 1), ("cuda:1", 2)]),
        ({"gpu_split": "0.00003,1", "gpu_layers": 2}, [("cuda:0", 1), ("cuda:1", 1), (None, 1)]),
        ({"gpu_layers": 3, "layer_order": "0-2,0-2"}, [("cuda", 3), (None, 3)]),
    ],
)
def test_instances_are_placed_in_the_order_in_which_they_run(folder: Path, options: dict, shares: list | None) -> None:
    found = placed(folder, **options)
    wanted = None if shares is None else tuple(Share(*share) for share in shares)
    assert (None if found is None else found.shares) == wanted


def test_a_split_without_room_is_refused_with_numbers_and_what_would_do(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        placed(folder, gpu_split="0.00003,0.00003")
    for part in ("gpu_split='3e-05,3e-05' has room for 2 of 3 layer instances", "KiB of weights", "or gpu_layers=2"):
        assert part in str(caught.value)


def test_a_layer_that_runs_twice_on_a_card_takes_its_room_once() -> None:
    sizes = [3 * GIB, 4 * GIB]
    assert fill([0, 1, 0, 1, 1], sizes, [7 * GIB, 9 * GIB]) == [5, 0]
    assert fill([0, 1, 0, 1, 1], sizes, [6 * GIB, 9 * GIB]) == [1, 4]


def test_each_place_is_given_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []
    monkeypatch.setattr(backends, "_single", lambda *given: made.append(given) or ReferenceBackend("exact"))
    placement = Placement((Share("cuda:0", 2), Share("cuda:1", 1), Share(None, 1)), (0, 1, 2, 3))
    options = LoadOptions(backend="gpu", gpu_layers=3, gpu_split="1,2")
    backend = backends.make_backend(options, placement)
    assert [(name, device) for name, _, device in made] == [("gpu", "cuda:0"), ("gpu", "cuda:1"), ("cpu", None)]
    assert backend.firsts == (0, 2, 3)
    assert backend.shares == ((torch.device("cpu"), 1.0),)
