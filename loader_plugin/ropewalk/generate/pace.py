"""How many guesses are worth their rows now.

A guess costs rows in the step that checks it, and the time to make it; what it brings is the tokens accepted. A plain
step is a token of each of the replies that share it, and they all wait for the rows of one. So the speed beside plain
steps is

    (replies + E[accepted]) / (replies + risk)      risk = replies * (further plain steps that guesses and rows take)

and the count with the highest is taken. All of it is measured, so one rule serves every machine and model. Guesses come
true in runs, so two chances are kept, that of the first guess and that of each one after a right one:
E[accepted] = first (1 + next + next^2 + ...).

Chances err, so a ledger has the last word. Its balance is in tokens: what speculation won, less what it lost, and an
allowance of 1.5 % of all tokens. A guess that could cost more than the balance is not made. What was won counts up to a
limit, so that a predictable beginning does not pay for a long unpredictable end. While guesses are not worth their
price, the allowance pays for one now and then, to find out when the text becomes predictable.
"""

from __future__ import annotations

from collections import deque

ALLOWANCE = 0.015  # of the tokens: what may be lost in the long run
START_BALANCE = 0.5  # tokens that may be lost at once; with the allowance 2 % of a reply of 100 tokens
MOST_BALANCE = 4.0  # tokens won that count
LEAST_BALANCE = -2.0  # a step that was slow for other reasons does not end speculation for good
ROW_COST = 0.17  # plain steps that a further row takes until it is measured: 1.1B shape, int8, two cores
CATCH_UP = 0.08  # guesses that a draft model makes while it reads a token: prefill is 12 times as fast as decoding
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # guesses to choose from: few, so that the cost of each is soon known
WORTH = 1.02  # speed beside plain from which a gain is not just noise
FIRST_MEMORY = 16.0  # tries that the chance of the first guess remembers
NEXT_MEMORY = 24.0  # and that of the further ones
RECENT = 5  # measurements whose median counts
PLAIN_EVERY = 16  # steps after which a plain one is due, so that its time stays known


