"""What Ray is told of an engine's health, with a clock and an engine that do as they are told."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'ropewalk[cluster]'")

from ropewalk.cluster import replica  # noqa: E402
from ropewalk.cluster.replica import PROBE_EVERY_S, STALLED_S, EngineHealth, Stalled  # noqa: E402


class FakeEngine:
    """Counts the tokens that it is asked for."""

    def __init__(self) -> None:
        self.scheduler, self.queue = SimpleNamespace(num_steps=0), SimpleNamespace(num_running=0)
        self.model = SimpleNamespace(backend=SimpleNamespace(when_failed=self._listen))
        self.num_asked = 0

    def _listen(self, function: Callable[[], None]) -> None:
        self.lose_rank = function

    def generate(self, prompt: list[int], params: object) -> None:
        self.num_asked += 1
        self.scheduler.num_steps += 1


def test_an_engine_without_work_writes_a_token_and_one_that_stalls_is_ill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(replica.time, "monotonic", lambda: now)
    engine = FakeEngine()
    health = EngineHealth(engine)
    health.check()
    now += PROBE_EVERY_S + 1
    health.check()
    assert engine.num_asked == 1
    engine.queue.num_running = 2
    health.check()
    now += STALLED_S - 1
    health.check()
    engine.scheduler.num_steps += 1
    now += 2
    health.check()
    now += STALLED_S + 1
    with pytest.raises(Stalled, match="2 replies run, and no step for 301 s"):
        health.check()


def test_an_engine_whose_pipeline_has_lost_a_rank_is_ill_at_once() -> None:
    engine = FakeEngine()
    health = EngineHealth(engine)
    health.check()
    engine.lose_rank()
    with pytest.raises(Stalled, match="a rank of the replica's pipeline was lost"):
        health.check()
    assert engine.num_asked == 0
