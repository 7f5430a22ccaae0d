"""The judge of a run: sandbox, hidden tests and reward functions, opened and checked before training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from coupled.reward import Judge, Judgement, RewardSpec, Scorer, Task, Verdict, plan
from coupled.rl.recipe.schema import Recipe, Sandbox
from coupled.sandbox import (
    CachedExecutor,
    CacheStatistics,
    Executor,
    Limits,
    RemoteExecutor,
    SandboxUnavailable,
    open_executor,
)
from coupled.sandbox.pool import require_runnable

MAX_AHEAD = 16
"""Batches whose programs are run ahead at the same time; the sandbox's workers are fewer, or on many hosts."""


class Grader:
    """Scores completions for training, and judges them for evaluation, with sandbox workers of its own."""

    def __init__(self, executor: CachedExecutor, scorer: Scorer, judge: Judge) -> None:
        self._executor = executor
        self._scorer = scorer
        self._judge = judge
        self._threads = ThreadPoolExecutor(MAX_AHEAD, "judge")
        self._ahead: dict[str, tuple[Future[list[Judgement]], int]] = {}

    def begin(self, uids: Sequence[str], tasks: Sequence[Task], completions: Sequence[str]) -> None:
        """Run the programs of completions that will be scored under these uids; returns at once."""
        if self._scorer.has_judge:
            batch = self._threads.submit(self._judge.judge, tasks, completions)
            self._ahead.update((uid, (batch, place)) for place, uid in enumerate(uids))

    def score(self, tasks: Sequence[Task], completions: Sequence[str], uids: Sequence[str] = ()) -> list[Verdict]:
        """Weighted rewards, one verdict per completion. Programs that `begin` was given are not run again.

        Raises:
            RewardError: a user's function misbehaves.
        """
        begun = [self._ahead.pop(uid, None) for uid in uids]
        if not begun or None in begun:
            return self._scorer.score(tasks, completions)
        # Equal completions have equal verdicts, also where a program ran in two batches and was slow in one of them.
        first: dict[tuple[str, str], Judgement] = {}
        judgements = [
            first.setdefault((task.uid, text), batch.result()[place])
            for task, text, (batch, place) in zip(tasks, completions, filter(None, begun), strict=True)
        ]
        return self._scorer.score(tasks, completions, judgements)

    def forget(self, uids: Sequence[str]) -> None:
        """Nobody asks for the scores of these any more."""
        for uid in uids:
            self._ahead.pop(uid, None)

    def judge(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[Judgement]:
        """Hidden tests only, whatever the recipe rewards."""
        return self._judge.judge(tasks, completions)

    def patience(self, tasks: Sequence[Task]) -> float:
        """Seconds that scoring one completion of each may take when every program uses up its time, twice over."""
        runs = sum(len(task.hidden_tests) if task.style == "stdio" else 1 for task in tasks)
        return 2 * runs * self._judge.limits.wall_seconds + self._scorer.patience(tasks)

    def cache_statistics(self) -> CacheStatistics:
        """How many programs had been run before, since this was opened."""
        return self._executor.statistics()

    def close(self) -> None:
        """Stop the sandbox workers."""
        self._executor.close()
        self._threads.shutdown(cancel_futures=True)
        self._scorer.close()


def open_grader(
    recipe: Recipe, tasks: Sequence[Task] = (), tell: Callable[..., None] = lambda event, **facts: None
) -> Grader:
    """The grader of a recipe; close it when done. `tasks` are those that it will be asked about.

    `tell` hears what becomes of supervisors and their batches, where there are any.

    Raises:
        SandboxUnavailable: this host cannot give the tier that the recipe asks for, or the tier cannot run the
            tests of a task.
        RewardError: a reward function cannot be loaded.
    """
    sandbox = recipe.sandbox
    limits = Limits(cpu_seconds=sandbox.cpu_seconds, wall_seconds=sandbox.wall_seconds, memory_mb=sandbox.memory_mb)
    specs = [RewardSpec(name=f.name, path=f.path, weight=f.weight) for f in recipe.reward.functions]
    executor = CachedExecutor(open_sandbox(recipe, tell))
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
    """Find out now, and not in the middle of a run, that a tier cannot run the tests of a task."""
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


def open_local_sandbox(sandbox: Sandbox) -> Executor:
    """The workers of this process: jails on this machine, or connections to a server.

    Raises:
        SandboxUnavailable: this host cannot give the tier, or there is no server at the address.
    """
    if sandbox.tier == "remote":
        assert sandbox.url is not None, "the recipe requires a url with tier remote"
        return RemoteExecutor(sandbox.url, num_workers=sandbox.num_workers)
    return open_executor(tier=sandbox.tier, num_workers=sandbox.num_workers)


def open_sandbox(recipe: Recipe, tell: Callable[..., None] = lambda event, **facts: None) -> Executor:
    """The workers that a recipe asks for: of this process, or of a Ray cluster."""
    if recipe.sandbox.workers == "inline":
        return open_local_sandbox(recipe.sandbox)
    from coupled.rl.judging.ray_sandbox import RayExecutor

    return RayExecutor(recipe, tell=tell)
