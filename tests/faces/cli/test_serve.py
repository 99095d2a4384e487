"""`ropewalk serve` as a process: what it shows, how it ends, what it refuses before anything is loaded."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import pytest

from fixtures import REPOSITORY
from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.engine.engine import Engine
from ropewalk.faces.cli.adapter_options import adapter_names
from ropewalk.faces.cli.main import main
from ropewalk.files.embedded import EMBEDDED_CONTEXT, demo_model_path
from ropewalk.generate.sampling import SamplingParams
from ropewalk.gradio_demo.model_bar.settings import suggested_settings
from ropewalk.model.loader import load_model
from ropewalk.text.tokenizer.load import load_tokenizer
from server_runner import until
from tokenizer_writer import write_byte_level_json

sys.path.insert(0, str(REPOSITORY / "scripts" / "press"))
from server_process import ServerProcess  # noqa: E402

RUN = ["--backend", "reference", "--compute", "exact"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with two adapters."""
    path = write_byte_level_json(tmp_path_factory.mktemp("model"))
    exact = write_checkpoint(path, {"vocab_size": load_tokenizer(path).vocab_size}, dense=True)
    for seed, name in enumerate(("storm", "my+poet")):
        write_adapter(path / name, path, exact, seed)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    adapters = ["--adapter", str(folder / "storm"), "--adapter", str(folder / "my+poet")]
    with ServerProcess([str(folder), "--name", "tiny", "--chat-template", "alpaca", *adapters, *RUN]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_banner_says_where_it_is_and_what_it_serves(server: ServerProcess) -> None:
    banner = "".join(server.log)
    until(lambda: "Ctrl-C" in "".join(server.log))
    for expected in ("ropewalk serve", f"URL       {server.url}/v1", "model     tiny"):
        assert expected in banner or expected in "".join(server.log)
    assert 'tiny+storm, tiny+"my+poet", tiny+auto' in "".join(server.log)
    assert "context   " in "".join(server.log) and "64 requests may wait" in "".join(server.log)


def test_adapters_are_model_names_and_give_what_the_engine_gives(client: openai.OpenAI, folder: Path) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny+storm", 'tiny+"my+poet"', "tiny+auto"]
    model = load_model(folder, backend="reference", compute="exact")
    for name in ("storm", "my+poet"):
        model.load_adapter(folder / name, name)
    engine = Engine(model, load_tokenizer(folder))
    params = SamplingParams(temperature=0, max_new_tokens=10, ignore_eos=True)
    requests = {
        "tiny": None,
        "tiny+storm": "storm",
        "tiny+storm:0.5": "storm:0.5",
        'tiny+storm:0.5+"my+poet"@0-1': 'storm:0.5+"my+poet"@0-1',
        "tiny+auto": "auto",
    }
    texts = {}
    for name, adapters in requests.items():
        done = client.completions.create(
            model=name, prompt="The quick", max_tokens=10, temperature=0, extra_body={"ignore_eos": True}
        )
        texts[name] = done.choices[0].text
        assert texts[name] == engine.generate("The quick", params, adapters=adapters).text
        assert done.model == name
    assert texts["tiny"] != texts["tiny+storm"]


def test_invalid_names_of_adapters_are_refused(client: openai.OpenAI) -> None:
    for name in ("tiny+nobody", "tiny+storm+nobody:2", "tinystorm", "other+storm"):
        with pytest.raises(openai.NotFoundError, match="available are tiny, tiny.storm"):
            client.completions.create(model=name, prompt="x")
    for name in ("tiny+", "tiny+storm:x", "tiny+storm:", "tiny+storm@", "tiny+storm+storm"):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=name, prompt="x")
        assert refused.value.code == "invalid_model_name" and refused.value.param == "model"
    assert client.models.retrieve("tiny+storm:0.25").id == "tiny+storm:0.25"


def test_each_request_has_a_line(server: ServerProcess, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny+auto", prompt="The quick", max_tokens=3, extra_body={"odd": 1})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    until(lambda: "nobody" in server.log[-1])
    good, bad = server.log[-2], server.log[-1]
    assert re.match(r"\d\d:\d\d:\d\d  200 POST /v1/completions  tiny\+auto  \d+\.\d\d s  queue 0\.\d\d s; ", good)
    assert "ignored odd" in good and "routed to " in good and re.search(r"prompt \d+ \(\d+ cached\), ", good)
    assert re.match(r"\d\d:\d\d:\d\d  404 POST /v1/completions  .*there is no model 'nobody' here", bad)


def test_the_template_that_was_chosen_is_used(client: openai.OpenAI, folder: Path) -> None:
    done = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=1)
    engine = Engine(load_model(folder, backend="reference"), load_tokenizer(folder), "alpaca")
    assert done.usage.prompt_tokens == len(engine.chat_ids([{"role": "user", "content": "hi"}]))


