"""A discrete-event simulation of many replicas: the scheduler's and the router's own rules, with measured times.

    a turn -> front (router) -> replica: steps, each as long as `StepCosts` says -> tokens -> the next turn

What goes into a step is decided by `generate/scheduler/plan.py`, and where a turn goes by `cluster/routing.py`, as in
the real thing; measured are the times alone. Nothing is computed, so a second of a thousand machines takes seconds.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ropewalk.generate.scheduler.plan import PAGE_ROWS, Want, plan_rows
from ropewalk.generate.scheduler.timing import StepTimes
from workload import BLOCK_TOKENS, Conversation, Turn, Workload, conversations

MOST_ALONE = 2048  # rows of a prompt that is alone in a step (`max_input_len`)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds that steps of one replica take, as `step_times.py` measures them.

    replies_s: of a step with 1, 2, ... replies. row_s: of a prompt's row beside replies. alone_row_s: of one in a step
    of prompts alone. keys: after which a row takes twice as long. request_s: of all that a request needs besides.
    slowdown, row_slowdown: how much longer replies and rows take while 1, 2, ... replicas of a machine compute: they
    share the memory, which replies wait for, and maybe cores, which rows keep busy. jitter: likewise, the standard
    deviation of the logarithm of a step's time.
    """

    replies_s: tuple[float, ...]
    row_s: float
    alone_row_s: float
    keys: float
    request_s: float = 0.0
    slowdown: tuple[float, ...] = (1.0,)
    row_slowdown: tuple[float, ...] = (1.0,)
    jitter: tuple[float, ...] = (0.0,)

    def plain_s(self, num_replies: int) -> float:
        """Of a step with replies alone; beyond those that were measured, as much more for each as at the end."""
        if not num_replies:
            return 0.0
        known = len(self.replies_s)
        if num_replies <= known:
            return self.replies_s[num_replies - 1]
        slope = (self.replies_s[-1] - self.replies_s[0]) / max(known - 1, 1)
        return self.replies_s[-1] + slope * (num_replies - known)

    def row_work(self, keys: float) -> float:
        """Work of a row with so many keys before it, where one with none is 1."""
        return 1 + keys / self.keys

    def step_s(self, num_replies: int, work: float, num_computing: int, chance: float = 0.0) -> float:
        """Of a step with so much work of prompt rows, while so many replicas of the machine compute.

        chance: how much longer or shorter than on average, in standard deviations.
        """
        row_s = self.row_s if num_replies else self.alone_row_s
        replies = self.plain_s(num_replies) * _at(self.slowdown, num_computing)
        mean_s = replies + work * row_s * _at(self.row_slowdown, num_computing)
        jitter = _at(self.jitter, num_computing)
        return mean_s * math.exp(jitter * chance - jitter**2 / 2)


def _at(factors: tuple[float, ...], num_computing: int) -> float:
    return factors[min(num_computing, len(factors)) - 1]


@dataclass(frozen=True, slots=True)
class Cluster:
    """What there is. replicas: of each machine. cache_tokens: that a replica's pages hold.

    fronts: servers in front, each of which knows what it sent itself. front_s: of one of them for a token, route_s:
    for a request and a replica that it chooses from; it does nothing else meanwhile. most_running: replies of a replica
    at once. slow: how many machines take `slow_factor` times as long. mtbf_s: a machine fails after so long (None:
    never), which is noticed after `notice_s`; it is back after `restart_s`.
    """

    machines: int
    replicas: int = 1
    cache_tokens: int = 60_000
    fronts: int = 1
    front_s: float = 0.0
    route_s: float = 0.0
    most_running: int = 8
    slow: int = 0
    slow_factor: float = 3.0
    mtbf_s: float | None = None
    notice_s: float = 5.0
    restart_s: float = 30.0


@dataclass(slots=True)
class Job:
    """A turn at a replica. rows: of its prompt, to be read; depth: tokens that are there; left: of the reply."""

    turn: Turn
    number: int
    rows: int
    depth: int
    left: int
    passed: int = 0


