"""Files cut short, changed or of something else: always a typed error that names the file, and nothing half loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gptq_writer import write_checkpoint
from ropewalk.base.errors import CacheFullError, RequestError, RopewalkError, SavedCacheError
from ropewalk.files.safetensors_header import header_text
from ropewalk.model.model import Model
from ropewalk.model.saved import file as saved_file
from ropewalk.model.saved.read import open_saved
from variants import Variant

IDS = [(37 * i) % 128 for i in range(150)]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, {"vocab_size": 128, "num_hidden_layers": 2})
    return Variant("reference", "exact").load(folder)


@pytest.fixture(scope="module")
def content(model: Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A saved cache."""
    path = tmp_path_factory.mktemp("saved") / "kept"
    cache = model.new_cache()
    model.forward(IDS, cache)
    cache.save(path, about={"title": "Walk"})
    return path.read_bytes()


def refused(model: Model, path: Path, content: bytes) -> str:
    """The message of the error that this file gives; no page is in use after it."""
    path.write_bytes(content)
    before = model.cache_used
    with pytest.raises(SavedCacheError) as caught:
        model.load_cache(path)
    assert str(path) in str(caught.value)
    assert model.cache_used == before
    return str(caught.value)


@QUICK
@given(data=st.data())
def test_a_file_cut_short_is_refused(data: st.DataObject, model: Model, content: bytes, tmp_path: Path) -> None:
    length = data.draw(st.integers(0, len(content) - 1))
    refused(model, tmp_path / "kept", content[:length])


@QUICK
@given(data=st.data())
def test_a_changed_byte_is_noticed_wherever_it_is(
    data: st.DataObject, model: Model, content: bytes, tmp_path: Path
) -> None:
    end = data.draw(st.sampled_from([8, header_bytes(content), len(content)]))  # headers are small beside pages
    position, flipped = data.draw(st.integers(0, end - 1)), data.draw(st.integers(1, 255))
    changed = bytearray(content)
    changed[position] ^= flipped
    refused(model, tmp_path / "kept", bytes(changed))


@QUICK
@given(data=st.data())
def test_bytes_added_or_left_out_are_noticed(data: st.DataObject, model: Model, content: bytes, tmp_path: Path) -> None:
    first = data.draw(st.integers(0, len(content)))
    last = data.draw(st.integers(first, min(len(content), first + 200)))
    between = data.draw(st.binary(max_size=200))
    changed = content[:first] + between + content[last:]
    if changed != content:
        refused(model, tmp_path / "kept", changed)


@QUICK
@given(other=st.binary(max_size=300))
def test_any_other_file_is_refused(other: bytes, model: Model, tmp_path: Path) -> None:
    refused(model, tmp_path / "kept", other)


