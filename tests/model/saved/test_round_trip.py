"""A cache that went through a file: the same tokens, the same bits of everything that follows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import torch

from gptq_writer import write_checkpoint
from ropewalk.base.errors import SavedCacheError
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.cache import KvCache
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.saved.read import open_saved
from variants import Variant, variants

FORMATS = ("fp16", "fp32", "q8", "q6", "q4", "q8_q4", "q4+64")
IDS = [(37 * i) % 128 for i in range(150)]  # two pages and a part of one
MORE = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, {"vocab_size": 128, "num_hidden_layers": 4}, desc_act=True)
    return made


def follow(model: Model, cache: KvCache) -> torch.Tensor:
    return model.forward(MORE, cache, logits="all")


@pytest.mark.parametrize("cache_type", FORMATS)
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_what_follows_has_the_same_bits(variant: Variant, cache_type: str, folder: Path, tmp_path: Path) -> None:
    model = variant.load(folder, cache_type=cache_type)
    cache = model.new_cache()
    model.forward(IDS, cache)
    size = cache.save(tmp_path / "kept")
    other = variant.load(folder, cache_type=cache_type)
    loaded = other.load_cache(tmp_path / "kept")
    assert size == (tmp_path / "kept").stat().st_size
    assert (loaded.length, loaded.token_ids, loaded.segments) == (150, IDS, cache.segments)
    assert torch.equal(follow(other, loaded), follow(model, cache))


@pytest.mark.parametrize("order", ["0-3", "0-2,1-3", "0,1*3@0.5,3"])
def test_every_layer_order_has_its_own_pages(order: str, folder: Path, tmp_path: Path) -> None:
    first, second = (Variant("cpu", "int8").load(folder, layer_order=order) for _ in range(2))
    cache = first.new_cache()
    first.forward(IDS, cache)
    cache.save(tmp_path / "kept")
    assert torch.equal(follow(second, second.load_cache(tmp_path / "kept")), follow(first, cache))


def test_adapters_are_found_again_by_what_they_hold(tmp_path: Path) -> None:
    folders = sorted((demo_model_path() / "adapters").iterdir())[:3]
    models = [load_model(demo_model_path(), backend="cpu", max_seq_len=512) for _ in range(2)]
    for name, folder in zip("abc", folders, strict=False):
        models[0].load_adapter(folder, name)
    for name, folder in zip("yz", folders[1:], strict=True):  # other names, other numbers
        models[1].load_adapter(folder, name)
    cache = models[0].new_cache()
    models[0].forward(IDS[:70], cache)
    models[0].forward(IDS[70:], cache, adapters="b:0.5+c@1-2")
    cache.save(tmp_path / "kept")
    loaded = models[1].load_cache(tmp_path / "kept")
    results = [
        models[0].forward(MORE, cache, logits="all", adapters="b:0.5+c@1-2"),
        models[1].forward(MORE, loaded, logits="all", adapters="y:0.5+z@1-2"),
    ]
    assert torch.equal(*results)
    assert models[1].reusable_prefix(loaded, [*IDS, 1], "y:0.5+z@1-2") == 0
    assert models[1].reusable_prefix(loaded, [*IDS, 1]) == 70


def test_a_loaded_cache_is_a_prefix_for_others(folder: Path, tmp_path: Path) -> None:
    first, second = (Variant("cpu", "int8").load(folder) for _ in range(2))
    cache = first.new_cache()
    first.forward(IDS, cache)
    cache.save(tmp_path / "kept")
    second.share(second.load_cache(tmp_path / "kept"))
    assert second.shared_length([*IDS, 1, 2]) == len(IDS)
    other = second.new_cache()
    assert second.attach(other, [*IDS, *MORE]) == len(IDS)
    assert torch.equal(follow(second, other), follow(first, cache))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_recent_window_serves_prompts_that_begin_alike(backend: str, folder: Path, tmp_path: Path) -> None:
    first, second = (Variant(backend, "int8").load(folder, cache_type="q4+64", max_seq_len=512) for _ in range(2))
    ids = IDS * 2  # 300 tokens, of which those before the window are in codes alone
    cache = first.new_cache()
    first.forward(ids, cache)
    cache.save(tmp_path / "kept")
    file = open_saved(tmp_path / "kept")
    assert 0 < len(file.description.recent) < len(cache.pages)
    second.share(second.load_cache(tmp_path / "kept"))
    for prompt in ([*ids, *MORE], [*ids[:290], *MORE], [*ids[:100], *MORE]):
        usable = second.usable_prefix(file, prompt)
        other = second.new_cache()
        assert second.attach(other, prompt) == usable == second.shared_length(prompt)
        whole = first.new_cache()
        expected = first.forward(prompt, whole, logits="all")[usable:]
        assert torch.equal(second.forward(prompt[usable:], other, logits="all"), expected) or backend == "reference"
    assert second.usable_prefix(file, [*ids[:100], *MORE]) == 0  # its window is gone


def test_lengths_that_the_rotation_depends_on_are_kept(folder: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    first, second = (Variant("cpu", "exact").load(folder, rope_scaling=scaling, max_seq_len=2048) for _ in range(2))
    cache = first.new_cache()
    first.forward(IDS[:100], cache, seq_len=600)
    first.forward(IDS[100:], cache, seq_len=1200)
    cache.save(tmp_path / "kept")
    loaded = second.load_cache(tmp_path / "kept")
    assert loaded.segments == cache.segments
    results = [
        model.forward(MORE, held, logits="all", seq_len=1200) for model, held in ((first, cache), (second, loaded))
    ]
    assert torch.equal(*results)


def test_a_shifted_conversation_is_saved_as_it_is(folder: Path, tmp_path: Path) -> None:
    first, second = (Variant("cpu", "int8").load(folder) for _ in range(2))
    cache = first.new_cache()
    first.forward(IDS, cache)
    first.shift(cache, 10, 30)
    cache.save(tmp_path / "kept")
    loaded = second.load_cache(tmp_path / "kept")
    assert loaded.was_moved and loaded.whole_segments == cache.whole_segments
    assert torch.equal(follow(second, loaded), follow(first, cache))
    second.share(loaded)
    assert second.shared_length(loaded.token_ids) <= 10  # what was moved equals nothing that is computed


def test_turned_keys_are_saved_as_they_are(folder: Path, tmp_path: Path) -> None:
    first, second = (Variant("cpu", "int8").load(folder) for _ in range(2))
    cache = first.new_cache()
    first.forward(IDS, cache)
    first.rescale(mode="rotate", compress_pos_emb=2.0)
    cache.save(tmp_path / "kept")
    with pytest.raises(SavedCacheError, match="rotated in another way"):
        second.load_cache(tmp_path / "kept")
    second.rescale(mode="rotate", compress_pos_emb=2.0)
    loaded = second.load_cache(tmp_path / "kept")
    assert loaded.was_moved and loaded.whole_segments == cache.whole_segments
    assert torch.equal(follow(second, loaded), follow(first, cache))


@pytest.mark.parametrize("growth", [100, 1000])
def test_keys_go_on_to_follow_the_length(growth: int, folder: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    first, second = (Variant("cpu", "exact").load(folder, rope_scaling=scaling, max_seq_len=2048) for _ in range(2))
    ids = [(37 * i) % 128 for i in range(1000)]
    cache = first.new_cache()
    for start in range(0, len(ids), 250):
        first.forward(ids[start : start + 250], cache)
    cache.save(tmp_path / "kept")
    loaded = second.load_cache(tmp_path / "kept")
    assert (loaded.reach, loaded.turned_at) == (cache.reach, cache.turned_at)
    more = [(11 * i) % 128 for i in range(growth)]
    assert torch.equal(second.forward(more, loaded), first.forward(more, cache))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128])
def test_any_number_of_positions_can_be_saved(length: int, folder: Path, tmp_path: Path) -> None:
    model = Variant("cpu", "int8").load(folder)
    cache = model.new_cache()
    model.forward(IDS[:length], cache)
    cache.save(tmp_path / "kept")
    assert torch.equal(follow(model, model.load_cache(tmp_path / "kept")), follow(model, cache))


def test_another_process_goes_on_where_this_one_was(folder: Path, tmp_path: Path) -> None:
    model = Variant("cpu", "int8").load(folder)
    cache = model.new_cache()
    model.forward(IDS, cache)
    cache.save(tmp_path / "kept")
    program = (
        "import sys, torch; from ropewalk import load_model\n"
        "model = load_model(sys.argv[1], backend='cpu', compute='int8', threads=1)\n"
        "cache = model.load_cache(sys.argv[2])\n"
        f"torch.save(model.forward({MORE}, cache, logits='all'), sys.argv[3])\n"
    )
    out = tmp_path / "logits"
    subprocess.run([sys.executable, "-c", program, folder, tmp_path / "kept", out], check=True, timeout=300)
    assert torch.equal(torch.load(out), follow(model, cache))


def test_the_file_is_one_that_the_safetensors_library_reads(folder: Path, tmp_path: Path) -> None:
    model = Variant("cpu", "int8").load(folder)
    cache = model.new_cache()
    model.forward(IDS, cache)
    cache.save(tmp_path / "kept", about={"title": "Straße"})
    with safetensors.safe_open(tmp_path / "kept", "pt") as file:
        assert file.get_tensor("token_ids").tolist() == IDS
        pages = file.get_tensor("pages.0")
        assert file.metadata()["format"] == "ropewalk-cache 1"
    assert torch.equal(pages[0], model.store.parts_of(cache.pages[0])[0])


def test_progress_counts_pages(folder: Path, tmp_path: Path) -> None:
    model = Variant("cpu", "int8").load(folder)
    cache = model.new_cache()
    model.forward(IDS, cache)
    calls: list[tuple[int, int]] = []
    cache.save(tmp_path / "kept", lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    calls.clear()
    model.load_cache(tmp_path / "kept", lambda *call: calls.append(call))
    assert calls == [(done, 6) for done in range(1, 7)]  # checked, then read


def test_a_cache_that_goes_on_while_it_is_saved_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = Variant("cpu", "int8").load(folder)
    cache, other = model.new_cache(), model.new_cache()
    model.forward(IDS, cache)
    model.forward(IDS, other)

    def go_on(done: int, total: int) -> None:
        if done == 1:
            model.forward(MORE, cache)

    cache.save(tmp_path / "kept", go_on)
    loaded = model.load_cache(tmp_path / "kept")
    assert loaded.token_ids == IDS
    assert torch.equal(follow(model, loaded), follow(model, other))


def test_loading_takes_the_pages_of_what_is_loaded_and_no_more(folder: Path, tmp_path: Path) -> None:
    model = Variant("cpu", "int8").load(folder)
    cache = model.new_cache()
    model.forward(IDS, cache)
    cache.save(tmp_path / "kept")
    assert model.cache_used == model.cache_bytes(150)  # the copy that was saved is gone
    loaded = model.load_cache(tmp_path / "kept")
    assert model.cache_used == 2 * model.cache_bytes(150)
    del loaded
    assert model.cache_used == model.cache_bytes(150)


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