class Replica:
    """One engine: its queue, what it runs, and which beginnings of prompts it has pages of."""

    def __init__(self, world: Simulation, number: int, machine: Machine) -> None:
        self.world, self.number, self.machine = world, number, machine
        self.waiting: list[Turn] = []
        self.running: list[Job] = []
        self.times = StepTimes()
        self.is_up, self.is_stepping, self.epoch = True, False, 0
        self._pages: OrderedDict[int, None] = OrderedDict()  # blocks of chains, the one used least recently first
        self.busy_s = 0.0

    @property
    def load(self) -> int:
        """Turns that run or wait here."""
        return len(self.waiting) + len(self.running)

    def give_(self, turn: Turn) -> None:
        """A turn arrives."""
        self.waiting.append(turn)
        if not self.is_stepping and self.is_up:
            self._begin_step()

    def stop_(self) -> list[Turn]:
        """The machine has failed: the turns that were here."""
        lost = [*(job.turn for job in self.running), *self.waiting]
        self.waiting, self.running, self._pages = [], [], OrderedDict()
        self.is_up, self.is_stepping = False, False
        self.epoch += 1
        return lost

    def _admit(self) -> None:
        most = self.world.cluster.most_running
        while self.waiting and len(self.running) < most:
            turn = self.waiting.pop(0)
            cached = self._cached(turn)
            turn.cached_tokens = cached
            number = self.world.next_number()
            self.running.append(Job(turn, number, turn.prompt_tokens - cached, cached, turn.reply_tokens))

    def _cached(self, turn: Turn) -> int:
        """Tokens of the prompt whose pages are here; its last one is always computed."""
        known = 0
        for block in turn.chain:
            if block not in self._pages:
                break
            known += 1
        return min(known * BLOCK_TOKENS, turn.prompt_tokens - 1) // PAGE_ROWS * PAGE_ROWS

    def _keep_(self, chain: tuple[int, ...]) -> None:
        for block in reversed(chain):
            self._pages[block] = None
            self._pages.move_to_end(block)
        while len(self._pages) > self.world.most_blocks:
            self._pages.popitem(last=False)

    def _begin_step(self) -> None:
        self._admit()
        if not self.running:
            self.is_stepping = False
            return
        self.is_stepping = True
        costs = self.world.costs
        replies = [job for job in self.running if not job.rows]
        reading = [job for job in self.running if job.rows]
        budget = self.times.budget(len(replies), len(reading), MOST_ALONE)
        wants = [
            Want(job.number, job.rows, passed=job.passed, row_work=costs.row_work(job.depth) if replies else 1.0)
            for job in reading
        ]
        rows = plan_rows(wants, budget)
        work = 0.0
        for job in reading:
            job.passed = 0 if job.number in rows else job.passed + 1
            count = rows.get(job.number, 0)
            work += count * costs.row_work(job.depth + count / 2)
        begun = sum(job.depth == job.turn.cached_tokens for job in reading if job.number in rows)
        machine = self.machine
        machine.computing += 1
        step_s = costs.step_s(len(replies), work, machine.computing, self.world.chance())
        taken_s = machine.factor * (step_s + costs.request_s * begun)
        self.times.record(work, taken_s)
        self.busy_s += taken_s
        self.world.after(taken_s, lambda epoch=self.epoch: self._end_step(epoch, replies, rows))

    def _end_step(self, epoch: int, replies: list[Job], rows: dict[int, int]) -> None:
        if epoch != self.epoch:
            return  # the machine has failed meanwhile
        self.machine.computing -= 1
        for job in self.running:
            count = rows.get(job.number, 0)
            job.rows, job.depth = job.rows - count, job.depth + count
            if count and not job.rows:
                self._keep_(job.turn.chain)
                self._token(job)
        for job in replies:
            job.depth += 1
            self._token(job)
        self.running = [job for job in self.running if job.left]
        self._begin_step()

    def _token(self, job: Job) -> None:
        job.left -= 1
        if not job.left:  # its pages are for the next turn
            talk = job.turn.conversation
            self._keep_(talk.chain(self.world.workload, talk.tokens))
        self.world.token(job.turn, is_last=not job.left)


@dataclass(slots=True)
class Machine:
    """What replicas share. factor: how much slower it is than others."""

    factor: float
    computing: int = 0
    replicas: list[Replica] = field(default_factory=list)


