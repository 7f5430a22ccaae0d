"""From completions to verdicts: the weighted sum of all reward functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from coupled.reward.extract import Extraction, extract
from coupled.reward.functions import LOAD_SECONDS, FunctionProcess, RewardSpec
from coupled.reward.judge import Judge
from coupled.reward.types import Judgement, RewardError, Status, Task, Verdict
from coupled.sandbox import Executor, Limits

PUBLISHED = (RewardSpec(name="code", weight=2.0), RewardSpec(name="format", weight=0.5))
"""The published reward: 2.0 x pass rate, counted only when the format is right, plus 0.5 x format."""


OnError = Literal["stop", "mask"]
MAX_FAILURES = 3
"""Failed calls of a user's function on parts of a batch, after which the rest of the batch is not tried."""


class Scorer:
    """Scores completions. A context manager. The caller closes the executor, which only the function `code` needs.

    `timeout_seconds` bounds one call of a user's function. `on_error` selects the effect of a failed call: `stop`
    raises RewardError, `mask` leaves the completions that it fails on without a score. `allow_weak` is passed to the
    judge. Raises RewardError for a function that cannot be loaded.
    """

    def __init__(
        self,
        functions: Sequence[RewardSpec] = PUBLISHED,
        executor: Executor | None = None,
        *,
        timeout_seconds: float = 60.0,
        on_error: OnError = "stop",
        limits: Limits | None = None,
        allow_weak: bool = False,
        root: Path | None = None,
    ) -> None:
        keys = [spec.key for spec in functions]
        twice = [key for key in keys if keys.count(key) > 1]
        if not functions or twice:
            raise RewardError(
                f"a reward has one function or more, each named once; received {keys}: "
                + (f"rename one of the functions called {twice[0]!r}" if twice else "add one, such as name: code")
            )
        if timeout_seconds <= 0:
            raise RewardError(f"timeout_seconds is above 0; received {timeout_seconds}")
        if "code" in keys and executor is None:
            raise RewardError("the reward function 'code' runs programs; received no executor: open one")
        self._functions = tuple(functions)
        self._judge = (
            Judge(executor, limits, allow_weak=allow_weak) if "code" in keys and executor is not None else None
        )
        self._timeout_seconds = timeout_seconds
        self._on_error = on_error
        self._users: dict[str, FunctionProcess] = {}
        try:
            for spec in functions:
                if spec.path is not None:
                    self._users[spec.key] = FunctionProcess(spec.path, root or Path())
        except BaseException:
            self.close()
            raise

    @property
    def has_judge(self) -> bool:
        """True when a reward function needs the programs to run."""
        return self._judge is not None

    def patience(self, tasks: Sequence[Task]) -> float:
        """Seconds that the user's functions may take for these tasks, when all fail and are called prompt by prompt."""
        num_calls = 1 + len({task.uid for task in tasks})
        return len(self._users) * (num_calls * self._timeout_seconds + MAX_FAILURES * LOAD_SECONDS)

    def score(
        self, tasks: Sequence[Task], completions: Sequence[str], judgements: Sequence[Judgement] | None = None
    ) -> list[Verdict]:
        """Return one verdict per completion; each program runs once, whatever the number of functions.

        `judgements`, from a `Judge` with the same executor, replaces the runs of programs that have run already.

        A sample whose program has no verdict, or on which a function failed, has no score at all (INFRA): a sum without
        that part would be a reward for something else. Raises RewardError for a user's function that
        misbehaves, UnsupportedTest for a test that cannot be run, ValueError when the lengths differ.
        """
        if len(tasks) != len(completions):
            raise ValueError(f"one task per completion; received {len(tasks)} tasks, {len(completions)} completions")
        if not tasks:
            return []
        extractions = [extract(completion) for completion in completions]
        judged: Sequence[Judgement | None] = [None] * len(tasks)
        if judgements is not None:
            judged = judgements
        elif self._judge is not None:
            judged = self._judge.judge_programs(tasks, [extraction.code for extraction in extractions])
        theirs: dict[str, list[float | None]] = {}
        failed: dict[int, str] = {}
        for key, function in self._users.items():
            theirs[key], why = self._call(function, tasks, completions)
            failed |= why
        return [
            self._verdict(
                extraction, judgement, {key: scores[index] for key, scores in theirs.items()}, failed.get(index)
            )
            for index, (extraction, judgement) in enumerate(zip(extractions, judged, strict=True))
        ]

    def close(self) -> None:
        """End the processes of the user's functions; harmless when repeated."""
        for function in self._users.values():
            function.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(
        self, function: FunctionProcess, tasks: Sequence[Task], completions: Sequence[str]
    ) -> tuple[list[float | None], dict[int, str]]:
        """Return the user's scores, and the error message for each completion that the function fails on.

        One completion may have caused the failure: with `mask` the function is called again prompt by prompt.
        """
        try:
            return function.score(tasks, completions, self._timeout_seconds), {}
        except RewardError as error:
            if self._on_error == "stop":
                raise
            why = str(error)
        scores: list[float | None] = [None] * len(tasks)
        failed: dict[int, str] = {}
        num_failures = 0
        groups = [[index for index, _ in group] for _, group in groupby(enumerate(tasks), key=lambda each: each[1].uid)]
        for places in groups:
            if len(groups) > 1 and num_failures < MAX_FAILURES:
                part = [tasks[place] for place in places], [completions[place] for place in places]
                try:
                    found = function.score(*part, self._timeout_seconds)
                except RewardError as error:
                    num_failures += 1
                    why = str(error)
                else:
                    for place, score in zip(places, found, strict=True):
                        scores[place] = score
                    continue
            failed |= dict.fromkeys(places, why)
        return scores, failed

    def _verdict(
        self,
        extraction: Extraction,
        judgement: Judgement | None,
        theirs: Mapping[str, float | None],
        why_not: str | None,
    ) -> Verdict:
        values: dict[str, float | None] = {"format": extraction.format, **theirs}
        is_judged = judgement is not None and judgement.status is not Status.INFRA
        is_infra = why_not is not None or (judgement is not None and not is_judged)
        if judgement is not None and is_judged:
            values["code"] = judgement.pass_rate if extraction.format == 1.0 else 0.0
        parts: dict[str, float] = {}
        for spec in self._functions:
            value = values.get(spec.key)
            if value is not None:
                parts[spec.key] = value
        total = sum(spec.weight * parts[spec.key] for spec in self._functions if spec.key in parts)
        return Verdict(
            score=None if is_infra or not parts else float(total),
            parts=parts,
            status=Status.INFRA if is_infra else judgement.status if judgement else Status.OK,
            passed=judgement.passed if judgement else 0,
            total=judgement.total if judgement else 0,
            per_test=judgement.per_test if judgement else (),
            outcome=judgement.outcome if judgement else "not_run",
            tier=judgement.tier if judgement else "",
            detail=why_not or (judgement.detail if judgement else ""),
        )
