"""Malformed requests against the real server: none may be answered with a 5xx, nor end the server.

    python scripts/press/fuzz_server.py --count 2000

Requests are made by schemathesis from the server's own OpenAPI document: bodies that break its schema, bodies that keep
to it with the oddest values, and bodies of both kinds with damaged bytes. Every answer that is an error must have
OpenAI's shape, and none may tell where files of this machine lie. Prints a table of the statuses and what was wrong;
the exit status is 1 if anything was.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import schemathesis
from hypothesis import HealthCheck
from schemathesis import Case, GenerationMode

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from benchmarking import print_head  # noqa: E402
from ropewalk.files.embedded import demo_model_path  # noqa: E402
from server_process import ServerProcess  # noqa: E402

PATIENCE_S = 5.0  # a valid request may ask for a long reply; a client that leaves is one more thing to survive
FOLDERS = tuple(str(folder) for folder in (demo_model_path(), Path.home(), Path.cwd(), sys.prefix))
JSON_HEADERS = {"Content-Type": "application/json"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="approximate number of requests")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other requests")
    options = parser.parse_args(arguments)
    print_head("malformed requests against the server")
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    with (
        ServerProcess(["--max-new-tokens", "4", "--threads", "1"]) as server,
        httpx.Client(timeout=PATIENCE_S) as client,
    ):
        for number, send in enumerate(plan(server.url, options.count)):
            run(send, options.count, options.seed + number, client, statuses, wrong)
        health = server.health()
    total = sum(statuses.values())
    print(f"{total} requests: " + ", ".join(f"{count} x {name}" for name, count in sorted(statuses.items())))
    print(f"wrong answers: {len(wrong)}; server afterwards: {health}")
    for line in wrong[:10]:
        print(f"WRONG {line}")
    return int(bool(wrong) or health["status"] != "ok" or bool(health["running"]) or total < options.count)


Sender = tuple[Any, float, Callable[[Case, httpx.Client, random.Random], httpx.Response]]


def plan(url: str, count: int) -> list[Sender]:
    """(strategy, share of the count, how a case is sent) of every operation in both modes."""
    document = httpx.get(f"{url}/openapi.json").json()
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    with_bodies = [operation for operation in operations if operation.body]
    senders: list[Sender] = []
    for operation in operations:
        share = 0.9 / len(with_bodies) if operation in with_bodies else 0.1 / (len(operations) - len(with_bodies))
        for mode in GenerationMode:
            if operation in with_bodies:
                strategy = operation.as_strategy(mode)
                senders += [(strategy, share / 4, sender(url, as_it_is)), (strategy, share / 4, sender(url, damaged))]
            elif mode is GenerationMode.POSITIVE:
                senders.append((operation.as_strategy(mode), share, sender(url, as_it_is)))
    return senders


def run(planned: Sender, count: int, seed: int, client: httpx.Client, statuses: Counter[str], wrong: list[str]) -> None:
    """Send the examples of one strategy and judge the answers."""
    strategy, share, send = planned
    rng = random.Random(seed)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max(1, round(count * share * 1.1)),
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def examples(case: Case) -> None:
        try:
            response = send(case, client, rng)
        except httpx.TimeoutException:
            statuses["left"] += 1
            return
        except httpx.HTTPError as error:
            wrong.append(f"{case.method} {case.path}: {type(error).__name__}: {error}")
            return
        statuses[str(response.status_code)] += 1
        if response.status_code >= 500 or (response.status_code >= 400 and not has_shape(response)):
            wrong.append(f"{case.method} {case.path} {case.body!r:.300}: {response.status_code} {response.text[:300]}")
        if any(folder in response.text for folder in FOLDERS):
            wrong.append(f"{case.method} {case.path} {case.body!r:.300} tells a path: {response.text[:300]}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        examples()


def has_shape(response: httpx.Response) -> bool:
    """An error as OpenAI writes it."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)


def sender(url: str, change: Callable[[bytes, random.Random], bytes]) -> Callable[..., httpx.Response]:
    """A function that sends a case to the server, its body changed by `change`."""

    def send(case: Case, client: httpx.Client, rng: random.Random) -> httpx.Response:
        path = case.formatted_path
        if isinstance(case.body, type(None)) or type(case.body).__name__ == "NotSet":
            return client.request(case.method, url + path)
        body = case.body
        if isinstance(body, dict) and rng.random() < 0.7:  # a random name is refused before anything else is looked at
            body = {name: value for name, value in body.items() if name not in ("model", "logit_bias", "prompt")}
            body |= {"prompt": rng.choice(("x", ["x", "y"], [5, 6], [[5], [6]]))} if "prompt" in case.body else {}
        content = change(json.dumps(body, default=str).encode(), rng)
        headers = JSON_HEADERS if rng.random() < 0.95 else {"Content-Type": rng.choice(("text/plain", "x", ""))}
        return client.request(case.method, url + path, content=content, headers=headers)

    return send


def as_it_is(content: bytes, rng: random.Random) -> bytes:
    """No change."""
    return content


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes cut, changed, repeated or inserted."""
    at = rng.randrange(len(content))
    kinds = (
        content[:at],
        content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        content[:at] + content[at:] * 2,
        content[:at]
        + rng.choice((b"null", b"1e999", b"NaN", b'"\\ud800"', b"[" * 5000, b"\xff\xfe", b"\x00"))
        + content[at:],
    )
    return rng.choice(kinds)


if __name__ == "__main__":
    raise SystemExit(main())