class Simulation:
    """All replicas, fronts and people. make_routing: one for each front, such as `PrefixRouting`."""

    def __init__(
        self, costs: StepCosts, cluster: Cluster, workload: Workload, make_routing: Callable[[], Any], seed: int = 0
    ) -> None:
        self.costs, self.cluster, self.workload = costs, cluster, workload
        self.now_s = 0.0
        self.turns: list[Turn] = []
        self.num_restarts = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._rng, self._steps_rng = random.Random(seed), random.Random(seed + 1)
        self._coming = conversations(workload, seed)
        self._open = 0
        self.machines = [Machine(cluster.slow_factor if n < cluster.slow else 1.0) for n in range(cluster.machines)]
        self.replicas: dict[int, Replica] = {}
        for machine in self.machines:
            for _ in range(cluster.replicas):
                replica = Replica(self, len(self.replicas), machine)
                machine.replicas.append(replica)
                self.replicas[replica.number] = replica
        self.routings = [make_routing() for _ in range(cluster.fronts)]
        self._front_free_s = [0.0] * cluster.fronts
        self.most_blocks = cluster.cache_tokens // BLOCK_TOKENS

    def run(self, until_s: float = float("inf")) -> Simulation:
        """Until all conversations are over, or for so long."""
        if self.workload.rate is None:
            for _ in range(self.workload.at_once):
                self._next_conversation()
        else:
            self._arrive()
        if self.cluster.mtbf_s is not None:
            for machine in self.machines:
                self._fail_later(machine)
        while self._events and self.now_s < until_s and (self._open or self.workload.rate is not None):
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        return self

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Call it then."""
        heapq.heappush(self._events, (self.now_s + seconds, self.next_number(), event))

    def chance(self) -> float:
        """Of a step: normally distributed around 0 with deviation 1."""
        return self._steps_rng.gauss(0.0, 1.0)

    def next_number(self) -> int:
        """Unlike all others."""
        self._count += 1
        return self._count

    def token(self, turn: Turn, is_last: bool) -> None:
        """A replica has written a token; its front passes it on."""
        seen_s = self._in_front(turn, self.cluster.front_s)
        if turn.first_s is None:
            turn.first_s = seen_s
        if is_last:
            turn.ended_s = seen_s
            self._next_turn(turn.conversation, seen_s - self.now_s)

    def _in_front(self, turn: Turn, seconds: float) -> float:
        """When the front of this turn has done something that takes so long, after all that it has to do before."""
        front = turn.conversation.number % self.cluster.fronts
        self._front_free_s[front] = max(self.now_s, self._front_free_s[front]) + seconds
        return self._front_free_s[front]

    def _arrive(self) -> None:
        assert self.workload.rate is not None
        if self._next_conversation():
            self.after(self._rng.expovariate(self.workload.rate), self._arrive)

    def _next_conversation(self) -> bool:
        conversation = next(self._coming, None)
        if conversation is None:
            return False
        self._open += 1
        self._ask(conversation)
        return True

    def _next_turn(self, conversation: Conversation, seconds: float) -> None:
        if conversation.turns_left:
            self.after(seconds + conversation.think_s(self.workload), lambda: self._ask(conversation))
            return
        self._open -= 1
        if self.workload.rate is None:
            self._next_conversation()

    def _ask(self, conversation: Conversation) -> None:
        turn = conversation.next_turn(self.workload)
        turn.asked_s = self.now_s
        self.turns.append(turn)
        self._route(turn)

    def _route(self, turn: Turn) -> None:
        up = {number: replica.load for number, replica in self.replicas.items() if replica.is_up}
        if not up:
            self.after(1.0, lambda: self._route(turn))
            return
        routing = self.routings[turn.conversation.number % self.cluster.fronts]
        chosen = routing.order(turn.chain, up)[0]
        routing.sent_(chosen, turn.chain)
        passed_s = self._in_front(turn, self.cluster.route_s * len(up))
        self.after(passed_s - self.now_s, lambda: self._arrive_at(chosen, turn))

    def _arrive_at(self, number: int, turn: Turn) -> None:
        """The replica has the request, if it is still there."""
        if self.replicas[number].is_up:
            self.replicas[number].give_(turn)
        else:
            self._route(turn)

    def _fail_later(self, machine: Machine) -> None:
        assert self.cluster.mtbf_s is not None
        self.after(self._rng.expovariate(1 / self.cluster.mtbf_s), lambda: self._fail(machine))

    def _fail(self, machine: Machine) -> None:
        lost = [turn for replica in machine.replicas for turn in replica.stop_()]
        machine.computing = 0

        def notice() -> None:
            for routing in self.routings:
                routing.keep_only_([number for number, replica in self.replicas.items() if replica.is_up])
            for turn in lost:
                turn.restarts += 1
                self.num_restarts += 1
                self._route(turn)

        def restart() -> None:
            for replica in machine.replicas:
                replica.is_up = True
            self._fail_later(machine)

        self.after(self.cluster.notice_s, notice)
        self.after(self.cluster.restart_s, restart)
