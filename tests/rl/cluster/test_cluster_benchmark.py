"""The simulated runs of `benchmarks/cluster.py`, against computations by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("cluster")


def plan(benchmark: ModuleType, **changes: Any) -> Any:
    """Two workers, four batches of 10 s, then 20 s of training; a worker loads new weights in 1 s."""
    settings = {"num_workers": 2, "num_batches": 4, "batch_seconds": 10.0, "spread": 0.0, "train_seconds": 20.0}
    return benchmark.Plan(**(settings | changes))


def test_at_lag_0_a_step_takes_both_sides_together(benchmark: ModuleType) -> None:
    result = benchmark.simulate(plan(benchmark))
    assert result.step_seconds == pytest.approx(1 + 2 * 10 + 20)
    assert result.trainer_idle == pytest.approx(21 / 41)
    assert result.rollout_idle == pytest.approx(20 / 41, abs=0.01)


@pytest.mark.parametrize("lag", [1, 2])
def test_ahead_of_training_a_step_takes_the_longer_side(benchmark: ModuleType, lag: int) -> None:
    assert benchmark.simulate(plan(benchmark, lag=lag)).step_seconds == pytest.approx(1 + 2 * 10, abs=0.6)
    long = benchmark.simulate(plan(benchmark, lag=lag, train_seconds=50.0))
    assert long.step_seconds == pytest.approx(50)
    assert long.trainer_idle == pytest.approx(0)


def test_programs_are_waited_for_at_lag_0_and_run_beside_everything_else_at_lag_2(benchmark: ModuleType) -> None:
    at_0 = benchmark.simulate(plan(benchmark, judge_seconds=10.0))
    assert at_0.step_seconds == pytest.approx(1 + 2 * 10 + 10 + 20)
    assert at_0.trainer_idle == pytest.approx(31 / 51)
    assert benchmark.simulate(plan(benchmark, judge_seconds=10.0, lag=2)).step_seconds == pytest.approx(21, abs=0.6)


def test_twice_the_workers_roll_out_in_half_the_time(benchmark: ModuleType) -> None:
    one, two, four = (
        benchmark.simulate(plan(benchmark, num_workers=n, train_seconds=0.0)).step_seconds for n in (1, 2, 4)
    )
    assert (one, two, four) == pytest.approx((41, 21, 11))


def test_a_killed_worker_costs_what_its_batch_takes_elsewhere(benchmark: ModuleType) -> None:
    """Killed in the third step, 5 s into its first batch: three are left when the other worker is free again.

    That one is done with all of them 1 + 40 s after the start of the step, the new one needs 30 s to start, 1 s to load
    and 10 s for a batch: at 5 + 30 it takes one of them, from 36 to 46 s. Without the fault it had been 21 s.
    """
    plain = benchmark.simulate(plan(benchmark, num_steps=5))
    at = plain.ends[1] + 1 + 5
    hit = benchmark.simulate(plan(benchmark, num_steps=5), benchmark.kill, at)
    assert hit.ends[:2] == plain.ends[:2]
    added = hit.ends[2] - plain.ends[2]
    assert 20 <= added <= 25
    assert hit.ends[-1] - plain.ends[-1] == pytest.approx(added)


def test_times_depend_on_the_batch_and_have_the_mean_and_spread_that_were_asked_for(benchmark: ModuleType) -> None:
    wide = plan(benchmark, spread=0.3)
    drawn = [benchmark.work_of(wide, step, slot).seconds for step in range(1, 101) for slot in range(50)]
    mean = sum(drawn) / len(drawn)
    spread = (sum((seconds - mean) ** 2 for seconds in drawn) / len(drawn)) ** 0.5 / mean
    assert mean == pytest.approx(10, rel=0.02)
    assert spread == pytest.approx(0.3, rel=0.05)
    assert benchmark.work_of(wide, 3, 4) == benchmark.work_of(wide, 3, 4) != benchmark.work_of(wide, 4, 3)
