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
from dataclasses import dataclass
from pathlib import Path

import pytest

from container_writer import write_container
from fixtures import LOCAL_DATA
from gptq_writer import write_checkpoint
from hub_server import StandInHub, running_hub

NAME = "TheBloke/Tiny-GPTQ"
BRANCH = "gptq-4bit-32g-actorder_True"

# One process for several command lines, since importing torch takes longer than all else here. A word "python" in front
# makes the next one a program. What each wrote ends with a mark, on stdout with its exit code.
PROGRAM = """
import json, sys
from ropewalk.faces.cli.main import main
for command in json.loads(sys.argv[1]):
    code = exec(command[1]) if command[0] == "python" else main(command)
    print(f"@@{code}@@", flush=True)
    print("@@", file=sys.stderr, flush=True)
"""


@dataclass(frozen=True)
class Done:
    """What a command line ended with."""

    code: int | None
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr, of a command that failed with an explanation."""
        assert self.code == 2, self.err
        return self.err.strip().splitlines()[-1]


Run = Callable[..., list[Done]]


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
    """Command lines, in a folder and with a cache of their own; `changed`: environment variables."""

    def start(*commands: list[str], **changed: str) -> list[Done]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(commands)],
            env=kept | settings | changed,
            cwd=tmp_path,
            input="",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        parts, errors = done.stdout.split("@@")[:-1], done.stderr.split("@@\n")[:-1]
        codes = [None if code == "None" else int(code) for code in parts[1::2]]
        return [Done(*parts) for parts in zip(codes, parts[::2], errors, strict=True)]

    return start


def info(name: str = NAME) -> list[str]:
    return ["info", name, "--json"]


def download(name: str = NAME) -> list[str]:
    """A command that needs all of a model."""
    return ["generate", name, "--prompt", "one", "--max-new-tokens", "1", "--threads", "1"]


def files_in(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("snapshots/*/*")}


def test_a_name_generates_text_and_only_what_is_needed_is_downloaded(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    (done,) = run(["generate", NAME, "--prompt", "one two", "--max-new-tokens", "2", "--threads", "1"])
    assert done.code == 0, done.err
    assert "it/s" in done.err  # progress
    assert files_in(tmp_path / "hf") == {"config.json", "tokenizer.json", "model.safetensors"}
    assert not any(word in request for request in hub.requests for word in ("evil", ".bin", ".pt", "gguf", "original"))


def test_revisions_are_told_apart_fetched_once_and_listed_by_their_names(
    hub: StandInHub, run: Run, tmp_path: Path
) -> None:
    names = (NAME, f"{NAME}:{BRANCH}", "someone/awq")
    empty, *downloads, branch, again, main, listed = run(
        ["list"], *map(download, names), download(names[1]), info(names[1]), info(names[1]), info(), ["list", "--json"]
    )
    assert empty.code == 0 and "there are no models in" in empty.err
    assert [done.code for done in downloads] == [0] * 4, downloads[-1].err
    found = json.loads(branch.out)
    assert found["downloaded"] is True
    assert found["act_order"] is True and json.loads(main.out)["act_order"] is False
    shards = {f"model-0000{part}-of-00002.safetensors" for part in (1, 2)}
    assert set(found["files"]) == shards  # of two sets of weights the index chooses
    assert {name for name in files_in(tmp_path / "hf") if name.endswith(".safetensors")} == shards | {
        "model.safetensors"
    }
    assert again.out == branch.out
    assert len(hub.asked_for("model-00001")) == 1
    models = {model["name"]: model for model in json.loads(listed.out)}
    assert set(models) == {NAME, f"{NAME}:{BRANCH}", "someone/awq"}
    assert all(model["loads"] for model in models.values())
    assert models["someone/awq"]["weights"] == "AWQ 4-bit, groups of 32"


def test_info_downloads_no_weights(hub: StandInHub, run: Run, folders: Path, tmp_path: Path) -> None:
    shorter = "import ropewalk.files.remote_headers as remote; remote.FIRST_BYTES = 1000"
    branch, _, plain, here, text, second = run(
        info(f"{NAME}:{BRANCH}"),
        ["python", shorter],
        info(),
        info(str(folders / "main")),
        ["info", NAME],
        ["info", NAME, "--second-model", f"{NAME}:{BRANCH}", "--layer-order", "a:0,b:1", "--json"],
    )
    found, there = json.loads(plain.out), json.loads(here.out)
    assert (found["folder"], found["downloaded"]) == (NAME, False)
    assert (there["folder"], there["downloaded"]) == (str(folders / "main"), True)
    for fact in ("linears", "files", "weight_bytes", "format", "cache_bytes", "max_seq_len"):
        assert found[fact] == there[fact]
    assert "only their headers were downloaded" in text.out
    assert len(json.loads(branch.out)["files"]) == 2
    assert json.loads(second.out)["weight_bytes"] > found["weight_bytes"]
    assert not any(name.endswith(".safetensors") for name in files_in(tmp_path / "hf"))
    asked = [request for request in hub.asked_for(".safetensors") if "index.json" not in request]
    spans = [request.partition("bytes=")[2] for request in asked]
    assert all(int(span.partition("-")[2]) < 1 << 18 for span in spans), spans
    assert any(span.startswith("1000-") for span in spans)


def test_a_hub_that_sends_whole_files_is_read_up_to_the_headers(hub: StandInHub, run: Run, folders: Path) -> None:
    hub.ignores_ranges = True
    large = folders / "main" / "large.safetensors"
    large.write_bytes(bytes(48 << 20))
    program = f"""
