"""Opens the grader of a run and the sandbox that it uses."""

from __future__ import annotations

from collections.abc import Sequence

from coupled.reward import Judge, RewardSpec, Scorer, Task, plan
from coupled.rl.cluster.types import NO_EVENTS, EventSink
from coupled.rl.judging.grader import Grader
from coupled.rl.judging.local_sandbox import open_local_sandbox
from coupled.rl.recipe.schema import Recipe
from coupled.sandbox import (
    CachedExecutor,
    Executor,
    Limits,
    SandboxUnavailable,
)
from coupled.sandbox.pool import require_runnable


def open_grader(recipe: Recipe, tasks: Sequence[Task] = (), emit: EventSink = NO_EVENTS) -> Grader:
    """The grader of a recipe; close it when done. `tasks` are the tasks that it will judge.

    `emit` receives the events of supervisors and their batches, where there are any.

    Raises:
        SandboxUnavailable: this host cannot provide the recipe's sandbox tier, or the tier cannot run the
            tests of a task.
        RewardError: a reward function cannot be loaded.
    """
    sandbox = recipe.sandbox
    limits = Limits(cpu_seconds=sandbox.cpu_seconds, wall_seconds=sandbox.wall_seconds, memory_mb=sandbox.memory_mb)
    specs = [RewardSpec(name=f.name, path=f.path, weight=f.weight) for f in recipe.reward.functions]
    executor = CachedExecutor(open_sandbox(recipe, emit))
    try:
        _check_tests(tasks, executor.isolation().tier, recipe.reward.allow_weak)
        weak = recipe.reward.allow_weak
        timeout = recipe.reward.timeout_seconds
        on_error = recipe.reward.on_error
        scorer = Scorer(specs, executor, timeout_seconds=timeout, on_error=on_error, limits=limits, allow_weak=weak)
    except BaseException:
        executor.close()
        raise
    return Grader(executor, scorer, Judge(executor, limits, allow_weak=weak))


def _check_tests(tasks: Sequence[Task], tier: str, allow_weak: bool) -> None:
    """Check before the run starts that the tier can run the tests of every task."""
    refused: list[str] = []
    for task in tasks:
        planned = plan(task, allow_weak=allow_weak) if task.hidden_tests else None
        if planned is None or planned.tier == "T0":  # calls and inputs, which every tier runs
            continue
        try:
            require_runnable(planned.job("", Limits()), tier)
        except SandboxUnavailable as error:
            refused.append(str(error))
    if refused:
        raise SandboxUnavailable(f"{len(refused)} of {len(tasks)} tasks cannot be judged here. The first: {refused[0]}")


def open_sandbox(recipe: Recipe, emit: EventSink = NO_EVENTS) -> Executor:
    """Executor of the recipe's `sandbox.workers`: in this process, or on a Ray cluster."""
    if recipe.sandbox.workers == "inline":
        return open_local_sandbox(recipe.sandbox)
    from coupled.rl.judging.ray_sandbox import RayExecutor

    return RayExecutor(recipe, emit=emit)
