"""The three ways in, each in a process of its own: launcher, startup file and extension."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("transformers")

import ropewalk
from ropewalk.faces.cli.main import main
from ropewalk.faces.webui.extension import SCRIPT
from ropewalk.faces.webui.startup_file import line
from webui_support import STAND_IN

PACKAGES = Path(ropewalk.__file__).parents[1]
MODEL = ("--model", "demo", "--ctx-size", "192", "--lora", "storm", "poet")
OURS = ("--loader", "ropewalk", "--rope-method", "yarn", "--rope-factor", "2", "--chunk-size", "64")
EXPECTED = {
    **{"loader": "ropewalk", "loaded": "RopewalkForCausalLM", "loras": ["storm", "poet"], "truncation_length": 192},
    "loaders": ["llama.cpp", "Transformers", "ExLlamav3_HF", "ropewalk"],
}


@pytest.fixture
def server(tmp_path: Path, root: Path) -> Path:
    """A copy of the stand-in, as a checkout of its own, with models and loras."""
    folder = shutil.copytree(STAND_IN, tmp_path / "webui", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "loras").symlink_to(root / "loras")
    (folder / "models").mkdir()
    for model in (root / "models").iterdir():
        (folder / "models" / model.name).symlink_to(model)
    return folder


def start(folder: Path, *command: str, path: tuple[Path, ...] = (PACKAGES,)) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def state(done: subprocess.CompletedProcess) -> dict[str, Any]:
    """What server.py said at its end."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("STATE ")]
    assert lines, done.stderr
    return json.loads(lines[0].removeprefix("STATE "))


def test_the_launcher_loads_a_model_with_our_flags(server: Path) -> None:
    done = start(server.parent, "-m", "ropewalk", "webui", "run", str(server), "--", *MODEL, *OURS)
    found = state(done)
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    assert {"rope_method", "chunk_size"} <= set(found["provided"])
    assert "RoPE scaling: yarn, factor 2" in done.stderr