from ropewalk.files import remote_headers as remote
from ropewalk.files.names import parse_name
assert remote._range(parse_name("{NAME}"), "large.safetensors", 0, 1000) == bytes(1000)
"""
    try:
        (read,) = run(["python", program])
    finally:
        large.unlink()
    assert read.code is None and hub.sent < 24 << 20  # what fits between the two
    shorter = "import ropewalk.files.remote_headers as remote; remote.FIRST_BYTES = 1000"
    whole, _, cut = run(info(), ["python", shorter], info())
    assert json.loads(whole.out)["downloaded"] is False
    assert cut.code == 2 and "model.safetensors cannot be read in parts" in cut.err


def test_the_doors_of_the_library_take_names_and_a_folder_needs_no_hub(run: Run, folders: Path) -> None:
    program = f"""
import sys, ropewalk
ropewalk.load_model({str(folders / "main")!r}, threads=1)
assert "huggingface_hub.hf_api" not in sys.modules
model, tokenizer = ropewalk.load_model("someone/awq", threads=1), ropewalk.load_tokenizer("someone/awq")
engine = ropewalk.Engine(model, tokenizer, draft_model="{NAME}", speculation="draft")
assert engine.generate("one two", ropewalk.SamplingParams(max_new_tokens=2, temperature=0.0)).stats is not None
from ropewalk.model.info import model_info
assert model_info("{NAME}", second_folder="{NAME}", layer_order="a:0,b:1").num_instances == 2
from ropewalk.faces.cli.divergence import versus
"""
    assert run(["python", program])[0].code is None


def test_an_interrupted_download_goes_on_where_it_ended(hub: StandInHub, run: Run) -> None:
    hub.break_after = 20_000
    pieces = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 4096"  # written at a time
    assert run(["python", pieces], download(), download())[-1].code == 0
    first, *others = [request.partition("bytes=")[2] for request in hub.asked_for("model.safetensors")]
    assert first == "" and others
    assert all(10_000 < int(span.partition("-")[0]) <= 20_000 for span in others), others


def test_without_the_hub_the_cache_serves_what_is_complete(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    assert run(download())[0].code == 0
    (unreachable, absent) = run(info(), info("someone/awq"), HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.code == 0 and "cannot be asked" in unreachable.err
    assert "someone/awq is no folder here and not in the cache" in absent.error
    remove = f"""
from pathlib import Path
next(Path({str(tmp_path / "hf")!r}).rglob("snapshots/*/model.safetensors")).unlink()
"""
    offline, branch, _, partial = run(info(), info(f"{NAME}:{BRANCH}"), ["python", remove], info(), HF_HUB_OFFLINE="1")
    assert offline.code == 0 and "taken from the cache as it is, because HF_HUB_OFFLINE" in offline.err
    assert f"{NAME}:{BRANCH} is no folder here and not in the cache" in branch.error
    assert f"{NAME} is not complete in the cache, and HF_HUB_OFFLINE" in partial.error


def test_what_cannot_be_had_is_explained_in_a_sentence(hub: StandInHub, run: Run) -> None:
    hub.gated.add("someone/awq")
    token = f'import os; os.environ["HF_TOKEN"] = "{hub.token}"'
    nowhere, revision, gated, _, allowed = run(
        info("no/such"), info(f"{NAME}:3bit"), info("someone/awq"), ["python", token], info("someone/awq")
    )
    assert f"there is no folder no/such here, and no model no/such on {hub.url}" in nowhere.error
    assert f"{NAME} has no revision 3bit; it has main, {BRANCH}" in revision.error
    assert f"someone/awq is gated: accept its terms at {hub.url}/someone/awq" in gated.error
    assert allowed.code == 0


def test_what_cannot_be_loaded_or_stored_is_refused_before_the_weights_come(
    hub: StandInHub, run: Run, folders: Path, tmp_path: Path
) -> None:
    for name in ("fp8", "gguf"):
        shutil.copytree(folders / "main", tmp_path / name)
        hub.models[f"someone/{name}"] = {"main": tmp_path / name}
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    (tmp_path / "gguf" / "config.json").unlink()
    full = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)"
    fp8, gguf, _, no_room = run(["chat", "someone/fp8"], ["chat", "someone/gguf"], ["python", full], download())
    assert "8-bit floating-point (FP8) weights" in fp8.error
    assert "someone/gguf has no config.json" in gguf.error
    assert f"{NAME} needs " in no_room.error and "are free there: make room, or set HF_HOME" in no_room.error
    assert not hub.asked_for("safetensors")


def test_a_server_starts_with_a_name_and_is_called_by_it(run: Run) -> None:
    pytest.importorskip("fastapi")
    fake = """
import ropewalk.faces.server.launch as launch
class Server:
    def __init__(self, config, service):
        print(service.names.base)
    def run(self, sockets):
        pass
launch.GracefulServer = Server
"""
    _, served = run(["python", fake], ["serve", NAME, "--port", "0", "--threads", "1"])
    assert (served.code, served.out.strip()) == (0, "Tiny-GPTQ"), served.err
