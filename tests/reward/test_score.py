from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from coupled.reward import PUBLISHED, RewardSpec, Scorer, Status, Task, Verdict
from coupled.sandbox import Execution, Isolation, Job, LocalExecutor, Outcome

TASK = Task(uid="t", prompt="", hidden_tests=("assert f(2) == 4", "assert f(3) == 9"), entry_point="f")
RIGHT = "```python\ndef f(x): return x * x\n```"
HALF = "```python\ndef f(x): return 4\n```"
BROKEN = "```python\ndef f(x: return 4\n```"
BARE = "def f(x): return x * x"


class Counting:
    """Counts the programs that another executor runs, or answers each with one outcome."""

    def __init__(self, inner: LocalExecutor | None, outcome: Outcome = Outcome.OK) -> None:
        self.inner, self.outcome, self.seen = inner, outcome, 0

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        self.seen += len(jobs)
        if self.inner is not None:
            return self.inner.run(jobs)
        return [Execution(uid=job.uid, outcome=self.outcome, tier="fake") for job in jobs]

    def isolation(self) -> Isolation:
        raise NotImplementedError

    def close(self) -> None: ...


def test_the_published_reward_is_twice_the_pass_rate_plus_half_the_format(executor: LocalExecutor) -> None:
    verdicts = Scorer(PUBLISHED, executor).score([TASK] * 4, [RIGHT, HALF, BROKEN, BARE])
    assert verdicts == [
        Verdict(
            score=2.5,
            parts={"code": 1.0, "format": 1.0},
            status=Status.OK,
            passed=2,
            total=2,
            per_test=(True, True),
            outcome="ok",
            tier="T0",
        ),
        Verdict(
            score=1.5,
            parts={"code": 0.5, "format": 1.0},
            status=Status.OK,
            passed=1,
            total=2,
            per_test=(True, False),
            outcome="ok",
            tier="T0",
        ),
        Verdict(
            score=0.25,
            parts={"code": 0.0, "format": 0.5},
            status=Status.CRASH,
            passed=0,
            total=2,
            per_test=(False, False),
            outcome="syntax_error",
        ),
        Verdict(
            score=0.0,
            parts={"code": 0.0, "format": 0.0},
            status=Status.CRASH,
            passed=0,
            total=2,
            per_test=(False, False),
            outcome="no_code",
        ),
    ]


def test_a_program_runs_once_whatever_the_number_of_functions(executor: LocalExecutor, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def brevity(completions): return [-len(c) for c in completions]")
    counting = Counting(executor)
    functions = [*PUBLISHED, RewardSpec(path="r.py:brevity", weight=0.01)]
    (verdict,) = Scorer(functions, counting, root=tmp_path).score([TASK], [RIGHT])
    assert counting.seen == 1
    assert verdict.parts == {"code": 1.0, "format": 1.0, "brevity": -len(RIGHT)}
    assert verdict.score == pytest.approx(2.5 - 0.01 * len(RIGHT))


def test_nothing_runs_when_no_function_asks_for_it() -> None:
    (verdict,) = Scorer([RewardSpec(name="format", weight=0.5)]).score([TASK], [BROKEN])
    assert verdict == Verdict(score=0.25, parts={"format": 0.5}, status=Status.OK)
    assert verdict.outcome == "not_run"


@pytest.mark.parametrize("outcome", [Outcome.SANDBOX_ERROR, Outcome.OVERLOADED])
def test_infrastructure_gives_no_score_and_never_a_zero(outcome: Outcome) -> None:
    verdicts = Scorer(PUBLISHED, Counting(None, outcome)).score([TASK, TASK], [RIGHT, BARE])
    assert verdicts[0].score is None
    assert verdicts[0].status is Status.INFRA
    assert "code" not in verdicts[0].parts
    assert verdicts[1].score == 0.0  # nothing of it had to run


def test_a_timeout_is_scored_by_the_tests_that_were_answered() -> None:
    (verdict,) = Scorer(PUBLISHED, Counting(None, Outcome.TIMEOUT)).score([TASK], [RIGHT])
    assert (verdict.score, verdict.status, verdict.passed, verdict.total) == (0.5, Status.TIMEOUT, 0, 2)


def test_none_of_a_function_leaves_it_out_and_none_of_all_leaves_no_score(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def maybe(completions): return [None if 'x:' in c else 3 for c in completions]")
    maybe = RewardSpec(path="r.py:maybe", weight=2.0)
    with_format = Scorer([maybe, RewardSpec(name="format", weight=0.5)], root=tmp_path)
    assert [verdict.score for verdict in with_format.score([TASK] * 2, [BROKEN, BARE])] == [0.25, 6.0]
    alone = Scorer([maybe], root=tmp_path)
    assert [verdict.score for verdict in alone.score([TASK] * 2, [BROKEN, BARE])] == [None, 6.0]


def test_lengths_must_agree_and_nothing_gives_nothing() -> None:
    scorer = Scorer([RewardSpec(name="format")])
    assert scorer.score([], []) == []
    with pytest.raises(ValueError, match="2 tasks, 1 completions"):
        scorer.score([TASK, TASK], [RIGHT])


def test_a_stdio_task_takes_no_setup_and_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="drop its setup"):
        Task(uid="t", prompt="", hidden_tests=(), style="stdio", setup="x = 1")
    with pytest.raises(ValueError, match="task 't' has 'riddle'"):
        Task(uid="t", prompt="", hidden_tests=(), style="riddle")  # type: ignore[arg-type]
