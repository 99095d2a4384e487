"""Replicas under Ray beside `ropewalk serve` alone, on this machine: what the server in front costs, and what it gains.

    overhead    the same short requests, and the same long streams, to one replica under Ray and to a server alone, in
                turn; both have one thread. Medians, and the CPU seconds of the process in front.
    clients     32 clients at once on 1, 2 and 4 replicas: every reply must come, and be that of the server alone.
    trace       conversations of several turns, which share system prompts: with --routing prefix and load, how much of
                the prompts was found in a cache, and the time to the first text.

Without a folder, the embedded model: small, so that what is measured is the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarking import print_head

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "press"))
from server_process import ServerProcess  # noqa: E402

CHAT = "/v1/chat/completions"
CLIENTS = 32
LONG = 600  # tokens of a long stream
ROUTINGS = ("prefix", "load")
TURN_WORDS = 60
SYSTEM_WORDS = 220
WORDS = (
    *("list", "key", "value", "path", "file", "line", "count", "index"),
    *("total", "name", "self", "data", "node", "item", "text", "size"),
)


@dataclass(slots=True)
class Reply:
    """What a client got, and when. token_s: when each event with text came, since the request."""

    text: str = ""
    token_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


async def stream(client: httpx.AsyncClient, url: str, messages: Sequence[dict[str, str]], **options: object) -> Reply:
    """One streamed reply, greedy unless the options say otherwise."""
    body = {"messages": list(messages), "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    reply, asked = Reply(), time.perf_counter()
    async with client.stream("POST", url + CHAT, json=body | options) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[len("data: ") :])
            if "error" in chunk:
                reply.error = chunk["error"]["message"]
                return reply
            if chunk.get("usage"):
                reply.prompt_tokens = chunk["usage"]["prompt_tokens"]
                reply.cached_tokens = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
            elif chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                reply.text += chunk["choices"][0]["delta"]["content"]
                reply.token_s.append(time.perf_counter() - asked)
    return reply


async def seconds_per_token(client: httpx.AsyncClient, url: str, messages: Sequence[dict[str, str]]) -> float:
    """The pace of a long stream, from its first event to its last; the client does next to nothing with it."""
    body = {"messages": list(messages), "temperature": 0, "stream": True, "max_tokens": LONG, "ignore_eos": True}
    first_s = last_s = 0.0
    async with client.stream("POST", url + CHAT, json=body) as answer:
        async for _ in answer.aiter_raw():
            last_s = time.perf_counter()
            first_s = first_s or last_s
    return (last_s - first_s) / LONG


def words(rng: random.Random, count: int) -> str:
    """Text of no special meaning."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


def ask(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


async def overhead(alone: ServerProcess, front: ServerProcess, rounds: int) -> None:
    """A request of one token, and the tokens of a long reply, asked of both in turn."""
    rng = random.Random(0)
    request_s: dict[str, list[float]] = {alone.url: [], front.url: []}
    token_s: dict[str, list[float]] = {alone.url: [], front.url: []}
    async with httpx.AsyncClient(timeout=300) as client:
        for number in range(-5, 10 * rounds):
            messages = ask(words(rng, 5))
            for url, times in request_s.items():
                body = {"messages": messages, "max_tokens": 1, "temperature": 0}
                started = time.perf_counter()
                (await client.post(url + CHAT, json=body)).raise_for_status()
                if number >= 0:
                    times.append(time.perf_counter() - started)
        before, num_tokens = front.metrics()["ropewalk_front_process_cpu_seconds_total"], 0
        for _ in range(rounds):
            messages = ask(words(rng, 5))
            for url, times in token_s.items():
                pace_s = await seconds_per_token(client, url, messages)
                times.append(pace_s)
                num_tokens += LONG if url == front.url else 0
        cpu_s = front.metrics()["ropewalk_front_process_cpu_seconds_total"] - before
    for what, times in (("request of one token", request_s), ("token of a long stream", token_s)):
        there, here = (statistics.median(times[url]) * 1e3 for url in (front.url, alone.url))
        spread = statistics.quantiles([a - b for a, b in zip(times[front.url], times[alone.url], strict=True)], n=4)
        print(
            f"  {what:<24} alone {here:7.3f} ms   under Ray {there:7.3f} ms   more {there - here:+7.3f} ms "
            f"(pairs: {spread[0] * 1e3:+.3f} to {spread[2] * 1e3:+.3f})"
        )
    print(f"  CPU of the front         {cpu_s / num_tokens * 1e3:.3f} ms per token of {num_tokens}")


async def many_clients(url: str, num_each: int, expected: dict[str, str]) -> tuple[int, int, float]:
    """(replies that were lost or differ, tokens, seconds) of 32 clients. expected: by prompt; filled if empty."""
    prompts = [[f"def {words(random.Random(100 * c + i), 3)}(" for i in range(num_each)] for c in range(CLIENTS)]
    fills, wrong, num_tokens = not expected, 0, 0

    async def one(client: httpx.AsyncClient, mine: Sequence[str]) -> None:
        nonlocal wrong, num_tokens
        for prompt in mine:
            reply = await stream(client, url, ask(prompt), max_tokens=48, ignore_eos=True)
            num_tokens += len(reply.token_s)
            if fills:
                expected[prompt] = reply.text
            wrong += bool(reply.error) or reply.text != expected[prompt]

    started = time.perf_counter()
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(one(client, mine) for mine in prompts))
    return wrong, num_tokens, time.perf_counter() - started


