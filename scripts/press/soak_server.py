"""Many clients at once, some of which leave early, for as long as you like: is every reply right, and memory flat?

    python scripts/press/soak_server.py --seconds 300 --clients 32
    python scripts/press/soak_server.py --seconds 600 --clients 32 --model FOLDER --threads 2

Starts `ropewalk serve`, on the embedded model or another one, and talks to it through the official client. All clients
run at once and share pages of keys and values for half of their contexts (--pool), so sequences must give theirs up and
be computed again. Every request is one of a catalogue whose replies were computed alone beforehand; each reply, and
each beginning of one that a client did not wait for, is compared with it. At the end every place must be free, no reply
may be lost, and memory must not have grown. Prints what was seen; the exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from benchmarking import print_head, with_tokenizer  # noqa: E402
from ropewalk.engine.engine import Engine
from ropewalk.files.embedded import demo_model_path
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.loader import load_model
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from server_process import ServerProcess

NAME = "soaked"
PROMPTS = (
    "def read_lines(path):\n",
    "class Stack:\n    def push(",
    "import os\nimport sys\n\n",
    "for name in names:\n",
)
FILLER = "# {start}: line {number} of the notes that stand before the code\n"
FILLED = (0.0, 0.25, 0.45, 0.6)  # of the context, by the notes before a prompt
NEW_TOKENS = (8, 24, 64, 120)
NUM_CASES = 32
GROWTH_BYTES = 16 * 2**20  # growth beyond this counts: allocators keep a little of what they had
DRAIN_S = 30.0
TIMEOUT_S = 600.0  # of a request


@dataclass(frozen=True)
class Case:
    """A request with the reply that it must get."""

    chat: bool
    prompt: str
    seed: int
    max_tokens: int
    text: str
    reason: str


@dataclass
class Record:
    """What the clients have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # the most memory that they had taken by then


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="how long clients send requests")
    parser.add_argument("--clients", type=int, default=32, help="how many at a time")
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-seq-len", type=int, default=512, help="the context that requests fill up to three parts")
    parser.add_argument("--max-running", type=int, help="of the server (default: as many as there are clients)")
    parser.add_argument("--pool", type=float, default=0.5, help="pages, in contexts of all that run at once")
    parser.add_argument("--speculation", default="ngram", help="of the server; the replies alone are without")
    parser.add_argument("--leaving", type=float, default=0.3, help="share of the requests that are not waited for")
    parser.add_argument("--seed", type=int, default=0, help="of the clients' choices")
    parser.add_argument("--smoke", action="store_true", help="10 s with 6 clients: does the script run?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seconds, options.clients = 10, 6
    options.max_running = options.max_running or options.clients
    print_head("a server with many clients")
    with tempfile.TemporaryDirectory() as scratch:
        folder = served_folder(options.model, Path(scratch))
        cases, context_bytes = catalogue(folder, options)
        options.cache_bytes = max(context_bytes, int(options.pool * options.max_running * context_bytes))
        with ServerProcess(serve_options(folder, options)) as server:
            record = asyncio.run(soak(server, cases, options))
            metrics = server.metrics()
            health = server.health()
    status = report(record, metrics, health, options)
    if record.wrong:
        print("the server's last words:\n" + "".join(server.log))
    return status


def served_folder(model: Path | None, scratch: Path) -> Path:
    """The model's folder, with a tokenizer of made-up words if it has none."""
    if model is None:
        return demo_model_path()
    named = any((model / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return model if named else with_tokenizer(model, scratch)


def serve_options(folder: Path, options: argparse.Namespace) -> list[str]:
    """The command line of the server."""
    values = {
        "--name": NAME,
        "--threads": options.threads,
        "--max-seq-len": options.max_seq_len,
        "--max-running": options.max_running,
        "--cache-memory": options.cache_bytes,
        "--queue-limit": 2 * options.clients,
        "--speculation": options.speculation,
    }
    return [str(folder), *(str(part) for pair in values.items() for part in pair)]


def catalogue(folder: Path, options: argparse.Namespace) -> tuple[list[Case], int]:
    """Requests of all kinds with their replies, each computed by an engine that does nothing else; the bytes of a
    context."""
    model = load_model(folder, options.max_seq_len, threads=options.threads)
    tokenizer = load_tokenizer(folder)
    cases = []
    for number in tqdm(range(NUM_CASES), desc="computing the replies alone", unit="reply"):
        chat, prompt = bool(number % 2), prompt_of(number, tokenizer, options.max_seq_len)
        params = SamplingParams(seed=number, max_new_tokens=NEW_TOKENS[number % len(NEW_TOKENS)])
        engine = Engine(model, tokenizer, speculation=None)  # the same template as the server
        stream = engine.chat(messages_of(prompt), params) if chat else engine.stream(prompt, params)
        done = stream.complete()
        reason = "stop" if done.finish_reason == "stop" else "length"
        cases.append(Case(chat, prompt, number, params.max_new_tokens, done.text, reason))
    return cases, model.cache_bytes(options.max_seq_len)


def prompt_of(number: int, tokenizer: Tokenizer, max_seq_len: int) -> str:
    """Notes that fill a part of the context, and then code. The notes of every second prompt begin alike."""
    start = f"note {number}" if number % 4 < 2 else "shared note"
    code = PROMPTS[number // 2 % len(PROMPTS)]
    wanted, notes = FILLED[number // len(FILLED) % len(FILLED)] * max_seq_len, ""
    while len(tokenizer.encode(notes)) < wanted:
        notes += FILLER.format(start=start, number=notes.count("\n"))
    return notes + code


def messages_of(prompt: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": prompt}]


async def soak(server: ServerProcess, cases: Sequence[Case], options: argparse.Namespace) -> Record:
    """All clients, until the time is over and the server is idle again."""
    record = Record()
    end = time.monotonic() + options.seconds
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
    ) as client:
        clients = [
            run_client(client, cases, random.Random(f"{options.seed}-{n}"), end, options.leaving, record)
            for n in range(options.clients)
        ]
        await asyncio.gather(watch_memory(server, end, record), *clients)
    deadline = time.monotonic() + DRAIN_S
    while time.monotonic() < deadline and any(server.health()[name] for name in ("running", "waiting")):
        await asyncio.sleep(0.1)
    note_memory(server, record)
    return record


async def watch_memory(server: ServerProcess, end: float, record: Record) -> None:
    """Record the server's memory all the time."""
    while time.monotonic() < end:
        note_memory(server, record)
        await asyncio.sleep(0.5)


def note_memory(server: ServerProcess, record: Record) -> None:
    """What the server has now. Memory of a page that was given back stays for the next, so the most counts."""
    record.memory.append(server.resident_bytes())
    record.pages.append(max(int(server.metrics()["ropewalk_cache_used_bytes"]), *record.pages[-1:], 0))


async def run_client(
    client: openai.AsyncOpenAI, cases: Sequence[Case], rng: random.Random, end: float, leaving: float, record: Record
) -> None:
    """One client: one request after another."""
    while time.monotonic() < end:
        case, streams, leaves = rng.choice(cases), rng.random() < 0.6, rng.random() < leaving
        try:
            if leaves:
                record.outcomes[await left_early(client, case, streams, rng, record)] += 1
            else:
                await waited_for(client, case, streams, record)
                record.outcomes["complete"] += 1
                record.ends.append(time.monotonic())
        except openai.OpenAIError as error:
            record.wrong.append(f"{type(error).__name__}: {error}")


async def waited_for(client: openai.AsyncOpenAI, case: Case, streams: bool, record: Record) -> None:
    """A request whose reply must be exactly the expected one."""
    answer = await ask(client, case, streams)
    if streams:
        texts, reasons = [], []
        async for chunk in answer:
            texts.append(text_of(chunk.choices[0], case, streams))
            reasons.append(chunk.choices[0].finish_reason)
        text, reason = "".join(texts), reasons[-1]
    else:
        text, reason = text_of(answer.choices[0], case, streams), answer.choices[0].finish_reason
    if (text, reason) != (case.text, case.reason):
        record.wrong.append(f"seed {case.seed}: got {text!r} ({reason}), expected {case.text!r} ({case.reason})")


async def left_early(client: openai.AsyncOpenAI, case: Case, streams: bool, rng: random.Random, record: Record) -> str:
    """A request that is given up: after some time, or after some text, which must be the expected beginning."""
    if not streams or rng.random() < 0.5:
        patience_s = rng.choice((0.001, 0.01, 0.1, 0.5))
        try:
            await asyncio.wait_for(waited_for(client, case, streams, record), patience_s)
        except asyncio.TimeoutError:
            return "left after a time"
        return "complete"
    answer = await ask(client, case, streams)
    text, wanted = "", rng.randrange(1, 30)
    async for chunk in answer:
        text += text_of(chunk.choices[0], case, streams)
        wanted -= 1
        if not wanted:
            break
    await answer.close()
    if not case.text.startswith(text):
        record.wrong.append(f"seed {case.seed}: got {text!r}, expected the beginning of {case.text!r}")
    return "left within the reply"


async def ask(client: openai.AsyncOpenAI, case: Case, streams: bool) -> Any:
    """The official client's answer to a case."""
    settings = {"model": NAME, "seed": case.seed, "max_tokens": case.max_tokens, "stream": streams}
    if case.chat:
        return await client.chat.completions.create(messages=messages_of(case.prompt), **settings)
    return await client.completions.create(prompt=case.prompt, **settings)


def text_of(choice: Any, case: Case, streams: bool) -> str:
    """The text of a choice, whichever kind it is."""
    if not case.chat:
        return choice.text
    return (choice.delta if streams else choice.message).content or ""


def report(
    record: Record, metrics: Mapping[str, float], health: Mapping[str, object], options: argparse.Namespace
) -> int:
    """Print what was seen; the exit status."""
    total = sum(record.outcomes.values()) + len(record.wrong)
    memory, pages = fifths(record.memory), fifths(record.pages)
    stuck = {name: health[name] for name in ("running", "waiting") if health[name]}
    print(
        f"clients {options.clients}, {options.max_running} at once, pages for {options.cache_bytes / 2**20:.1f} MiB, "
        f"{options.seconds:g} s, {total} requests: "
        + ", ".join(f"{count} {name}" for name, count in record.outcomes.most_common())
    )
    print(f"wrong, lost or mixed replies: {len(record.wrong)}; places still taken at the end: {stuck or 0}")
    for name in ("queue", "first_text", "request"):
        low, middle, high = (quantile(metrics, name, share) for share in (0.5, 0.95, 0.99))
        print(f"{name.replace('_', ' '):>10}: median {low:.2f} s, p95 {middle:.2f} s, p99 {high:.2f} s")
    tokens = metrics['ropewalk_tokens_total{kind="reply"}']
    guessed, right = (metrics[f'ropewalk_tokens_total{{kind="{kind}"}}'] for kind in ("guessed", "accepted"))
    print(f"sequences that gave their pages up: {metrics['ropewalk_preempted']:.0f}")
    print(f"guesses in complete replies: {guessed:.0f}, right {right:.0f}")
    print(
        f"tokens of complete replies: {tokens:.0f}, {tokens / options.seconds:.0f} a second; "
        f"disconnects seen by the server: {metrics['ropewalk_disconnects_total']:.0f}"
    )
    for name, parts in (("memory", memory), ("most of it in pages so far", pages)):
        print(
            f"{name} in MiB, medians of the fifths of the time: " + ", ".join(f"{part / 2**20:.1f}" for part in parts)
        )
    pauses = [after - before for before, after in zip(record.ends, record.ends[1:], strict=False)]
    print(f"longest time without a complete reply to any client: {max(pauses, default=0.0):.2f} s")
    for line in record.wrong[:10]:
        print(f"WRONG {line}")
    grown = (memory[-1] - pages[-1]) - (memory[1] - pages[1]) > GROWTH_BYTES
    if grown:
        print("WRONG memory has grown, and not by pages within their limit")
    return int(bool(record.wrong or stuck or grown or not record.outcomes["complete"]))


def fifths(values: Sequence[int]) -> list[float]:
    """The median of each fifth of the time."""
    size = max(1, len(values) // 5)
    return [statistics.median(values[part * size :][:size] or values[-1:]) for part in range(5)]


def quantile(metrics: Mapping[str, float], name: str, share: float) -> float:
    """A quantile of one of the server's histograms, linear within its bucket."""
    start = f'ropewalk_{name}_seconds_bucket{{le="'
    buckets = sorted((float(key[len(start) : -2]), count) for key, count in metrics.items() if key.startswith(start))
    wanted, low, below = share * buckets[-1][1], 0.0, 0.0
    for high, count in buckets:
        if count >= wanted and count > below:
            return low if high == float("inf") else low + (high - low) * (wanted - below) / (count - below)
        low, below = high, count
    return low


if __name__ == "__main__":
    raise SystemExit(main())
