"""A real text-generation-webui, started in a scratch copy of its folder with a scratch Python environment, and its API.

    WebuiCopy (folders, environment) -> WebuiServer (process, console) -> Api (requests)

Nothing is written into the folder or the environment that were given. Needs only the standard library.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "loader_plugin"
DEMO_MODEL = PACKAGE / "ropewalk" / "demo_model"
START_S = 240
REPLY_S = 300
PYTHON = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")
# The console is watched for this line instead of asking for the page, which would delay its start: gradio then queries
# its own server, and ends if that takes more than three seconds, as it may on a busy machine.
PAGE_IS_UP = "Running on local URL"
PAGE_GIVES_UP_S = 4
PAGE_STARTS = 4
# So gradio gets more time here.
PATIENCE = """import httpx

_head = httpx.head
httpx.head = lambda url, **options: _head(url, **{**options, "timeout": 120})
"""
# Not copied from a folder in use: models, settings, and the environment of the one-click installer.
LEFT_OUT = (
    *("*.safetensors", "*.gguf", "*.bin", "*.pt", "installer_files", ".git", "__pycache__", "cache", "logs"),
    *("settings.yaml", "config-user.yaml", "CMD_FLAGS.txt"),
)


class NotRunning(Exception):
    """The server ended, or did not answer in time; the message has the end of its console."""


@dataclass(frozen=True, slots=True)
class WebuiCopy:
    """A copy of a web UI in webui/, and an environment that has ropewalk in venv/, below one scratch folder."""

    scratch: Path

    @classmethod
    def make(cls, scratch: Path, webui: Path, python: Path) -> WebuiCopy:
        """Copy the web UI without its models and settings, and make an environment over that of `python`."""
        shutil.copytree(webui, scratch / "webui", ignore=shutil.ignore_patterns(*LEFT_OUT))
        _make_environment(scratch / "base", python)
        _make_environment(scratch / "venv", scratch / "base" / PYTHON)
        return cls(scratch)

    @property
    def webui(self) -> Path:
        """The copied folder."""
        return self.scratch / "webui"

    @property
    def python(self) -> Path:
        """The interpreter of the environment that the web UI runs in."""
        return self.scratch / "venv" / PYTHON

    @property
    def base_python(self) -> Path:
        """The interpreter of the underlying environment, whose packages it sees."""
        return self.scratch / "base" / PYTHON

    def startup_files(self, environment: str) -> list[Path]:
        """What `ropewalk webui enable` has left in "venv" or "base"."""
        return list((self.scratch / environment).rglob("ropewalk_webui.pth"))

    @property
    def user_data(self) -> Path:
        """Where models, LoRAs and settings are: user_data/ if the version has it."""
        own = self.webui / "user_data"
        return own if own.is_dir() else self.webui

    def models(self, name: str) -> Path:
        """The folder of a model."""
        return self.user_data / "models" / name

    def lora(self, name: str) -> Path:
        """The folder of a LoRA."""
        return self.user_data / "loras" / name

    def run(self, *arguments: str | Path, python: Path | None = None) -> str:
        """What `python ARGUMENTS` prints; raises AssertionError with it if it fails."""
        command = [str(python or self.python), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.webui, env=environment(), timeout=REPLY_S
        )
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        return done.stdout

    def ropewalk(self, *arguments: str | Path, python: Path | None = None) -> str:
        """What the command `ropewalk ARGUMENTS` prints."""
        return self.run("-m", "ropewalk", *arguments, python=python)


def traces(copy: WebuiCopy) -> list[str]:
    """What is left of us in the copy and its environment, beside the package itself."""
    yaml = [*copy.webui.glob("*.yaml"), *copy.user_data.rglob("*.yaml")]
    settings = "rope_|alpha_value|compress_pos_emb|chunk_size|compute_mode|layer_order"
    ours = re.compile(f"ropewalk|{settings}", re.IGNORECASE)
    named = [f"{path}: {found[0]}" for path in yaml if (found := ours.search(path.read_text(encoding="utf-8")))]
    extensions = [path for path in copy.webui.rglob("extensions/ropewalk*")]
    return [*map(str, [*extensions, *copy.startup_files("venv")]), *named]


def _make_environment(folder: Path, python: Path) -> None:
    """An empty environment that sees the packages of another and this checkout's ropewalk: so a startup file that is
    written into it is not written into the one that was given."""
    subprocess.run([str(python), "-m", "venv", "--without-pip", str(folder)], check=True, env=environment())
    question = "import sysconfig; print(sysconfig.get_path('purelib'))"
    below = subprocess.check_output([str(python), "-c", question], text=True, env=environment()).strip()
    own = next(folder.glob("[Ll]ib/**/site-packages"))
    (own / "a_ropewalk.pth").write_text(f"{PACKAGE}\n", encoding="utf-8")
    (own / "ropewalk_e2e_patience.py").write_text(PATIENCE, encoding="utf-8")
    (own / "c_patience.pth").write_text(
        "import sys; any(a.endswith('server.py') for a in sys.orig_argv) and __import__('ropewalk_e2e_patience')\n",
        encoding="utf-8",
    )
    (own / "b_below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")


def environment() -> dict[str, str]:
    """Variables for the server: no network, no usage reports, no line breaks in its console."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    local = "127.0.0.1,localhost"
    return kept | {
        **{"HF_HUB_OFFLINE": "1", "NO_PROXY": local, "no_proxy": local},
        **{"GRADIO_ANALYTICS_ENABLED": "False", "COLUMNS": "400", "PYTHONUNBUFFERED": "1"},
    }


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WebuiServer:
    """A running server.py, ended by `stop` or at the end of a with block.

    command: what to run in place of ["server.py"], such as the launcher's. page: serve the page as well as the API.
    """

    def __init__(
        self, copy: WebuiCopy, flags: Sequence[str] = (), command: Sequence[str] = ("server.py",), page: bool = False
    ) -> None:
        self.api = Api(free_port())
        self.page_port = free_port() if page else None
        self._console_file = copy.scratch / f"console-{self.api.port}.txt"
        shown = ["--listen-port", str(self.page_port)] if page else ["--nowebui"]
        own = [*shown, "--api", "--api-port", str(self.api.port), "--cpu"]
        self._command = [str(copy.python), *command, *own, *flags]
        self._folder = copy.webui
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> WebuiServer:
        for attempt in range(PAGE_STARTS):
            self._start()
            try:
                self._wait()
                return self
            except NotRunning:
                self.stop()
                if "ReadTimeout" not in self.console() or attempt + 1 == PAGE_STARTS:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("the last attempt returns or raises")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        with self._console_file.open("wb") as console:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=environment(),
                stdout=console,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not (self.api.answers() and (self.page_port is None or PAGE_IS_UP in self.console())):
            if not self.alive or time.monotonic() > deadline:
                self._complain()
            time.sleep(0.3)
        if self.page_port is not None:
            time.sleep(PAGE_GIVES_UP_S)
            if not self.alive:
                self._complain()

    def _complain(self) -> None:
        said = "is not up" if self.alive else "ended"
        raise NotRunning(f"the server {said}: ...{self.console()[-3000:]}")

    @property
    def page_url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.page_port}/"

    @property
    def alive(self) -> bool:
        """True until the process ends."""
        return self._process is not None and self._process.poll() is None

    def console(self) -> str:
        """All that the server has printed."""
        if not self._console_file.is_file():
            return ""
        return self._console_file.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """End the process."""
        if self._process is not None and self.alive:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def answers(url: str) -> bool:
    """True if a GET of this address succeeds."""
    try:
        with _OPENER.open(url, timeout=10):
            return True
    except (OSError, urllib.error.URLError):
        return False


