"""Many people at once on one demo page: all answered, nobody sees another's text, memory flat, a stop disturbs nobody.

    python scripts/press/soak_demo.py --users 10 --minutes 10

Starts a page of its own on the embedded model and talks to it through gradio_client. Every user keeps one conversation
whose questions name the user, and asks for greedy replies of a length of its own; the reply that comes back must be the
one that the same conversation gets when it is alone. One user stops each of its replies, one leaves in the middle of
them (closes its connection). Prints a table and exits with 1 if anything was lost, mixed up or refused.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from gradio_client import Client

START_S = 120
REPLY_S = 180
STOPPER, LEAVER = 0, 1  # the users with bad manners
CONTEXT_TURNS = 6  # a user starts anew after this many turns, as people do
SAMPLERS = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass
class Tally:
    """What happened to one user. problems: lines for people."""

    replies: int = 0
    stopped: int = 0
    left: int = 0
    waits: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=7917)
    parser.add_argument("--pause", type=float, default=2.0, help="the longest that a user thinks, in seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, page(args.port, Path(folder)) as process:
        url = f"http://127.0.0.1:{args.port}/"
        expected = answers_alone(url, args.users)
        tallies = [Tally() for _ in range(args.users)]
        end = time.monotonic() + 60 * args.minutes
        threads = [
            threading.Thread(target=use, args=(url, number, expected[number], tally, end, args.pause))
            for number, tally in enumerate(tallies)
        ]
        memory = [(0.0, resident_mib(process.pid))]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(10)
            memory.append((args.minutes * 60 - (end - time.monotonic()), resident_mib(process.pid)))
    return report(tallies, memory)


@contextmanager
def page(port: int, folder: Path) -> Iterator[subprocess.Popen]:
    """The page in a process of its own, whose memory can be watched."""
    command = [sys.executable, "-m", "ropewalk", "demo", "--port", str(port), "--data", str(folder)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                Client(f"http://127.0.0.1:{port}/", verbose=False)
                break
            except Exception:  # not there yet, in whichever way
                time.sleep(0.5)
        yield process
    finally:
        process.terminate()
        process.wait(20)


def questions(user: int) -> list[str]:
    """What a user asks, in this order, again and again."""
    verbs = ("read", "write", "parse", "close", "find", "merge")
    return [f"def {verb}_by_user_{user}(path):" for verb in verbs[:CONTEXT_TURNS]]


def length_of(user: int) -> int:
    """Tokens of a reply, different for each user, so that a mix-up shows."""
    return 16 + 8 * (user % 6)


def answers_alone(url: str, users: int) -> list[list[str]]:
    """The replies of every user's conversation when nobody else asks."""
    found = []
    for user in range(users):
        client = connect(url)
        found.append([say(client, question, length_of(user))[0] for question in questions(user)])
    return found


def connect(url: str) -> Client:
    """A new visitor; patient, for a machine that is busy with ten others."""
    return Client(url, verbose=False, httpx_kwargs={"timeout": REPLY_S})


def say(client: Client, question: str, length: int) -> tuple[str, float]:
    """(the reply, seconds until its first piece)."""
    started, first = time.monotonic(), None
    job = submit(client, question, length)
    for update in job:
        if first is None and reply_in(update):
            first = time.monotonic() - started
        if time.monotonic() - started > REPLY_S:
            raise TimeoutError(f"no reply within {REPLY_S} s")
    return reply_in(job.outputs()[-1]), first or time.monotonic() - started


def submit(client: Client, question: str, length: int):
    """Ask on the page."""
    return client.submit(*chat_inputs(question, length), api_name="/chat")


def chat_inputs(question: str, length: int) -> list:
    """Of the page's chat event: question, system text, template, policy, adapters, length, seed, sampler."""
    return [
        question,
        "",
        "plain text",
        "drop the oldest turns, read the rest again",
        [],
        length,
        "1",
        *SAMPLERS.values(),
    ]


def reply_in(update: tuple) -> str:
    """The newest reply in an update of the page; "" while there is none."""
    messages = update[0]
    if not messages or messages[-1]["role"] != "assistant":
        return ""
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def use(url: str, user: int, expected: list[str], tally: Tally, end: float, pause: float) -> None:
    """One person until the end."""
    draw = random.Random(user)
    while time.monotonic() < end:
        try:
            if user == LEAVER:
                leave(url, user, tally, draw)
            elif user == STOPPER:
                stop(connect(url), user, tally, draw)
            else:
                converse(connect(url), user, expected, tally, end, pause, draw)
        except Exception as error:  # everything that goes wrong is a finding
            tally.problems.append(f"user {user}: {type(error).__name__}: {error}"[:300])
            time.sleep(1)


def converse(
    client: Client, user: int, expected: list[str], tally: Tally, end: float, pause: float, draw: random.Random
) -> None:
    """A whole conversation."""
    for question, right in zip(questions(user), expected, strict=True):
        reply, wait = say(client, question, length_of(user))
        tally.replies += 1
        tally.waits.append(wait)
        if reply != right:
            tally.problems.append(f"user {user}: {question!r} got {reply[:60]!r} instead of {right[:60]!r}")
        if time.monotonic() > end:
            return
        time.sleep(draw.uniform(0, pause))


def stop(client: Client, user: int, tally: Tally, draw: random.Random) -> None:
    """A long reply, stopped by the button."""
    job = submit(client, questions(user)[0], 1000)
    time.sleep(draw.uniform(0.2, 3))
    client.predict(api_name="/stop")
    job.result(timeout=REPLY_S)
    tally.stopped += 1


def leave(url: str, user: int, tally: Tally, draw: random.Random) -> None:
    """A long reply whose reader closes the connection; a gradio_client would go on reading in the background."""
    chat = f"{url}gradio_api/call/chat"
    with httpx.Client(timeout=REPLY_S) as http:
        asked = http.post(chat, json={"data": chat_inputs(questions(user)[0], 1000)}).raise_for_status()
        with http.stream("GET", f"{chat}/{asked.json()['event_id']}"):
            time.sleep(draw.uniform(0.2, 3))
    tally.left += 1
    time.sleep(2)


def resident_mib(pid: int) -> float:
    """Memory of the page's process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def report(tallies: list[Tally], memory: list[tuple[float, float]]) -> int:
    """Print what happened; the exit code."""
    waits = sorted(wait for tally in tallies for wait in tally.waits)
    problems = [problem for tally in tallies for problem in tally.problems]
    late = [mib for _, mib in memory[len(memory) // 2 :]]
    facts = {
        "replies, all as expected" if not problems else "replies": sum(tally.replies for tally in tallies),
        "stopped": sum(tally.stopped for tally in tallies),
        "left": sum(tally.left for tally in tallies),
        "seconds to the first piece, median": round(statistics.median(waits), 2) if waits else None,
        "seconds to the first piece, 95 %": round(waits[int(0.95 * (len(waits) - 1))], 2) if waits else None,
        "memory at the start, at half time, at the end (MiB)": [
            round(mib) for mib in (memory[0][1], memory[len(memory) // 2][1], memory[-1][1])
        ],
        "growth in the second half (MiB)": round(late[-1] - late[0], 1),
        "problems": len(problems),
    }
    print(json.dumps(facts, indent=2))
    print("\n".join(problems[:20]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
