"""`ropewalk webui install`, `uninstall` and `status` on folders with the shapes of several versions."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import ropewalk
from ropewalk.base.errors import ConfigError
from ropewalk.faces.cli.main import main
from ropewalk.faces.webui.checkout import find_checkout
from ropewalk.faces.webui.embedded_model import default_adapters
from ropewalk.faces.webui.extension import SCRIPT, clean_yaml
from ropewalk.faces.webui.startup_file import disable, enable, is_enabled, line, startup_file
from ropewalk.files.embedded import EMBEDDED_CONTEXT, demo_model_path

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def startup(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The startup file, in a folder of the test's own: that of the Python which runs the tests stays as it is."""
    path = tmp_path_factory.mktemp("site-packages") / "ropewalk_webui.pth"
    monkeypatch.setattr("ropewalk.faces.webui.startup_file.startup_file", lambda: path)
    return path


def make_checkout(folder: Path, user_data: bool = True, user_extensions: bool = True) -> Path:
    """A folder that looks like a version: v3.7 and later; v3.1 to v3.6 without user extensions; before without both."""
    (folder / "modules").mkdir(parents=True)
    (folder / "server.py").write_text("")
    (folder / "modules" / "text_generation.py").write_text("")
    source = "shared.user_data_dir / 'extensions'" if user_extensions else "Path('extensions')"
    (folder / "modules" / "extensions.py").write_text(f"# {source}\n")
    (folder / "extensions").mkdir()
    (folder / "user_data" / "models" if user_data else folder / "models").mkdir(parents=True)
    return folder


def run(*arguments: str | Path, capsys: pytest.CaptureFixture) -> str:
    assert main(["webui", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "place"),
    [
        ({}, "user_data/extensions/ropewalk/script.py"),
        ({"user_extensions": False}, "extensions/ropewalk/script.py"),
        ({"user_data": False, "user_extensions": False}, "extensions/ropewalk/script.py"),
    ],
    ids=["v3.7 on", "v3.1 to v3.6", "before v3.1"],
)
def test_the_extension_is_written_where_the_version_looks_and_removed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture, shape: dict[str, bool], place: str
) -> None:
    checkout = make_checkout(tmp_path / "webui", **shape)
    before = sorted(tmp_path.rglob("*"))
    assert str(checkout / place) in run("install", checkout, capsys=capsys)
    run("install", checkout, capsys=capsys)
    assert (checkout / place).read_text() == SCRIPT
    assert f"installed: {(checkout / place).parent}" in run("status", checkout, capsys=capsys)
    assert "removed" in run("uninstall", checkout, capsys=capsys)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "extensions"] == [
        path for path in before if path.name != "extensions"
    ]
    assert "nothing was found" in run("uninstall", checkout, capsys=capsys)


