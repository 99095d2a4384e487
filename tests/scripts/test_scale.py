"""scripts/scale: the simulation of many replicas, and the costs that it is given."""

from __future__ import annotations

import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "scale"))
from results import Result, percentiles, result_of
from ropewalk.cluster.routing import PrefixRouting, TwoChoices
from ropewalk.files.embedded import demo_model_path
from simulation import Cluster, Simulation, StepCosts
from step_times import as_json, mean_costs, read_costs, step_costs
from workload import Workload

COSTS = StepCosts((0.05, 0.055, 0.06, 0.065), row_s=0.005, alone_row_s=0.004, keys=3000.0, slowdown=(1.0, 1.1))
TALK = Workload(num_conversations=24, num_turns=4, at_once=6)


def result(cluster: Cluster, workload: Workload = TALK, make_routing=PrefixRouting, seed: int = 0) -> Result:
    return result_of(Simulation(COSTS, cluster, workload, make_routing, seed).run())


@pytest.mark.parametrize("cluster", [Cluster(1), Cluster(2, replicas=2), Cluster(3, mtbf_s=20.0, restart_s=5.0)])
def test_every_turn_is_answered_once_and_in_order(cluster: Cluster) -> None:
    simulation = Simulation(COSTS, cluster, TALK, PrefixRouting).run()
    assert len(simulation.turns) == TALK.num_conversations * TALK.num_turns
    last_s: dict[int, float] = {}
    for turn in simulation.turns:
        number = turn.conversation.number
        assert turn.first_s is not None and turn.ended_s is not None
        assert last_s.get(number, 0.0) <= turn.asked_s < turn.first_s <= turn.ended_s
        last_s[number] = turn.ended_s
    assert (simulation.num_restarts > 0) == (cluster.mtbf_s is not None)


def test_one_reply_alone_takes_what_its_steps_take() -> None:
    alone = replace(TALK, num_conversations=1, num_turns=1, at_once=1, system_tokens=0, turn_tokens=100)
    prompt_s = sum(COSTS.alone_row_s * (1 + 50 / COSTS.keys) for _ in range(100))
    found = result(Cluster(1), alone)
    assert found.first_s[0] == pytest.approx(prompt_s)
    assert found.seconds == pytest.approx(prompt_s + (alone.reply_tokens - 1) * COSTS.replies_s[0])
    assert found.cached == 0


def test_the_mean_of_two_measurements_lies_between_them() -> None:
    slower = replace(COSTS, replies_s=tuple(2 * s for s in COSTS.replies_s), row_s=0.007, slowdown=(1.0, 1.3))
    assert mean_costs([COSTS, COSTS]) == COSTS
    found = mean_costs([COSTS, slower])
    assert found.replies_s == pytest.approx([1.5 * s for s in COSTS.replies_s])
    assert (found.row_s, found.slowdown[1]) == pytest.approx((0.006, 1.2))


def test_steps_that_vary_take_as_long_on_average() -> None:
    varied = replace(COSTS, jitter=(0.4,))
    rng = random.Random(1)
    found = [varied.step_s(2, 16.0, 1, rng.gauss(0, 1)) for _ in range(4000)]
    assert statistics.mean(found) == pytest.approx(COSTS.step_s(2, 16.0, 1), rel=0.03)
    assert statistics.stdev(found) > 0.3 * statistics.mean(found)
    assert COSTS.step_s(2, 16.0, 1, 2.0) == COSTS.step_s(2, 16.0, 1)


def test_the_same_seed_gives_the_same_result_and_another_one_another() -> None:
    cluster, varied = Cluster(2), replace(TALK, varies=True)
    assert result(cluster, varied, seed=1) == result(cluster, varied, seed=1)
    assert result(cluster, varied, seed=1) != result(cluster, varied, seed=2)


def test_more_machines_do_more_and_slow_or_failing_ones_less() -> None:
    one, four = result(Cluster(1)), result(Cluster(4))
    assert four.seconds < 0.6 * one.seconds
    assert result(Cluster(4, slow=2)).seconds > 1.2 * four.seconds
    assert result(Cluster(4, mtbf_s=15.0)).seconds > 1.1 * four.seconds
    assert result(Cluster(1, replicas=2)).seconds > result(Cluster(2)).seconds  # they share a machine


def test_prefix_routing_finds_more_in_caches_than_routing_by_load() -> None:
    by_prefix, by_load = (result(Cluster(4), make_routing=kind) for kind in (PrefixRouting, lambda: TwoChoices(0)))
    assert by_prefix.cached > 1.1 * by_load.cached
    assert result(Cluster(4, cache_tokens=600)).cached < by_prefix.cached  # what is forgotten is read again


def test_a_front_that_is_too_slow_holds_everybody_up() -> None:
    fast, slow = result(Cluster(4, front_s=1e-4)), result(Cluster(4, front_s=0.05))
    assert slow.seconds > 1.5 * fast.seconds
    assert result(Cluster(4, fronts=4, front_s=0.05)).seconds < 0.8 * slow.seconds


def test_a_simulation_that_is_cut_short_counts_what_is_over() -> None:
    always = replace(TALK, rate=2.0, num_conversations=10**9)
    simulation = Simulation(COSTS, Cluster(2), always, PrefixRouting).run(until_s=30)
    found = result_of(simulation)
    assert 25 < found.seconds <= 31 and len(simulation.turns) > 30
    with pytest.raises(ValueError, match="run it for longer"):
        result_of(Simulation(COSTS, Cluster(2), always, PrefixRouting).run(until_s=1e-3))


def test_percentiles_of_few_values() -> None:
    assert percentiles([2.0]) == (2.0, 2.0, 2.0)
    assert percentiles([float(n) for n in range(101)]) == (50.0, 95.0, 99.0)


def test_step_times_are_measured_and_read_back(tmp_path: Path) -> None:
    costs = step_costs(demo_model_path(), threads=1, replicas=[1], request_s=0.002)
    assert len(costs.replies_s) == 8 and all(seconds > 0 for seconds in costs.replies_s)
    assert costs.slowdown == (1.0,) and costs.keys > 0 and costs.alone_row_s > 0
    (tmp_path / "costs.json").write_text(json.dumps(as_json(costs)))
    assert read_costs(tmp_path / "costs.json") == costs
