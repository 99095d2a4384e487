"""The parts of a cluster that need none: shares of machines, command lines, seeds, joined metrics, tickets."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.cluster.calls import with_seed
from ropewalk.cluster.command import command_line_of, of_replica, parsed
from ropewalk.cluster.joined_metrics import joined_metrics
from ropewalk.cluster.shares import Machine, Share, share_of
from ropewalk.cluster.tickets import Tickets
from ropewalk.faces.cli.cluster_options import cluster_options
from ropewalk.faces.cli.main import main


def options(*line: str) -> argparse.Namespace:
    return parsed(line)


@pytest.mark.parametrize(
    ("cpus", "replicas", "threads", "share"),
    [
        ([2], 1, 2, 2.0),
        ([2], 2, 1, 1.0),
        ([2], 4, 1, 0.5),
        ([16], 3, 5, 5.0),
        ([8, 4], 3, 4, 4.0),
        ([8, 4], 4, 2, 2.0),  # a replica cannot be on two machines: shares of 3 would leave room for 3
        ([1, 1, 1], 3, 1, 1.0),
        ([0, 4], 2, 2, 2.0),
    ],
)
def test_replicas_share_the_cores(cpus: list[int], replicas: int, threads: int, share: float) -> None:
    assert share_of(options(), replicas, [Machine(each) for each in cpus]) == Share(threads, share, 0)


@given(st.lists(st.integers(0, 64), min_size=1, max_size=5).filter(any), st.integers(1, 200))
def test_there_is_room_for_all_replicas(cpus: list[int], replicas: int) -> None:
    share = share_of(options(), replicas, [Machine(each) for each in cpus]).cpus
    assert share > 0 and sum(int(each / share + 1e-9) for each in cpus) >= replicas


def test_threads_that_are_asked_for_count_but_not_beyond_the_machine() -> None:
    assert share_of(options("--threads", "4"), 1, [Machine(16)]) == Share(4, 4.0, 0)
    assert share_of(options("--threads", "4"), 2, [Machine(2)]) == Share(4, 1.0, 0)


def test_the_ranks_of_a_pipeline_share_the_cores_of_their_replica() -> None:
    assert share_of(options("--pipeline", "2"), 2, [Machine(16)]) == Share(4, 8.0, 0)
    assert share_of(options("--pipeline", "0,3,2", "--threads", "2"), 1, [Machine(16)]) == Share(2, 6.0, 0)
    assert share_of(options("--pipeline", "4"), 2, [Machine(2)]) == Share(1, 1.0, 0)


def test_cards_are_shared_too() -> None:
    machine = Machine(16, gpus=2)
    assert share_of(options(), 2, [machine]).gpus == 1
    assert share_of(options(), 3, [machine]).gpus == 0
    assert share_of(options("--gpu-split", "10,20"), 1, [machine]).gpus == 2
    with pytest.raises(ConfigError, match="3 replicas with 1 cards each need 3, and the cluster has 2"):
        share_of(options("--backend", "gpu"), 3, [machine])


def test_machines_without_cores_are_an_error() -> None:
    with pytest.raises(ConfigError, match="offer no CPUs"):
        share_of(options(), 1, [Machine(0)])


def test_arguments_of_an_application_are_those_of_the_command() -> None:
    line = command_line_of(
        {"model": "/models/a", "max_seq_len": "2048", "api-key": ["one", "two"], "context_shift": "true", "isa": None}
    )
    assert line == ["/models/a", "--max-seq-len=2048", "--api-key=one", "--api-key=two", "--context-shift"]
    args = parsed(line)
    assert (str(args.model), args.max_seq_len, args.api_key) == ("/models/a", 2048, ["one", "two"])
    assert args.context_shift is True and args.isa is None


def test_replicas_are_not_told_how_many_they_are_and_get_no_keys() -> None:
    own = ["/models/a", "--max-seq-len", "2048", "--adapter=x", "--adapter", "y"]
    others = ["--replicas", "2", "--ray=auto", "--routing", "load", "--api-key", "k", "--api-key=l", "--port", "0"]
    assert of_replica([*own, *others]) == of_replica([*others, *own]) == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seq_length_": "5"}, "unrecognized arguments: --max-seq-length-=5"),
        ({"max_seq_len": "many"}, "--max-seq-len: invalid int value: 'many'"),
        ({"--host": "x"}, "have no dashes in front: write host"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: a text, a number, true or false is needed"),
    ],
)
def test_arguments_that_the_command_does_not_know_are_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parsed(command_line_of(arguments))


@pytest.mark.parametrize(("text", "numbers"), [("1", (1, 1)), ("3", (3, 3)), ("1-4", (1, 4))])
def test_replicas_are_a_number_or_a_range(text: str, numbers: tuple[int, int]) -> None:
    found = cluster_options(options("--replicas", text))
    assert (found.min_replicas, found.max_replicas) == numbers
    assert found.scales == ("-" in text)


@pytest.mark.parametrize("line", [["--replicas", "0"], ["--replicas", "4-2"], ["--replicas", "two"]])
def test_other_numbers_of_replicas_are_errors(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *line]) == 2
    assert f"--replicas must be N or MIN-MAX, from 1 to 1000, got {line[1]!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://host:10001", "--ray must be local, auto or HOST:PORT of the head of a cluster, got 'ray://host:10001'"),
        ("127.0.0.1:1", "--ray 127.0.0.1:1: there is no Ray cluster that this machine could join (Connection refused)"),
    ],
)
def test_an_address_without_a_cluster_is_an_error(
    address: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'ropewalk[cluster]'")
    assert main(["serve", "--ray", address, "--port", "0"]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_command_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from ropewalk.faces.cli.main import main\n"
        "sys.exit(main(['serve', '--replicas', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--replicas and --ray need the package ray: pip install 'ropewalk[cluster]'" in done.stderr


def test_the_room_is_entered_without_ray() -> None:
    program = "import sys, ropewalk.cluster; print('ray' in sys.modules, callable(ropewalk.cluster.app))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False True\n"


@given(st.dictionaries(st.text(), st.none() | st.text() | st.integers() | st.lists(st.text())), st.integers(0, 2**63))
def test_a_seed_is_added_and_nothing_else_changed(fields: dict[str, object], seed: int) -> None:
    for indent in (None, 2):
        body = f"  {json.dumps(fields, indent=indent)} \n".encode()
        assert json.loads(with_seed(body, seed)) == fields | {"seed": seed}


def test_metrics_of_all_replicas_are_one_valid_text() -> None:
    one = (
        "# HELP ropewalk_running Requests\n# TYPE ropewalk_running gauge\nropewalk_running 2.0\n"
        "# HELP ropewalk_tokens_total Tokens\n# TYPE ropewalk_tokens_total counter\n"
        'ropewalk_tokens_total{kind="a b"} 5.0\n'
    )
    joined = joined_metrics({"x": one, "y": one.replace("2.0", "3.0")})
    families = {family.name: family for family in text_string_to_metric_families(joined)}
    assert {(s.labels["replica"], s.value) for s in families["ropewalk_running"].samples} == {("x", 2.0), ("y", 3.0)}
    assert [s.labels for s in families["ropewalk_tokens"].samples] == [
        {"replica": "x", "kind": "a b"},
        {"replica": "y", "kind": "a b"},
    ]
    assert joined.count("# TYPE ropewalk_running gauge") == 1


def test_the_call_and_its_request_may_come_in_any_order() -> None:
    async def run(call_first: bool) -> None:
        tickets = Tickets()
        call = asyncio.ensure_future(tickets.wait("t")) if call_first else None
        await asyncio.sleep(0)
        with tickets.used("t"):
            if call is None:
                call = asyncio.ensure_future(tickets.wait("t"))
            await asyncio.sleep(0.01)
            assert not call.done(), "it counts as ongoing while it is answered"
        await asyncio.wait_for(call, 1)
        assert len(tickets) == 0

    async def call_comes_last() -> None:
        tickets = Tickets()
        with tickets.used("t"):
            pass
        await asyncio.wait_for(tickets.wait("t"), 1)

    for way in (run(True), run(False), call_comes_last()):
        asyncio.run(way)