def header_bytes(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def rewritten(content: bytes, change: Callable[[dict], None], drop: str | None = None) -> bytes:
    """The file with another description and the checksum of that; without the tensor `drop` in its header."""
    header = json.loads(content[8 : header_bytes(content)])
    header.pop(drop, None)
    metadata, values = header.pop("__metadata__"), content[header_bytes(content) :]
    description = json.loads(metadata["description"])
    change(description)
    text = json.dumps(description, separators=(",", ":"))
    ids = torch.frombuffer(bytearray(values[: 4 * len(IDS)]), dtype=torch.int32)
    metadata |= {"description": text, "description_sha256": saved_file._head_digest(text, ids)}
    specs = [(name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()]
    return header_text(specs, metadata) + values


def test_a_rewritten_description_that_changes_nothing_is_accepted(model: Model, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(rewritten(content, lambda description: None))
    assert model.load_cache(tmp_path / "kept").token_ids == IDS


def put(*keys: str | int, value: object) -> Callable[[dict], None]:
    def change(description: dict) -> None:
        found = description
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (put("num_tokens", value="many"), "num_tokens must be an integer"),
        (put("num_tokens", value=151), "its header is not the one that its description asks for"),
        (put("num_tokens", value=0), "num_tokens must be an integer"),
        (put("part_bytes", value=[]), "part_bytes must be a list of at least 1 integers from 1 to"),
        (put("recent", value=[3]), "recent must be a list of at least 0 integers from 0 to 2"),
        (put("recent", value=[1, 0]), "recent must be ascending numbers of pages"),
        (put("recent", value=[0]), "recent_bytes must be there exactly if there are recent pages"),
        (put("reach", value=0), "reach must be an integer"),
        (put("segments", 0, "moves", value=[{"dropped": "x"}]), "moves.0.start must be an integer"),
        (put("segments", 0, "moves", value=[{"dropped": "x", "start": 1}]), "moves.0.dropped must be hexadecimal"),
        (put("recent_bytes", value=[64]), "recent_bytes must be there exactly if there are recent pages"),
        (put("part_bytes", value=[64]), "its header is not the one"),
        (put("segments", value=[]), "segments must be stretches of positions"),
        (put("segments", 0, "start", value=3), "segments must be stretches of positions"),
        (put("segments", 0, "seq_len", value=-1), "segments.0.seq_len must be an integer"),
        (put("segments", 0, "inverse_frequencies", value="xy"), "must be hexadecimal digits"),
        (put("segments", 0, "attention_scale", value=0), "attention_scale must be a number above 0"),
        (put("segments", 0, "adapters", value=[{}]), "adapters.0.weight must be a finite number"),
        (put("segments", 0, "adapters", value="storm"), "adapters must be a list of objects"),
        (put("facts", value=[]), "facts must be an object"),
        (put("about", value={"title": 1}), "about must be an object of texts"),
        (put("model", value=None), "model must be a string"),
        (put("ropewalk", value="0.0.9"), "saved by ropewalk 0.0.9, this is"),
        (put("facts", "num_layers", value=40), "num_layers: 40 in the file, 2 here"),
        (put("facts", "weights", value="0" * 64), "weights: '0000"),
        (put("facts", "more", value=1), "more: 1 in the file, None here"),
        (put("segments", 0, "attention_scale", value=2.0), "rotated in another way"),
        (put("segments", 0, "inverse_frequencies", value="00"), "rotated in another way"),
    ],
)
def test_what_a_description_says_is_checked(
    change: Callable[[dict], None], message: str, model: Model, content: bytes, tmp_path: Path
) -> None:
    assert message in refused(model, tmp_path / "kept", rewritten(content, change))


def test_a_file_without_its_recent_window_is_refused(tmp_path: Path, model: Model) -> None:
    window = Variant("reference", "exact").load(Path(model.config.source).parent, cache_type="q4+64")
    cache = window.new_cache()
    window.forward(IDS, cache)
    cache.save(tmp_path / "kept")
    content = (tmp_path / "kept").read_bytes()
    assert open_saved(tmp_path / "kept").description.recent == (0, 1, 2)
    header = json.loads(content[8 : header_bytes(content)])
    lacking = content[: len(content) - 3 * header["recent.0"]["shape"][1]]

    def lack(description: dict) -> None:
        description["recent"], description["recent_bytes"] = [], []

    changed = rewritten(lacking, lack, drop="recent.0")
    assert "lacks pages of the recent window of a q4+64 cache" in refused(window, tmp_path / "kept", changed)


def test_token_ids_that_the_model_does_not_know_are_refused(model: Model, content: bytes, tmp_path: Path) -> None:
    changed, start = bytearray(content), header_bytes(content)
    changed[start : start + 4] = (4000).to_bytes(4, "little")
    message = refused(model, tmp_path / "kept", rewritten(bytes(changed), lambda description: None))
    assert "tokens that the model does not know" in message


def test_other_safetensors_files_and_formats_are_told_from_damaged_ones(
    model: Model, content: bytes, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    assert "is not a saved cache" in refused(model, tmp_path / "kept", (tmp_path / "weights").read_bytes())
    newer = content.replace(b"ropewalk-cache 1", b"ropewalk-cache 2")
    assert "has the format 'ropewalk-cache 2', and 'ropewalk-cache 1'" in refused(model, tmp_path / "kept", newer)


def test_missing_files_folders_and_pipes_are_refused(model: Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "a pipe"),
    ):
        with pytest.raises(SavedCacheError, match=message):
            model.load_cache(path)
    with pytest.raises(SavedCacheError, match="embedded null byte"):
        open_saved("with\0nul")
    with pytest.raises(RequestError, match="path must be that of a saved cache"):
        open_saved(None)


def test_a_file_without_permission_is_refused(model: Model, content: bytes, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "kept").write_bytes(content)

    def denied(path: Path, *mode: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SavedCacheError, match="kept cannot be read: Permission denied"):
        model.load_cache(tmp_path / "kept")


def test_a_file_that_changes_while_it_is_read_is_refused(model: Model, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(content)
    before = model.cache_used

    def change(done: int, total: int) -> None:
        if done == 4:  # it has been checked, and its first page is in memory
            path.write_bytes(content[:-1] + b"x")
            os.utime(path, ns=(1, 1))

    with pytest.raises(SavedCacheError, match="has changed while it was being read"):
        model.load_cache(path, change)
    assert model.cache_used == before


def test_a_cache_that_does_not_fit_leaves_all_as_it_was(model: Model, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(content)
    small = Variant("reference", "exact").load(
        Path(model.config.source).parent, max_seq_len=192, cache_memory=model.cache_bytes(192)
    )
    cache = small.new_cache()
    small.forward([1, 2, 3], cache)
    with pytest.raises(CacheFullError):
        small.load_cache(tmp_path / "kept")
    assert small.cache_used == small.cache_bytes(3)
    short = Variant("reference", "exact").load(Path(model.config.source).parent, max_seq_len=128)
    with pytest.raises(SavedCacheError, match="has 150 positions, and the model was loaded for 128"):
        short.load_cache(tmp_path / "kept")


class FullDisk:
    """A file on a disk with so much room."""

    def __init__(self, file: object, room: int) -> None:
        self._file, self._room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: object) -> int:
        self._room -= memoryview(data).nbytes
        if self._room < 0:
            raise OSError(28, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 100, 3000, 20_000])
def test_a_full_disk_leaves_the_file_as_it_was(room: int, model: Model, tmp_path: Path, monkeypatch) -> None:
    cache = model.new_cache()
    model.forward(IDS, cache)
    (tmp_path / "kept").write_bytes(b"before")
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode, **options: FullDisk(opened(path, *mode, **options), room))
    with pytest.raises(SavedCacheError, match="kept cannot be written: No space left on device"):
        cache.save(tmp_path / "kept")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"before"