def startup_folder(tmp_path: Path, environment: str = sys.prefix) -> Path:
    """A folder whose .pth files Python reads at its start, as it reads those of site-packages.

    environment: the one that the startup file was enabled for.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(folder)!r})\n")
    (folder / "ropewalk_webui.pth").write_text(line(Path(environment)))
    (folder / "ropewalk").symlink_to(PACKAGES / "ropewalk")
    return folder


def test_with_the_startup_file_a_plain_start_has_the_loader(server: Path, tmp_path: Path) -> None:
    found = state(start(server, "server.py", *MODEL, *OURS, path=(startup_folder(tmp_path),)))
    assert {name: found[name] for name in EXPECTED} == EXPECTED


def test_with_startup_file_and_extension_and_launcher_everything_happens_once(server: Path, tmp_path: Path) -> None:
    install(server)
    command = ("-m", "ropewalk", "webui", "run", ".", "--", *MODEL, *OURS, "--extensions", "ropewalk")
    done = start(server, *command, path=(startup_folder(tmp_path),))
    found = state(done)
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    assert done.stderr.count("RoPE scaling: yarn") == 1


SAVED = "demo$:\n  loader: ropewalk\n  ctx_size: 192\n  rope_method: yarn\n  rope_factor: 2\n"


def test_a_model_saved_with_our_loader_ends_a_server_that_has_the_extension_alone(server: Path) -> None:
    install(server)
    (server / "models" / "config-user.yaml").write_text(SAVED)
    done = start(server, "server.py", "--model", "demo", "--extensions", "ropewalk")
    assert done.returncode == 1 and "KeyError: 'ropewalk'" in done.stderr  # why install writes the startup file too


def test_a_model_saved_with_our_loader_starts_with_the_startup_file(server: Path, tmp_path: Path) -> None:
    install(server)
    (server / "models" / "config-user.yaml").write_text(SAVED)
    command = ("server.py", "--model", "demo", "--extensions", "ropewalk")
    done = start(server, *command, path=(startup_folder(tmp_path),))
    found = state(done)
    assert (found["loader"], found["loaded"]) == ("ropewalk", "RopewalkForCausalLM")
    assert found["truncation_length"] == 192 and "RoPE scaling: yarn, factor 2" in done.stderr


def test_a_model_saved_with_our_loader_does_not_end_the_server_over_our_name_once_we_are_gone(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ropewalk.faces.webui.startup_file.startup_file", lambda: server / "none.pth")
    (server / "models" / "config-user.yaml").write_text(SAVED)
    assert main(["webui", "uninstall", str(server)]) == 0
    assert yaml.safe_load((server / "models" / "config-user.yaml").read_text()) == {"demo$": {}}
    done = start(server, "server.py", "--model", "demo")
    assert "KeyError" not in done.stderr and "optimum" in done.stderr  # what this version says without us


@pytest.mark.parametrize("way", ["launcher", "startup file"])
def test_a_start_that_fails_in_another_loader_shows_no_frame_of_ours(server: Path, tmp_path: Path, way: str) -> None:
    flags = ("--model", "dense", "--loader", "Transformers")
    if way == "launcher":
        done = start(server.parent, "-m", "ropewalk", "webui", "run", str(server), "--", *flags)
    else:
        done = start(server, "server.py", *flags, path=(startup_folder(tmp_path),))
    assert done.returncode == 1 and "optimum" in done.stderr
    assert "in transformers_loader" in done.stderr and "ropewalk/faces" not in done.stderr


def install(server: Path) -> None:
    script = server / "user_data" / "extensions" / "ropewalk" / "script.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)


def test_as_an_extension_the_loader_is_there_after_the_start(server: Path) -> None:
    install(server)
    found = state(start(server, "server.py", "--extensions", "ropewalk"))
    assert "ropewalk" in found["loaders"] and found["loaded"] == "NoneType"


def test_the_extension_of_a_package_that_is_gone_does_not_end_the_server(server: Path, tmp_path: Path) -> None:
    install(server)
    site = tmp_path / "empty"
    (site / "ropewalk").mkdir(parents=True)
    (site / "ropewalk" / "__init__.py").write_text("raise ModuleNotFoundError('no module named ropewalk')\n")
    found = state(start(server, "server.py", "--extensions", "ropewalk", path=(site,)))
    assert found["loaders"] == ["llama.cpp", "Transformers", "ExLlamav3_HF"]


PROGRAM = "import sys; print(sorted(name for name in sys.modules if name.startswith(('ropewalk', 'numpy', 'torch'))))"


def test_the_startup_file_costs_other_programs_nothing(tmp_path: Path) -> None:
    site = startup_folder(tmp_path)
    assert start(tmp_path, "-c", PROGRAM, path=(site,)).stdout.strip() == "[]"


def test_the_startup_file_imports_nothing_heavy_into_another_server(tmp_path: Path) -> None:
    site = startup_folder(tmp_path)
    (tmp_path / "server.py").write_text(f"import json\n{PROGRAM}\n")
    done = start(tmp_path, "server.py", path=(site,))
    assert "ropewalk.webui.autostart" in done.stdout
    assert "numpy" not in done.stdout and "torch" not in done.stdout and not done.stderr


def test_a_program_with_modules_of_its_own_is_left_alone(tmp_path: Path) -> None:
    site = startup_folder(tmp_path)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "shared.py").write_text("import argparse\nargs = 1\n")
    (tmp_path / "server.py").write_text("import modules.shared\nprint(modules.shared.args)\n" + PROGRAM)
    done = start(tmp_path, "server.py", path=(site,))
    assert done.stdout.startswith("1\n") and "ropewalk.faces.webui.hooks" not in done.stdout and not done.stderr


def test_the_startup_file_of_a_package_that_is_gone_is_silent(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("print('up')\n")
    command = f"import sys; sys.orig_argv = ['server.py']; exec({line(Path(sys.prefix))!r}); print('up')"
    done = start(tmp_path, "-I", "-S", "-c", command)
    assert (done.stdout, done.stderr) == ("up\n", "")


def test_the_startup_file_of_another_environment_whose_packages_are_seen_does_nothing(
    server: Path, tmp_path: Path
) -> None:
    site = startup_folder(tmp_path, environment=str(tmp_path / "base"))
    found = state(start(server, "server.py", path=(site,)))
    assert found["loaders"] == ["llama.cpp", "Transformers", "ExLlamav3_HF"]
