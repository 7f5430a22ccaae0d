"""The judge of a run: sandbox, hidden tests and reward functions, opened and checked before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from coupled.reward import Judge, Judgement, Scorer, Task, Verdict, num_runs
from coupled.sandbox import (
    CachedExecutor,
    CacheStatistics,
)

MAX_AHEAD = 16
"""Batches whose programs run ahead at the same time; the sandbox's workers are fewer, or on many hosts."""


class Grader:
    """Scores completions for training, and judges them for evaluation, with its own sandbox workers."""

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
        """Weighted rewards, one verdict per completion. Programs of `begin` are not run again.

        Raises:
            RewardError: a user's function misbehaves.
        """
        begun = [self._ahead.pop(uid, None) for uid in uids]
        if not begun or None in begun:
            return self._scorer.score(tasks, completions)
        # Equal completions get equal verdicts, also when a program ran in two batches and was slow in one of them.
        first: dict[tuple[str, str], Judgement] = {}
        judgements = [
            first.setdefault((task.uid, text), batch.result()[place])
            for task, text, (batch, place) in zip(tasks, completions, filter(None, begun), strict=True)
        ]
        return self._scorer.score(tasks, completions, judgements)

    def forget(self, uids: Sequence[str]) -> None:
        """Drop the judgements of completions whose scores are no longer needed."""
        for uid in uids:
            self._ahead.pop(uid, None)

    def judge(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[Judgement]:
        """Judge completions by their hidden tests alone, independent of the recipe's rewards."""
        return self._judge.judge(tasks, completions)

    def patience(self, tasks: Sequence[Task]) -> float:
        """Deadline in seconds for scoring one completion of each task: twice what programs take at their limits."""
        runs = sum(map(num_runs, tasks))
        return 2 * runs * self._judge.limits.wall_seconds + self._scorer.patience(tasks)

    def cache_statistics(self) -> CacheStatistics:
        """Counts of repeated and of executed programs since the grader was opened."""
        return self._executor.statistics()

    def close(self) -> None:
        """Stop the sandbox workers."""
        self._executor.close()
        self._threads.shutdown(cancel_futures=True)
        self._scorer.close()