@dataclass(slots=True)
class TraceResult:
    """Of all turns but the first of each conversation, which nobody can have read. *_later: of those alone."""

    first_s: list[float] = field(default_factory=list)
    first_s_later: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    errors: int = 0


async def replay(url: str, num_conversations: int, num_turns: int, at_once: int) -> TraceResult:
    """Conversations with one of four system prompts; always the same ones, `at_once` at a time, people think a bit."""
    rng, result = random.Random(7), TraceResult()
    systems = [words(rng, SYSTEM_WORDS) for _ in range(4)]
    seeds = [rng.randrange(2**32) for _ in range(num_conversations)]
    places = asyncio.Semaphore(at_once)

    async def converse(client: httpx.AsyncClient, number: int) -> None:
        own = random.Random(seeds[number])
        messages = [{"role": "system", "content": systems[number % len(systems)]}]
        async with places:
            for turn in range(num_turns):
                messages.append({"role": "user", "content": words(own, TURN_WORDS)})
                reply = await stream(client, url, messages, max_tokens=24, ignore_eos=True)
                if reply.error or not reply.token_s:
                    result.errors += 1
                    return
                result.first_s.append(reply.token_s[0])
                if turn:
                    result.first_s_later.append(reply.token_s[0])
                result.prompt_tokens += reply.prompt_tokens
                result.cached_tokens += reply.cached_tokens
                messages.append({"role": "assistant", "content": reply.text})
                await asyncio.sleep(own.expovariate(1 / 0.2))

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(converse(client, number) for number in range(num_conversations)))
    return result


def print_trace(routing: str, replicas: int, result: TraceResult) -> None:
    """One line."""
    quantiles = statistics.quantiles(result.first_s_later, n=20)
    print(
        f"  {replicas} replicas, {routing:<6}  cached {result.cached_tokens / result.prompt_tokens:6.1%} of "
        f"{result.prompt_tokens} prompt tokens   first text, later turns: median {quantiles[9] * 1e3:6.1f} ms, "
        f"p95 {quantiles[18] * 1e3:6.1f} ms   all: {statistics.median(result.first_s) * 1e3:6.1f} ms   "
        f"lost {result.errors}"
    )


def replicas_of(number: int, model: Sequence[str], routing: str = "prefix") -> ServerProcess:
    """A server on so many replicas, each of one thread, in a cluster of its own."""
    return ServerProcess([*model, "--threads", "1", "--replicas", str(number), "--routing", routing])


def main() -> None:
    """Run all, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--only", choices=("overhead", "clients", "trace"), action="append")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--conversations", type=int, default=48)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="small numbers: does the script run?")
    args = parser.parse_args()
    if args.smoke:
        args.replicas, args.rounds, args.conversations, args.turns = [2], 2, 4, 2
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    chosen = args.only or ["overhead", "clients", "trace"]
    model = [] if args.folder is None else [str(args.folder)]
    print_head("replicas under Ray")
    expected: dict[str, str] = {}
    num_each = 2 if args.smoke else 4
    if "overhead" in chosen or "clients" in chosen:
        with ServerProcess([*model, "--threads", "1"]) as alone:
            if "overhead" in chosen:
                print("\noverhead, one replica of one thread")
                with replicas_of(1, model) as front:
                    asyncio.run(overhead(alone, front, args.rounds))
            if "clients" in chosen:
                print(f"\n{CLIENTS} clients, {num_each} replies of 48 tokens each")
                wrong, count, seconds = asyncio.run(many_clients(alone.url, num_each, expected))
                print(f"  alone       {count / seconds:7.1f} tokens/s   lost or different {wrong}")
    if "clients" in chosen:
        for number in args.replicas:
            with replicas_of(number, model) as front:
                wrong, count, seconds = asyncio.run(many_clients(front.url, num_each, expected))
                print(f"  {number} replicas  {count / seconds:7.1f} tokens/s   lost or different {wrong}")
    if "trace" in chosen:
        print(f"\ntrace: {args.conversations} conversations of {args.turns} turns, {args.at_once} at a time")
        for number in (number for number in args.replicas if number > 1):
            for routing in ROUTINGS:
                with replicas_of(number, model, routing) as front:
                    print_trace(
                        routing, number, asyncio.run(replay(front.url, args.conversations, args.turns, args.at_once))
                    )


if __name__ == "__main__":
    main()
