"""files/hub.py against a stand-in for the hub on this machine: what is downloaded, resumed, refused and explained.

huggingface_hub reads its environment once, when it is imported: so each story runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from container_writer import write_container
from fixtures import LOCAL_DATA
from gptq_writer import write_checkpoint
from hub_server import StandInHub, running_hub

NAME = "TheBloke/Tiny-GPTQ"
BRANCH = "gptq-4bit-32g-actorder_True"
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three model folders with tokenizers, one of them in shards, with files beside them that nobody should load."""
    root = tmp_path_factory.mktemp("models")
    write_checkpoint(root / "main", {"vocab_size": 512})
    write_checkpoint(
        root / "branch", {"vocab_size": 512}, desc_act=True, shards=2, config_files=("quantize_config.json",)
    )
    write_container(root / "awq", "awq", None, {"vocab_size": 512})
    source = LOCAL_DATA / "gptq" / "g2-32-act-asym-v2"
    for name in ("main", "branch", "awq"):
        shutil.copy(source / "tokenizer.json", root / name)
        for extra in ("pytorch_model.bin", "training_args.pt", "modeling_evil.py", "model.gguf"):
            (root / name / extra).write_bytes(b"never to be downloaded")
    shutil.copy(root / "branch" / "model-00001-of-00002.safetensors", root / "branch" / "consolidated.safetensors")
    (root / "main" / "original").mkdir()
    (root / "main" / "original" / "model.safetensors").write_bytes(b"another copy")
    return root


@pytest.fixture
def hub(folders: Path) -> Iterator[StandInHub]:
    with running_hub() as server:
        server.models[NAME] = {"main": folders / "main", BRANCH: folders / "branch"}
        server.models["someone/awq"] = {"main": folders / "awq"}
        yield server


