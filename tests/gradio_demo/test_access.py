"""gradio_demo/access.py: what may be opened, and that nothing leads out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ropewalk.base.errors import RequestError
from ropewalk.files.embedded import demo_model_path
from ropewalk.gradio_demo.shared import access as access_module
from ropewalk.gradio_demo.shared.access import EMBEDDED, MAX_UPLOAD_BYTES, Access


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """models/publisher/llama beside a secret folder."""
    for folder in ("models/publisher/llama", "models/storm", "secret", "uploads/1", "uploads/2"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("models/publisher/llama", "secret"):
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "models/storm/adapter_config.json").write_text("{}")
    return tmp_path


def access(tree: Path) -> Access:
    return Access(tree / "models", (), tree / "uploads")


@pytest.mark.parametrize("name", ["", EMBEDDED, f"  {EMBEDDED} "])
def test_the_embedded_model_can_always_be_opened(name: str) -> None:
    assert Access().open(name) == demo_model_path()


def test_models_are_listed_and_opened_by_their_path_below_the_models_directory(tree: Path) -> None:
    assert access(tree).model_names() == [EMBEDDED, "publisher/llama"]
    assert access(tree).open("publisher/llama") == tree / "models/publisher/llama"
    assert access(tree).open(str(tree / "models/publisher/llama")) == tree / "models/publisher/llama"


@pytest.mark.parametrize(
    "name", ["../secret", "publisher/../../secret", "{tree}/secret", "/", "/etc", "~", "models", "\0", "x" * 5000]
)
def test_nothing_outside_of_the_models_directory_is_opened(tree: Path, name: str) -> None:
    with pytest.raises(RequestError, match="no such folder under .*models, and others may not be read"):
        access(tree).open(name.format(tree=tree))


def test_without_a_models_directory_the_message_says_how_to_give_one(tree: Path) -> None:
    with pytest.raises(RequestError, match="--models DIR"):
        Access().open(str(tree / "models/publisher/llama"))


def test_a_link_to_a_folder_outside_is_refused(tree: Path) -> None:
    (tree / "models/link").symlink_to(tree / "secret")
    with pytest.raises(RequestError, match="may not be read"):
        access(tree).open("link")


def test_a_link_within_a_folder_that_leads_outside_is_refused_by_name(tree: Path) -> None:
    (tree / "secret/weights").write_text("secret")
    (tree / "models/publisher/llama/model.safetensors").symlink_to(tree / "secret/weights")
    with pytest.raises(RequestError, match="model.safetensors is a link that leads out"):
        access(tree).open("publisher/llama")


def test_links_that_stay_inside_are_followed(tree: Path) -> None:
    (tree / "models/blob").write_text("weights")
    (tree / "models/publisher/llama/model.safetensors").symlink_to(tree / "models/blob")
    (tree / "models/alias").symlink_to(tree / "models/publisher/llama")
    assert access(tree).open("alias") == tree / "models/publisher/llama"


def test_what_is_no_name_is_refused(tree: Path) -> None:
    with pytest.raises(RequestError, match="the name of one model is needed, got list"):
        Access(tree / "models").open(["tiny"])
    assert not Access(tree / "models").must_be_fetched(None)


def test_a_file_is_no_folder(tree: Path) -> None:
    with pytest.raises(RequestError, match="is a file"):
        access(tree).open("publisher/llama/config.json")


def test_adapters_are_found_beside_the_model_and_under_the_models_directory(tree: Path) -> None:
    (tree / "models/publisher/llama/adapters/poet").mkdir(parents=True)
    (tree / "models/publisher/llama/adapters/poet/adapter_config.json").write_text("{}")
    found = access(tree).adapter_folders(tree / "models/publisher/llama")
    assert list(found) == ["poet", "storm"]


def test_only_files_in_the_folder_of_uploads_count_as_dropped(tree: Path) -> None:
    (tree / "uploads/1/a.txt").write_text("a")
    (tree / "uploads/2/b.txt").symlink_to(tree / "secret/config.json")
    assert access(tree).check_upload(tree / "uploads/1/a.txt").name == "a.txt"
    for path in (tree / "secret/config.json", tree / "uploads/2/b.txt", tree / "uploads/../secret/config.json"):
        with pytest.raises(RequestError, match="only files that were dropped"):
            access(tree).check_upload(path)


def test_the_files_of_a_dropped_folder_are_brought_together(tree: Path) -> None:
    (tree / "uploads/1/config.json").write_text("{}")
    (tree / "uploads/2/model.safetensors").write_text("weights")
    paths = [tree / "uploads/1/config.json", tree / "uploads/2/model.safetensors"]
    folder = access(tree).dropped_folder(paths)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert access(tree).open(str(folder)) == folder


def test_dropped_files_without_a_config_are_refused(tree: Path) -> None:
    (tree / "uploads/1/a.txt").write_text("a")
    with pytest.raises(RequestError, match="no config.json is among the dropped files"):
        access(tree).dropped_folder([tree / "uploads/1/a.txt"])


def test_a_file_that_was_dropped_twice_is_taken_once(tree: Path) -> None:
    for number in (1, 2):
        (tree / f"uploads/{number}/config.json").write_text("{}")
    paths = [tree / "uploads/1/config.json", tree / "uploads/1/config.json", tree / "uploads/2/config.json"]
    assert access(tree).dropped_folder(paths) == tree / "uploads/1"


def test_different_files_of_one_name_are_refused_by_name(tree: Path) -> None:
    """A folder within the dropped one holds a file of the same name; a page does not tell which was where."""
    (tree / "uploads/1/config.json").write_text("{}")
    (tree / "uploads/2/config.json").write_text('{"other": 1}')
    with pytest.raises(RequestError, match="two different files named config.json .* without the folders inside it"):
        access(tree).dropped_folder([tree / "uploads/1/config.json", tree / "uploads/2/config.json"])
    assert not list((tree / "uploads").glob("dropped-*"))


def test_a_dropped_file_of_more_than_the_limit_is_refused_with_what_to_do(
    tree: Path,
) -> None:
    path = tree / "uploads/1/model.safetensors"
    path.touch()
    os.truncate(path, MAX_UPLOAD_BYTES + 1)  # takes no room on the disk
    with pytest.raises(RequestError, match="model.safetensors is larger than the 4.0 GiB that"):
        access(tree).check_upload(path)


def test_a_dropped_folder_of_more_than_the_limit_is_refused_with_what_to_do(tree: Path) -> None:
    paths = []
    for number in range(3):
        paths.append(tree / f"uploads/1/model-{number}.safetensors")
        paths[-1].touch()
        os.truncate(paths[-1], MAX_UPLOAD_BYTES)
    with pytest.raises(RequestError, match="have 12.0 GiB, and at most 8.0 GiB are accepted: copy the folder to"):
        access(tree).dropped_folder(paths)


def test_a_name_on_the_hub_is_downloaded_when_it_is_loaded_and_then_known_to_all(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(access_module, "local_folder", lambda name: asked.append(name) or tree / "secret")
    page = access(tree)
    with pytest.raises(RequestError, match="TheBloke/x is no folder that may be read here; Load downloads it"):
        page.open("TheBloke/x")
    assert not asked
    assert page.open("TheBloke/x", fetch=True) == tree / "secret"
    assert page.open(" TheBloke/x ") == tree / "secret"
    assert asked == ["TheBloke/x"]


def test_a_model_of_the_shared_cache_may_link_to_the_files_beside_it(tree: Path) -> None:
    cached = tree / "models--a--b"
    snapshot = cached / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    (cached / "blobs" / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert Access(None, (snapshot.resolve(),), None).open(str(snapshot)) == snapshot.resolve()