class Pace:
    """The number of guesses for each step of one reply. It decides about time alone: the text never depends on it."""

    def __init__(self) -> None:
        self._first = _Chance(0.5, FIRST_MEMORY)
        self._next = _Chance(0.75, NEXT_MEMORY)
        self._balance = START_BALANCE
        self._plain_s: dict[int, _Recent] = {}  # seconds of a plain step, by the number of replies that share it
        self._costs: dict[int, _Costs] = {}  # of guesses, likewise
        self._guess_s = _Recent()  # seconds of one guess
        self._behind = 0  # tokens since the last guess, which a draft model has to read before the next
        self._since_plain = 0  # steps
        self._rest: tuple[int, float] = (0, 0.0)  # for so many replies, nothing is worth a guess until so far behind

    def wanted(self, others: int = 0) -> int:
        """How many guesses to make for the next step. others: further replies that wait for the same step."""
        replies = others + 1
        if self._rest[0] == replies and self._behind < self._rest[1]:
            return 0
        if replies not in self._plain_s or self._since_plain >= PLAIN_EVERY:
            return 0
        probe_risk = self._risk(COUNTS[0], replies)
        may_probe = probe_risk <= min(self._balance, ALLOWANCE * self._behind)
        best, highest = COUNTS[0] if may_probe else 0, WORTH
        for count, expected in zip(COUNTS, self._expected(), strict=True):
            risk = self._risk(count, replies)
            if risk > self._balance:
                break
            speed = (replies + expected) / (replies + risk)
            if speed >= highest:
                best, highest = count, speed
        if not best:  # what is known changes by guesses alone, and the balance by the allowance
            lacking = probe_risk - self._balance
            awaited = self._behind + lacking / ALLOWANCE if lacking > 0.0 else probe_risk / ALLOWANCE
            self._rest = replies, awaited
        return best

    def record(self, guessed: int, accepted: int, step_s: float, guess_s: float = 0.0, others: int = 0) -> None:
        """Learn from a step; one that also read a prompt says nothing about the price of rows and is left out.

        guessed: rows beside the last token; accepted: how many of them were right. step_s: time of the step; guess_s:
        time of the guessing before it, also if nothing came of it. others: as given to `wanted`.
        """
        replies = others + 1
        self._measure(guessed, step_s, guess_s, replies)
        self._settle(guessed, accepted, guess_s, replies)
        self._behind = accepted + 1 if guessed else self._behind + 1
        self._since_plain = self._since_plain + 1 if guessed else 0
        if guessed:
            self._rest = 0, 0.0
            self._first.note(min(accepted, 1), 1)
        if accepted:
            self._next.note(accepted - 1, min(accepted, guessed - 1))  # all right, or one wrong at the end

    def _expected(self) -> list[float]:
        """E[accepted] for each of COUNTS."""
        sums, chance = [0.0], self._first.value
        for _ in range(COUNTS[-1]):
            sums.append(sums[-1] + chance)
            chance *= self._next.value
        return [sums[count] for count in COUNTS]

    def _risk(self, count: int, replies: int) -> float:
        """Tokens lost if nothing is accepted."""
        effort = count + CATCH_UP * self._behind
        guessing = self._in_plain_steps(self._guess_s.median * effort, replies)
        return (self._extra(count, replies) + guessing) * replies

    def _measure(self, guessed: int, step_s: float, guess_s: float, replies: int) -> None:
        if guessed == 0:
            if replies not in self._plain_s:
                self._plain_s[replies] = _Recent()
            self._plain_s[replies].note(step_s)
            return
        self._guess_s.note(guess_s / (guessed + CATCH_UP * self._behind))
        if replies in self._plain_s:
            extra = self._in_plain_steps(step_s, replies) - 1.0
            self._costs.setdefault(replies, _Costs()).note(guessed, max(0.0, extra))

    def _settle(self, guessed: int, accepted: int, guess_s: float, replies: int) -> None:
        """Enter a step into the ledger. Costs are those of the median: a hiccup of the machine is not our loss."""
        lost = (self._extra(guessed, replies) + self._in_plain_steps(guess_s, replies)) * replies
        balance = self._balance + accepted - lost + ALLOWANCE * (1 + accepted)
        self._balance = min(max(balance, LEAST_BALANCE), MOST_BALANCE)

    def _extra(self, count: int, replies: int) -> float:
        return self._costs[replies].of(count) if replies in self._costs else ROW_COST * count

    def _in_plain_steps(self, seconds: float, replies: int) -> float:
        plain_s = self._plain_s[replies].median if replies in self._plain_s else 0.0
        return seconds / plain_s if plain_s > 0.0 else 0.0


class _Costs:
    """How much longer than a plain step one with guesses takes: as measured, or between and beyond what was."""

    def __init__(self) -> None:
        self._measured: dict[int, _Recent] = {}
        self._known: dict[int, float] = {}

    def note(self, count: int, extra: float) -> None:
        self._measured.setdefault(count, _Recent()).note(extra)
        self._known = {}

    def of(self, count: int) -> float:
        if count not in self._known:
            self._known[count] = self._estimate(count)
        return self._known[count]

    def _estimate(self, count: int) -> float:
        if count in self._measured:
            return self._measured[count].median
        low = max((have for have in self._measured if have < count), default=0)
        high = min((have for have in self._measured if have > count), default=None)
        low_extra = self._measured[low].median if low else 0.0
        if high is None:
            return low_extra + (low_extra / low if low else ROW_COST) * (count - low)
        return low_extra + (self._measured[high].median - low_extra) * (count - low) / (high - low)


class _Chance:
    """The share of tries that succeed, of about the last `memory`; `start` counts as two tries."""

    def __init__(self, start: float, memory: float) -> None:
        self._memory = memory
        self._successes, self._tries = 2.0 * start, 2.0

    @property
    def value(self) -> float:
        return self._successes / self._tries

    def note(self, successes: int, tries: int) -> None:
        self._successes += successes
        self._tries += tries
        kept = min(1.0, self._memory / self._tries)
        self._successes *= kept
        self._tries *= kept


class _Recent:
    """The median of the last few measurements; 0 before the first."""

    def __init__(self) -> None:
        self.median = 0.0
        self._values: deque[float] = deque(maxlen=RECENT)

    def note(self, value: float) -> None:
        self._values.append(value)
        self.median = sorted(self._values)[len(self._values) // 2]