def test_another_folder_of_user_data_is_used(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkout = make_checkout(tmp_path / "webui")
    (tmp_path / "mine").mkdir()
    run("install", checkout, "--user-data-dir", tmp_path / "mine", capsys=capsys)
    assert (tmp_path / "mine" / "extensions" / "ropewalk" / "script.py").is_file()


def test_a_script_of_someone_else_is_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkout = make_checkout(tmp_path)
    script = checkout / "user_data/extensions/ropewalk/script.py"
    script.parent.mkdir(parents=True)
    script.write_text("print('mine')")
    assert main(["webui", "install", str(checkout)]) == 2
    assert "is not ours" in capsys.readouterr().err
    (script.parent / "more.py").write_text("")
    assert "was left" in run("uninstall", checkout, capsys=capsys)
    assert script.read_text() == "print('mine')"


def test_a_folder_that_is_no_web_ui_is_refused_by_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for action in ("install", "uninstall", "status", "run"):
        assert main(["webui", action, str(tmp_path)]) == 2
        assert "is not a folder of text-generation-webui: it has no server.py" in capsys.readouterr().err
    checkout = make_checkout(tmp_path / "webui")
    assert main(["webui", "install", str(checkout), "--user-data-dir", "nowhere"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_the_script_is_the_one_that_the_source_tree_has_as_an_extension_folder() -> None:
    assert (REPOSITORY / "loader_plugin" / "script.py").read_text() == SCRIPT


def test_uninstalling_cleans_what_the_web_ui_would_fail_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkout = make_checkout(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config-user.yaml").write_text("model$:\n  loader: ropewalk\n  cpu: true\n")
    config = checkout / "user_data/models/config-user.yaml"
    config.write_text(
        "# mine\nfirst$:\n  loader: ropewalk\n  ctx_size: 4096\n  rope_method: yarn\n  cpu: true\n"
        "second$:\n  loader: ExLlamav3\n  ctx_size: 2048\n  alpha_value: 2.5\nthird$:\n  loader: 'ropewalk'\n"
    )
    settings = checkout / "user_data/settings.yaml"
    settings.write_text(
        "mode: chat\ndefault_extensions:\n- ropewalk\n- gallery\nropewalk-autoload: x\ndark_theme: true\n"
    )
    (checkout / "modules" / "loaders.py").write_text("loaders_and_params = {'ExLlamav3': ['ctx_size', 'cache_type']}\n")
    (checkout / "user_data/CMD_FLAGS.txt").write_text(
        "# --loader ropewalk\n--api --loader ropewalk\n--ctx-size 512\n--alpha_value 2\n"
    )
    assert f"{config}:3" in run("status", checkout, capsys=capsys)
    said = run("uninstall", checkout, "--model-dir", tmp_path / "elsewhere", capsys=capsys)
    assert (tmp_path / "elsewhere" / "config-user.yaml").read_text() == "model$:\n  cpu: true\n"
    assert f"cleaned {config}" in said and f"cleaned {settings}" in said
    flags = checkout / "user_data/CMD_FLAGS.txt"
    assert [line for line in said.splitlines() if "still names" in line] == [
        f"{flags}:{number} still names ropewalk: edit it" for number in (2, 4)
    ]
    assert config.read_text().startswith("# mine\nfirst$:\n  cpu: true\nsecond$:\n  loader: ExLlamav3\n")
    assert yaml.safe_load(config.read_text()) == {
        **{"first$": {"cpu": True}, "second$": {"loader": "ExLlamav3", "ctx_size": 2048}, "third$": {}}
    }
    assert yaml.safe_load(settings.read_text()) == {
        **{"mode": "chat", "default_extensions": ["gallery"], "dark_theme": True}
    }


def test_the_embedded_model_is_put_among_the_models_and_removed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkout = make_checkout(tmp_path)
    folder = checkout / "user_data/models/ropewalk-demo"
    said = run("demo", checkout, capsys=capsys)
    assert f"wrote {folder}" in said and f"{EMBEDDED_CONTEXT.method} scaling by {EMBEDDED_CONTEXT.factor:g}" in said
    model, length = ropewalk.load_model(folder), int(512 * EMBEDDED_CONTEXT.factor)
    assert (model.rope.covers, model.rope.original_length, model.max_seq_len) == (length, 512, length)
    assert [adapter.name for adapter in default_adapters(folder)] == [EMBEDDED_CONTEXT.adapter]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in demo_model_path().iterdir())
    assert main(["webui", "demo", str(checkout)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert f"removed {folder}" in run("uninstall", checkout, capsys=capsys)
    assert not folder.exists()


@pytest.mark.parametrize("change", ["config.json", "mine.txt"])
def test_an_embedded_model_that_was_changed_is_left(tmp_path: Path, capsys: pytest.CaptureFixture, change: str) -> None:
    checkout = make_checkout(tmp_path)
    run("demo", checkout, capsys=capsys)
    (checkout / "user_data/models/ropewalk-demo" / change).write_text("{}")
    assert "has been changed and was left" in run("uninstall", checkout, capsys=capsys)


@pytest.mark.parametrize("names", [["../elsewhere"], [".."], [""], "linear-4", [3]])
def test_adapters_that_a_folder_asks_for_are_names_of_its_own(tmp_path: Path, names: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"default_adapters": names}))
    with pytest.raises(ConfigError, match="config.json: default_adapters must be a list of names of folders in"):
        default_adapters(tmp_path)


def test_the_embedded_model_needs_a_folder_for_models(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkout = make_checkout(tmp_path)
    (checkout / "user_data/models").rmdir()
    assert main(["webui", "demo", str(checkout)]) == 2
    assert "name the folder of models with --model-dir" in capsys.readouterr().err


def test_a_list_of_extensions_that_gets_empty_stays_a_list() -> None:
    assert yaml.safe_load(clean_yaml("default_extensions:\n- ropewalk\nmode: chat\n")) == {
        **{"default_extensions": [], "mode": "chat"}
    }


VALUES = st.one_of(
    st.integers(), st.booleans(), st.none(), st.text("abc: '#-\n", max_size=12), st.sampled_from(["ropewalk"])
)
LOADERS = st.sampled_from(["ropewalk", "Transformers", "llama.cpp"])


@settings(deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z.*]{1,12}\$", fullmatch=True),
        st.fixed_dictionaries({"loader": LOADERS}, optional={"ctx_size": VALUES, "note": VALUES, "cache_type": VALUES}),
        max_size=5,
    ),
    st.frozensets(st.sampled_from(["ctx_size", "cache_type"])),
)
def test_a_cleaned_file_is_the_same_without_our_loader_and_its_settings(
    config: dict[str, Any], only_ours: frozenset[str]
) -> None:
    cleaned = clean_yaml(yaml.dump(config, sort_keys=False), only_ours)
    expected = {
        pattern: {name: value for name, value in settings.items() if name == "note"}
        if settings["loader"] == "ropewalk"
        else {name: value for name, value in settings.items() if name not in only_ours}
        for pattern, settings in config.items()
    }
    assert (yaml.safe_load(cleaned) or {}) == expected
    assert clean_yaml(cleaned, only_ours) == cleaned


@settings(deadline=None)
@given(st.text("abcropewalk: '-#\n", max_size=200))
def test_text_without_our_loader_stays_as_it_is(text: str) -> None:
    if "ropewalk" not in text:
        assert clean_yaml(text) == text


def test_status_lists_hooks_that_find_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkout = make_checkout(tmp_path)
    (checkout / "modules" / "models.py").write_text("def load_model(): ...\n")
    said = run("status", checkout, capsys=capsys)
    assert "missing       unloading: modules.models: unload_model" in said
    assert "missing       refusing to train: modules.training: no module modules.training" in said
    assert "missing       loading: modules.models" not in said


def test_what_a_module_defines_is_found_without_running_it(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    (checkout / "modules" / "some.py").write_text(
        "import os as o\nfrom a import b, c as d\nx: int = 1\ny = z = 2\n"
        "class K: ...\ndef f(): inner = 1\nasync def g(): ...\n"
    )
    names = find_checkout(checkout).defined_names("modules.some")
    assert names == {"o", "b", "d", "x", "y", "z", "K", "f", "g"}
    assert find_checkout(checkout).defined_names("modules.none") is None


def test_the_startup_file_is_written_and_removed(startup: Path) -> None:
    enable(startup)
    assert startup.read_text() == line(Path(sys.prefix)) and startup.read_text().count("\n") == 1
    assert is_enabled(startup)
    assert disable(startup)
    assert not is_enabled(startup) and not disable(startup)


def test_the_startup_file_of_an_environment_is_in_its_site_packages() -> None:
    assert startup_file().parent == Path(sysconfig.get_path("purelib"))


def test_installing_lets_every_start_have_the_loader_and_uninstalling_undoes_that(
    tmp_path: Path, startup: Path, capsys: pytest.CaptureFixture
) -> None:
    checkout = make_checkout(tmp_path / "webui")
    assert f"wrote {startup}" in run("install", checkout, capsys=capsys)
    assert is_enabled(startup)
    assert f"startup file  enabled: {startup}" in run("status", checkout, capsys=capsys)
    assert f"removed {startup}" in run("uninstall", checkout, capsys=capsys)
    assert not startup.exists()


def test_installing_without_the_startup_file_says_what_to_do_instead(
    tmp_path: Path, startup: Path, capsys: pytest.CaptureFixture
) -> None:
    checkout = make_checkout(tmp_path / "webui")
    assert "ropewalk webui run" in run("install", "--no-startup", checkout, capsys=capsys)
    assert not startup.exists() and (checkout / "user_data/extensions/ropewalk/script.py").is_file()


def test_the_startup_file_is_not_written_into_a_python_that_does_not_start_the_web_ui(
    tmp_path: Path, startup: Path, capsys: pytest.CaptureFixture
) -> None:
    checkout = make_checkout(tmp_path / "webui")
    own = checkout / "installer_files" / "env"
    own.mkdir(parents=True)
    assert f"has a Python of its own in {own}" in run("install", checkout, capsys=capsys)
    assert not startup.exists()
    assert f"is started with that in {own}" in run("status", checkout, capsys=capsys)