def test_what_cannot_be_saved_is_refused(model: Model, tmp_path: Path) -> None:
    cache = model.new_cache()
    with pytest.raises(RequestError, match="the cache is empty"):
        cache.save(tmp_path / "kept")
    model.forward(IDS, cache)
    with pytest.raises(SavedCacheError, match="cannot be written: its folder does not exist"):
        cache.save(tmp_path / "none" / "kept")
    with pytest.raises(SavedCacheError, match="cannot be written: it is a folder"):
        cache.save(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SavedCacheError, match="cannot be written: what is there is no file"):
        cache.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "pipe").unlink()
    with pytest.raises(RequestError, match="about must map texts to texts"):
        cache.save(tmp_path / "kept", about={"pages": 3})
    with pytest.raises(RequestError, match="path must be that of a file to write"):
        cache.save("")
    other = Variant("reference", "exact").load(Path(model.config.source).parent)
    with pytest.raises(RequestError, match="belongs to another model"):
        other.save_cache(cache, tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_nothing(model: Model, tmp_path: Path) -> None:
    cache = model.new_cache()
    model.forward(IDS, cache)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.save(tmp_path / "kept", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_load_gives_its_pages_back(model: Model, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(content)
    before = model.cache_used

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.load_cache(tmp_path / "kept", interrupt)
    assert model.cache_used == before


def test_every_refusal_is_one_of_our_errors() -> None:
    assert issubclass(SavedCacheError, RopewalkError) and issubclass(SavedCacheError, ValueError)
