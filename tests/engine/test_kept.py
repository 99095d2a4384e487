"""Prompts that are read once: kept in files, found again by other engines, in a folder of a bounded size."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from engines import GREEDY
from gptq_writer import write_checkpoint
from ropewalk.base.errors import ConfigError, RequestError, SavedCacheError
from ropewalk.engine.engine import Engine
from ropewalk.engine.kept import opening
from ropewalk.engine.kept_folder import KeptFolder
from ropewalk.files.replaced import PARTIAL
from ropewalk.text.tokenizer.load import load_tokenizer
from tokenizer_writer import write_sentencepiece
from variants import Variant

TEXT = "A ropewalk is a long straight lane where long strands are laid before being twisted into rope. " * 4
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, {"vocab_size": 400, "max_position_embeddings": 1024})
    return write_sentencepiece(made)


def engine_of(folder: Path, kept: KeptFolder | None = None, **options) -> Engine:
    model = Variant("cpu", "int8").load(folder, **({"max_seq_len": 1024} | options))
    return Engine(model, load_tokenizer(folder), "plain", max_running=2, kept_folder=kept)


def test_a_prompt_starts_from_what_another_engine_kept(folder: Path, tmp_path: Path) -> None:
    kept = engine_of(folder, KeptFolder(tmp_path)).kept.save_as("walk", TEXT)
    fresh, again = engine_of(folder), engine_of(folder, KeptFolder(tmp_path))
    plain = fresh.generate(TEXT + QUESTION, GREEDY)
    found = again.generate(TEXT + QUESTION, GREEDY)
    assert found.token_ids == plain.token_ids
    assert plain.stats.reused_tokens == 0
    assert kept.num_tokens - 2 <= found.stats.reused_tokens <= kept.num_tokens  # text may be cut differently at a seam
    assert again.kept.num_recalled == 1


def test_what_memory_has_is_not_read_from_a_file(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder, KeptFolder(tmp_path))
    engine.kept.save_as("walk", TEXT)
    assert engine.generate(TEXT + QUESTION, GREEDY).stats.reused_tokens > 0
    assert engine.kept.num_recalled == 0
    engine.generate("Something else entirely", GREEDY)
    assert engine.kept.num_recalled == 0


def test_the_file_with_the_longest_beginning_is_taken(folder: Path, tmp_path: Path) -> None:
    first = engine_of(folder, KeptFolder(tmp_path))
    first.kept.save_as("short", TEXT[:200])
    longest = first.kept.save_as("long", TEXT)
    engine = engine_of(folder, KeptFolder(tmp_path))
    assert engine.generate(TEXT + QUESTION, GREEDY).stats.reused_tokens >= longest.num_tokens - 2
    assert engine.kept.num_recalled == 1


def test_a_conversation_goes_on_from_its_opening(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": TEXT}]
    first = engine_of(folder, KeptFolder(tmp_path))
    ids = opening(*(first.chat_ids([*messages, {"role": "user", "content": text}]) for text in ("A", "Z")))
    first.kept.save_as("talk", ids)
    engine = engine_of(folder, KeptFolder(tmp_path))
    asked = [*messages, {"role": "user", "content": QUESTION}]
    reply = engine.chat(asked, GREEDY).complete()
    assert reply.stats.reused_tokens >= len(ids) - 1
    assert reply.token_ids == engine_of(folder).chat(asked, GREEDY).complete().token_ids


def test_the_prompt_of_a_reply_can_be_kept(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder, KeptFolder(tmp_path))
    stream = engine.stream(TEXT, GREEDY)
    stream.keep_prompt()
    assert stream.prompt_cache is None
    reply = stream.complete()
    assert reply.stats.reused_tokens == 0  # the usage of a reply tells what was computed for it
    kept = engine.kept.write_as("walk", stream.prompt_cache)
    assert kept.token_ids == engine.encode(TEXT)
    assert engine.stream(TEXT, GREEDY).prompt_cache is None


def test_a_prompt_can_go_to_any_file_and_come_back(folder: Path, tmp_path: Path) -> None:
    about = {"title": "On rope"}
    saved = engine_of(folder).kept.save(TEXT, tmp_path / "file", about)
    engine = engine_of(folder)
    loaded = engine.kept.load(tmp_path / "file")
    assert loaded == saved and loaded.about == about
    assert engine.generate([*loaded.token_ids, 5], GREEDY).stats.reused_tokens == loaded.num_tokens


def test_reading_reports_progress_and_can_be_cancelled(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder, KeptFolder(tmp_path), max_input_len=64)
    calls: list[tuple[int, int]] = []
    assert (
        engine.kept.save_as("walk", TEXT, progress=lambda *call: calls.append(call), cancelled=lambda: len(calls) > 3)
        is None
    )
    assert 0 < calls[-1][0] < calls[-1][1] == len(engine.encode(TEXT))
    assert engine.kept.folder.list() == []
    assert engine.kept.save_as("walk", TEXT) is not None


def test_replies_go_on_while_a_prompt_is_kept(folder: Path, tmp_path: Path) -> None:
    """Preempted, evicted or not: what is saved is what was read."""
    alone = engine_of(folder)
    expected = {seed: alone.generate(f"{seed} {TEXT[:300]}", GREEDY).token_ids for seed in range(4)}
    memory = 6 * alone.model.store.page_bytes + alone.model.cache_bytes(1024)
    engine = engine_of(folder, KeptFolder(tmp_path), cache_memory=memory)
    found: dict[int, list[int]] = {}

    def reply(seed: int) -> None:
        found[seed] = engine.generate(f"{seed} {TEXT[:300]}", GREEDY).token_ids

    threads = [threading.Thread(target=reply, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    kept = engine.kept.save_as("walk", TEXT)
    for thread in threads:
        thread.join(60)
    assert found == expected
    again = engine_of(folder, KeptFolder(tmp_path))
    assert again.generate([*kept.token_ids, 5], GREEDY).stats.reused_tokens == kept.num_tokens
    assert (
        again.generate([*kept.token_ids, 5], GREEDY).token_ids == alone.generate([*kept.token_ids, 5], GREEDY).token_ids
    )


def test_files_of_other_settings_are_left_alone(folder: Path, tmp_path: Path, caplog) -> None:
    engine_of(folder, KeptFolder(tmp_path)).kept.save_as("walk", TEXT)
    other = engine_of(folder, KeptFolder(tmp_path), rope_theta=5000.0)
    assert other.generate(TEXT, GREEDY).stats.reused_tokens == 0
    assert "rotated in another way" in other.kept.problem_of(other.kept.folder.find("walk"))


def test_damaged_files_are_reported_and_the_prompt_is_read(folder: Path, tmp_path: Path, caplog) -> None:
    engine_of(folder, KeptFolder(tmp_path)).kept.save_as("walk", TEXT)
    path = tmp_path / "walk.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    engine = engine_of(folder, KeptFolder(tmp_path))
    with caplog.at_level(logging.WARNING, "ropewalk"):
        reply = engine.generate(TEXT, GREEDY)
    assert reply.stats.reused_tokens == 0
    assert caplog.text.count("walk.safetensors is damaged (the checksum of its pages") == 1
    engine.generate("Something else " + TEXT, GREEDY)
    assert "damaged" in engine.kept.problem_of(engine.kept.folder.find("walk"))
    assert caplog.text.count("is damaged") == 1  # it is not read again and again
    engine.kept.save_as("walk", TEXT)
    assert engine.kept.problem_of(engine.kept.folder.find("walk")) is None


def test_what_is_there_already_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder, KeptFolder(tmp_path))
    engine.kept.save_as("walk", TEXT)
    before = (tmp_path / "walk.safetensors").stat()
    engine.kept.save_as("walk", TEXT)
    assert (tmp_path / "walk.safetensors").stat().st_ino == before.st_ino
    engine.kept.save_as("walk", TEXT, {"title": "new"})
    assert (tmp_path / "walk.safetensors").stat().st_ino != before.st_ino
    assert [kept.saved.description.about for kept in engine.kept.folder.list()] == [{"title": "new"}]


def test_the_least_recently_used_files_make_room(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder)
    sizes = [engine.kept.save(f"{name} {TEXT}", tmp_path / name).num_bytes for name in "ab"]
    bounded = KeptFolder(tmp_path / "folder", most_bytes=2 * max(sizes) + 70_000)
    engine = engine_of(folder, bounded)
    for name in "ab":
        engine.kept.save_as(name, f"{name} {TEXT}")
        time.sleep(0.02)
    assert {kept.name for kept in bounded.list()} == {"a", "b"}
    engine_of(folder, bounded).generate(f"a {TEXT}", GREEDY)  # a is of use
    engine.kept.save_as("c", f"c {TEXT}")
    assert [kept.name for kept in bounded.list()] == ["c", "a"]
    assert bounded.used_bytes <= bounded.most_bytes


def test_a_prompt_larger_than_the_folder_is_refused_before_it_is_read(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder, KeptFolder(tmp_path, most_bytes=1000))
    calls = []
    with pytest.raises(RequestError, match="the cache folder may hold 1000 bytes"):
        engine.kept.save_as("walk", TEXT, progress=lambda *call: calls.append(call))
    assert calls == []


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../up", "a/b", "/etc/passwd", ".hidden", "-x", "a b", "ä", "a\0b", "x" * 101, "a\n", None, 3],
)
def test_names_that_lead_elsewhere_are_refused(name: object, folder: Path, tmp_path: Path) -> None:
    kept = KeptFolder(tmp_path / "in")
    for call in (kept.path_of, kept.find, kept.remove):
        with pytest.raises(RequestError, match="the name of a kept prompt must have 1 to 100 letters"):
            call(name)
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]


def test_links_in_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    kept = KeptFolder(tmp_path / "in")
    (tmp_path / "in" / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert kept.list() == [] and kept.find("link") is None


def test_without_a_folder_nothing_has_a_name(folder: Path) -> None:
    with pytest.raises(RequestError, match="start with --cache-folder DIR"):
        engine_of(folder).kept.save_as("walk", TEXT)


def test_folders_that_cannot_be_used_are_refused_at_the_start(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the cache folder .*file cannot be made"):
        KeptFolder(tmp_path / "file")
    with pytest.raises(ConfigError, match="must be a positive number of bytes"):
        KeptFolder(tmp_path, 0)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="there is no permission to write to it"):
        KeptFolder(tmp_path / "new")


def test_a_folder_that_is_gone_stops_no_reply(folder: Path, tmp_path: Path, caplog) -> None:
    engine = engine_of(folder, KeptFolder(tmp_path / "in"))
    (tmp_path / "in").rmdir()
    assert engine.generate(TEXT, GREEDY).token_ids
    assert "cannot be read" in caplog.text
    with pytest.raises(SavedCacheError, match="cannot be read"):
        engine.kept.folder.list()


def test_only_the_owner_can_read_a_new_folder_and_old_partial_files_go(tmp_path: Path) -> None:
    kept = KeptFolder(tmp_path / "in")
    assert (tmp_path / "in").stat().st_mode & 0o777 == 0o700
    stale, young = (kept.folder / f".{name}{PARTIAL}" for name in ("old", "new"))
    for path in (stale, young):
        path.write_bytes(b"x")
    os.utime(stale, (1, 1))
    KeptFolder(tmp_path / "in")
    assert list(kept.folder.iterdir()) == [young]