class Refused(Exception):
    """An answer with an HTTP status of 400 or more. `status`, and the body as text."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:2000]}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Api:
    """The API of a server on this machine."""

    port: int

    def answers(self) -> bool:
        """True if it is up."""
        return answers(f"http://127.0.0.1:{self.port}/v1/internal/model/info")

    def paths(self) -> set[str]:
        """The endpoints that this version has."""
        return set(self.get("/openapi.json")["paths"])

    def get(self, path: str) -> Any:
        """The answer to a GET, read as JSON."""
        with self._open(path, None) as answer:
            return json.load(answer)

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a POST, read as JSON.

        Raises:
            Refused: the status is 400 or more.
        """
        with self._open(path, body) as answer:
            text = answer.read().decode()
        read = json.loads(text)
        if isinstance(read, dict) and read.get("status_code", 200) >= 400:
            raise Refused(read["status_code"], text)  # versions before v4 return the exception in place of raising it
        return read

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The server-sent events of a POST with stream=True, read as JSON."""
        with self._open(path, body | {"stream": True}) as answer:
            for line in answer:
                text = line.decode().strip()
                if text.startswith("data:") and text != "data: [DONE]":
                    yield json.loads(text.removeprefix("data:"))

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            return _OPENER.open(request, timeout=REPLY_S)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from error