def test_a_signal_ends_it_after_the_reply_that_runs(folder: Path) -> None:
    with ServerProcess([str(folder), *RUN]) as server:
        body = {"prompt": "The quick", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.kill(server.pid, signal.SIGINT)
            rest = list(lines)
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        server.end()


def test_adapters_of_equal_names_are_told_apart_without_their_paths(folder: Path) -> None:
    names = adapter_names([Path("/data/a/storm"), Path("/data/b/storm"), Path("poet"), Path("/storm")])
    assert list(names.values()) == ["a/storm", "b/storm", "poet", "storm"]


def test_the_embedded_model_is_served_with_the_context_that_the_page_gives_it_and_to_this_machine_only() -> None:
    with ServerProcess(["--threads", "1", "--allowed-host", "my.proxy", "--max-body-size", "0.001"]) as server:
        card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
        length = int(512 * EMBEDDED_CONTEXT.factor)
        assert (card["context_length"], card["max_model_len"]) == (length, length)
        page = suggested_settings(demo_model_path(), is_embedded=True)
        assert (page.max_seq_len, page.rope_method, page.rope_factor) == (
            length,
            EMBEDDED_CONTEXT.method,
            EMBEDDED_CONTEXT.factor,
        )
        statuses = [
            httpx.get(f"{server.url}/health", headers={"Host": host}).status_code
            for host in ("localhost:1", "my.proxy", "evil.example")
        ]
        assert statuses == [200, 200, 403]
        large = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x" * 1100})
        assert large.json()["error"]["message"] == "the body is larger than 1048 bytes, which is the limit here"


def test_a_second_signal_cuts_the_replies_off() -> None:
    with ServerProcess(["--threads", "1"]) as server:
        body = {"prompt": ["def f("] * 4, "max_tokens": 400, "n": 16, "stream": True, "ignore_eos": True}
        received: list[str] = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.pid, signal.SIGINT)
            until(lambda: "finishing 1 replies" in "".join(server.log))
            os.kill(server.pid, signal.SIGINT)
            with suppress(httpx.HTTPError):
                received.extend(lines)
        until(lambda: server.returncode is not None)
        assert server.returncode == 130
        text = "".join(received)
        assert text.count('"finish_reason":"length"') < 64
        assert "shutting_down" in text or "[DONE]" not in text


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["serve", *options]) == 2
    return capsys.readouterr().err


def test_what_is_wrong_with_the_options_is_told(folder: Path, tmp_path: Path, capsys) -> None:
    with taken_port() as port:
        assert f"--port {port} cannot be listened on: Address already in use" in refusal(capsys, "--port", str(port))
    assert "--host 203.0.113.1 --port 0 cannot be" in refusal(capsys, "--host", "203.0.113.1", "--port", "0")
    assert "--port must be from 0 to 65535, got 65536" in refusal(capsys, "--port", "65536")
    assert "a key must be printable ASCII without spaces" in refusal(capsys, "--api-key", "a b")
    assert "no-file cannot be read" in refusal(capsys, "--api-key-file", str(tmp_path / "no-file"))
    (tmp_path / "empty").write_text("\n")
    assert "holds no key: write one per line" in refusal(capsys, "--api-key-file", str(tmp_path / "empty"))
    assert "--max-body-size must be above 0 and at most 1024 (MiB), got 0" in refusal(capsys, "--max-body-size", "0")
    assert "--queue-limit must be at least 0, got -1" in refusal(capsys, "--port", "0", "--queue-limit", "-1")
    assert "--host a..b --port 0 cannot be listened on" in refusal(capsys, "--host", "a..b", "--port", "0")
    alone = refusal(capsys, "--routing", "load", "--drain-time", "3")
    assert "--routing and --drain-time: without effect on one server: give --replicas" in alone
    nowhere = "~no-such-person/caches"
    assert f"{nowhere}: this machine knows no home folder for ~no-such-person" in refusal(
        capsys, str(folder), "--port", "0", *RUN, "--cache-folder", nowhere
    )
    assert "--context-shift must be at least 0" in refusal(capsys, "--port", "0", "--context-shift", "-4")
    options = [str(folder), "--port", "0", *RUN]
    assert "max_running must be a positive integer, got 0" in refusal(capsys, *options, "--max-running", "0")
    weighted = ["--adapter", f"{folder / 'storm'}:0.5"]
    assert "serve takes folders alone" in refusal(capsys, *options, *weighted)
    assert "chat template 'gpt' is not known" in refusal(capsys, *options, "--chat-template", "gpt")


def test_without_the_extra_it_says_what_to_install() -> None:
    program = (
        "import sys\nsys.modules['fastapi'] = None\nsys.modules['uvicorn'] = None\n"
        "from ropewalk.faces.cli.main import main\nsys.exit(main(['serve']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'ropewalk[server]'" in done.stderr


@pytest.mark.parametrize(
    ("script", "options"),
    [("soak_server.py", ["--seconds", "4", "--clients", "12"]), ("fuzz_server.py", ["--count", "60"])],
)
def test_the_server_survives_a_short_run_of_its_scripts(script: str, options: Sequence[str]) -> None:
    if script == "fuzz_server.py":
        pytest.importorskip("schemathesis")
    command = [sys.executable, str(REPOSITORY / "scripts" / "press" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
