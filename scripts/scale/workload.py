"""Who asks what, and when: conversations whose turns grow, with system prompts that many of them share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK_TOKENS = 32  # of a block of `cluster/prefixes.py`


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens and seconds of the conversations; those that vary do so exponentially around these means.

    rate: conversations that begin in a second, at random; None: `at_once` of them, each followed by the next at once.
    """

    rate: float | None = None
    at_once: int = 8
    num_conversations: int = 48
    num_turns: int = 6
    num_systems: int = 4
    system_tokens: int = 500
    turn_tokens: int = 130
    reply_tokens: int = 24
    think_s: float = 0.2
    varies: bool = False


@dataclass(slots=True)
class Turn:
    """One request. prompt_tokens: all before the reply. chain: what its prompt begins with, in blocks.

    asked_s, first_s, ended_s: when it was asked, and when its first and its last token came. restarts: how often its
    replica was lost.
    """

    conversation: Conversation
    prompt_tokens: int
    reply_tokens: int
    chain: tuple[int, ...]
    asked_s: float = 0.0
    first_s: float | None = None
    ended_s: float | None = None
    cached_tokens: int = 0
    restarts: int = 0


@dataclass(slots=True)
class Conversation:
    """Turns one after the other. tokens: of all that was said so far."""

    number: int
    system: int
    turns_left: int
    tokens: int
    rng: random.Random = field(repr=False)

    def next_turn(self, workload: Workload) -> Turn:
        """What the person says now."""
        said, reply = workload.turn_tokens, workload.reply_tokens
        if workload.varies:
            said, reply = (1 + round(self.rng.expovariate(1 / mean)) for mean in (said, reply))
        self.turns_left -= 1
        prompt = self.tokens + said
        self.tokens = prompt + reply
        return Turn(self, prompt, reply, self.chain(workload, prompt))

    def think_s(self, workload: Workload) -> float:
        """Until the next turn."""
        return self.rng.expovariate(1 / workload.think_s) if workload.think_s else 0.0

    def chain(self, workload: Workload, tokens: int) -> tuple[int, ...]:
        """The blocks of its first so many tokens."""
        shared = workload.system_tokens // BLOCK_TOKENS
        blocks = range(tokens // BLOCK_TOKENS)
        return tuple((self.system if block < shared else -1 - self.number) * 1_000_003 + block for block in blocks)


def conversations(workload: Workload, seed: int) -> Iterator[Conversation]:
    """All of them, in the order in which they begin."""
    rng = random.Random(seed)
    for number in range(workload.num_conversations):
        own = random.Random(rng.randrange(2**32))
        system = number % workload.num_systems
        yield Conversation(number, system, workload.num_turns, workload.system_tokens, own)