@pytest.fixture
def run(hub: StandInHub, tmp_path: Path) -> Run:
    """A command line of ropewalk, or with `source` a Python program, in a folder and with a cache of its own."""

    def start(*arguments: str, source: str | None = None, **changed: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = ["-m", "ropewalk", *arguments] if source is None else ["-c", source]
        return subprocess.run(
            [sys.executable, *command],
            env=kept | settings | changed,
            cwd=tmp_path,
            input="",
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


def files_in(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("snapshots/*/*")}


def said(done: subprocess.CompletedProcess, code: int = 2) -> str:
    """The error, on one line."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_name_generates_text_and_only_what_is_needed_is_downloaded(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    done = run("generate", NAME, "--prompt", "one two", "--max-new-tokens", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "hf") == {"config.json", "tokenizer.json", "model.safetensors"}
    assert not any(word in request for request in hub.requests for word in ("evil", ".bin", ".pt", "gguf", "original"))
    assert "model.safetensors" in done.stderr or "Fetching" in done.stderr  # progress
    asked = len(hub.asked_for("safetensors"))
    assert run("info", NAME).returncode == 0
    assert len(hub.asked_for("safetensors")) == asked


def test_a_revision_has_its_own_weights_and_of_two_sets_the_index_chooses(run: Run, tmp_path: Path) -> None:
    done = run("info", f"{NAME}:{BRANCH}", "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["act_order"] is True
    shards = {f"model-0000{part}-of-00002.safetensors" for part in (1, 2)}
    assert set(info["files"]) == shards
    assert {name for name in files_in(tmp_path / "hf") if name.endswith(".safetensors")} == shards


def test_load_model_and_the_other_doors_of_the_library_take_names(run: Run) -> None:
    done = run(
        source=f"""
import sys, ropewalk
assert "huggingface_hub" not in sys.modules
model = ropewalk.load_model("someone/awq", threads=1)
tokenizer = ropewalk.load_tokenizer("someone/awq")
engine = ropewalk.Engine(model, tokenizer, draft_model="{NAME}", speculation="draft")
print(engine.generate("one two", ropewalk.SamplingParams(max_new_tokens=2, temperature=0.0)).stats is not None)
from ropewalk.model.info import model_info
print(model_info("{NAME}", second_folder="{NAME}", layer_order="a:0,b:1").num_instances)
"""
    )
    assert done.stdout.split() == ["True", "2"], done.stderr


def test_a_local_folder_needs_no_hub(run: Run, folders: Path) -> None:
    done = run(
        source=f"""
import sys, ropewalk
ropewalk.load_model({str(folders / "main")!r}, threads=1)
print("huggingface_hub" in sys.modules)
"""
    )
    assert done.stdout.strip() == "False", done.stderr


def test_an_interrupted_download_goes_on_where_it_ended(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    hub.break_after = 20_000
    run("info", NAME)
    done = run("info", NAME)
    assert done.returncode == 0, done.stderr
    spans = [request.partition("bytes=")[2] for request in hub.asked_for("model.safetensors")]
    assert len(spans) > 1
    assert any(span.startswith("20000-") for span in spans), spans


def test_without_the_hub_the_cache_serves_what_is_complete(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    assert run("info", NAME).returncode == 0
    offline = run("info", NAME, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and "taken from the cache as it is, because HF_HUB_OFFLINE" in offline.stderr
    unreachable = run("info", NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 0 and "cannot be asked" in unreachable.stderr
    assert "is not in the cache" in said(run("info", f"{NAME}:{BRANCH}", HF_HUB_OFFLINE="1"))
    assert "is not in the cache" in said(run("info", "someone/awq", HF_ENDPOINT="http://127.0.0.1:9"))
    next((tmp_path / "hf").rglob("snapshots/*/model.safetensors")).unlink()
    assert "is not complete in the cache, and HF_HUB_OFFLINE" in said(run("info", NAME, HF_HUB_OFFLINE="1"))


def test_what_cannot_be_had_is_explained_in_a_sentence(hub: StandInHub, run: Run) -> None:
    hub.gated.add("someone/awq")
    assert f"there is no folder no/such here, and no model no/such on {hub.url}" in said(run("info", "no/such"))
    assert f"{NAME} has no revision 3bit; it has main, {BRANCH}" in said(run("info", f"{NAME}:3bit"))
    assert f"someone/awq is gated: accept its terms at {hub.url}/someone/awq" in said(run("info", "someone/awq"))
    assert run("info", "someone/awq", HF_TOKEN=hub.token).returncode == 0


def test_a_model_that_is_not_supported_is_refused_before_its_weights_come(
    hub: StandInHub, run: Run, folders: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders / "main", other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (other / "config.json").write_text(json.dumps(config))
    hub.models["someone/fp8"] = {"main": other}
    assert "8-bit floating-point (FP8) weights" in said(run("chat", "someone/fp8"))
    assert not hub.asked_for("safetensors")
    (other / "config.json").unlink()
    hub.models["someone/gguf"] = {"main": other}
    assert "someone/gguf has no config.json" in said(run("chat", "someone/gguf"))


def test_a_full_disk_is_noticed_before_the_download(hub: StandInHub, run: Run) -> None:
    done = run(
        source=f"""
import shutil
from collections import namedtuple
shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(1, 1, 1000)
import ropewalk
try:
    ropewalk.load_model("{NAME}")
except ropewalk.RopewalkError as error:
    print(error)
"""
    )
    assert f"{NAME} needs " in done.stdout and "1000 B are free there: make room, or set HF_HOME" in done.stdout
    assert not hub.asked_for("safetensors")


def test_a_server_starts_with_a_name_and_is_called_by_it(run: Run) -> None:
    pytest.importorskip("fastapi")
    done = run(
        source=f"""
import ropewalk.faces.server.launch as launch
from ropewalk.faces.cli.main import main

class Server:
    def __init__(self, config, service):
        print(service.names.base)
    def run(self, sockets):
        pass

launch.GracefulServer = Server
print(main(["serve", "{NAME}", "--port", "0", "--threads", "1"]))
"""
    )
    assert done.stdout.split() == ["Tiny-GPTQ", "0"], done.stderr


def test_the_cache_is_listed_by_the_names_that_load(run: Run) -> None:
    assert "there are no models in" in run("list").stderr
    for name in (NAME, f"{NAME}:{BRANCH}", "someone/awq"):
        assert run("info", name).returncode == 0
    done = run("list", "--json")
    found = {model["name"]: model for model in json.loads(done.stdout)}
    assert set(found) == {NAME, f"{NAME}:{BRANCH}", "someone/awq"}
    assert all(model["loads"] for model in found.values())
    assert found["someone/awq"]["weights"] == "AWQ 4-bit, groups of 32"
