"""`coupled sandbox run`: run one file against its tests and show the verdicts of the sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from coupled.reward import Judge, Judgement, Status, Task
from coupled.rl.errors import DataError
from coupled.rl.judging.local_sandbox import open_local_sandbox
from coupled.rl.recipe.judging import Sandbox
from coupled.sandbox import Execution, Executor, Isolation, Job, Limits

_OURS = ("uid", "prompt", "visible_tests", "hidden_tests", "columns")
FIELDS = ("tests", *(item.name for item in fields(Task) if item.name not in _OURS))
FORMAT = (
    'a JSON list of assert statements, such as ["assert f(1) == 2"], or an object with "tests" and optionally '
    '"style", "entry_point" and "setup"; of style "stdio" each test is {"input": "..", "output": ".."}'
)

_COMPARED_BY = {
    "T0": "compared by the host",
    "T1": "compared by the tests, in a sandbox of their own",
    "T2": "weak: compared in the program's own process, where it can forge the verdicts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Result of one file. `execution` is None when nothing was run, as for a syntax error."""

    task: Task
    judgement: Judgement
    execution: Execution | None
    num_calls: int
    """Number of calls, or of inputs, in the tests."""
    isolation: Isolation

    @property
    def has_passed(self) -> bool:
        """True when there are tests and every one passed."""
        return bool(self.judgement.per_test) and all(self.judgement.per_test)

    @property
    def is_judged(self) -> bool:
        """False: the sandbox failed, which is no evidence about the program."""
        return self.judgement.status is not Status.INFRA

    def rows(self) -> list[tuple[str, bool | None]]:
        """Each test, or each part of one that is judged in parts, and whether it passed; None: not judged."""
        texts, per_test = self.task.hidden_tests, self.judgement.per_test
        if not per_test:
            return [(text, None) for text in texts]
        if len(per_test) == len(texts):
            return list(zip(texts, per_test, strict=True))
        return [(f"part {number}", passed) for number, passed in enumerate(per_test, 1)]

    def replies(self) -> list[str]:
        """Result of the program for each test; empty where a test is not one call or one input."""
        run = self.execution
        if run is None or self.judgement.tier != "T0" or self.num_calls != len(self.task.hidden_tests):
            return []
        return [
            f"{result.raised.type}: {result.raised.text}" if result.raised else repr(result.value)
            for result in run.results
        ]

    def as_json(self) -> str:
        """The result as one line of JSON."""
        run = self.execution
        content = {
            "passed": self.has_passed,
            "status": str(self.judgement.status),
            "outcome": self.judgement.outcome,
            "verdict_tier": self.judgement.tier,
            "is_weak": self.judgement.is_weak,
            "tests": [{"test": text, "passed": passed} for text, passed in self.rows()],
            "tier": run.tier if run else self.isolation.tier,
            "usage": asdict(run.usage) if run else None,
            "detail": run.detail if run else "",
            "stdout": run.stdout if run else "",
        }
        return json.dumps(content)

    def as_table(self) -> Group:
        """The result as a table. Output of the program cannot move the terminal's cursor or change its colours."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("test", overflow="fold")
        rows, replies = self.rows(), self.replies()
        if replies:
            table.add_column("result", overflow="fold")
        for (text, passed), reply in zip(rows, replies + [""] * len(rows), strict=False):
            mark = Text("—") if passed is None else Text("pass", "green") if passed else Text("FAIL", "bold red")
            table.add_row(mark, *(Text(_printable(part)[:400]) for part in (text, reply)[: len(table.columns) - 1]))
        run, judgement = self.execution, self.judgement
        lines = [f"status   {judgement.summary}" + (f": {run.detail}" if run and run.detail else "")]
        lines += [f"passed   {judgement.passed} of {len(self.rows())}"]
        if judgement.tier:
            lines += [f"verdict  {judgement.tier}: {_COMPARED_BY[judgement.tier]}"]
        if run is not None:
            used = run.usage
            lines += [f"used     {used.cpu_seconds:.3f} s CPU, {used.wall_seconds:.3f} s wall, {used.memory_mb:.0f} MB"]
        lines += [f"tier     {self.isolation.tier}: {self.isolation.filesystem}; {self.isolation.user}"]
        parts: list[Any] = [table, *(Text(_printable(line)) for line in lines)]
        if run is not None and run.stdout:
            parts += [Text("stdout", "dim"), Text(_printable(run.stdout))]
        return Group(*parts)


def try_file(program: Path, tests: Path, *, tier: str, url: str | None, allow_weak: bool = False) -> Trial:
    """Run a file against its tests with the default limits. `allow_weak` also permits tests of verdict tier T2.

    Raises:
        DataError: a file cannot be read or is not in the format, or tier and address contradict each other.
        RewardError: a test that cannot be run.
        SandboxUnavailable: this machine cannot provide the tier.
    """
    return try_program(read_task(tests), _read(program), tier=tier, url=url, allow_weak=allow_weak)


def try_program(
    task: Task, source: str, *, tier: str = "auto", url: str | None = None, allow_weak: bool = False
) -> Trial:
    """Run source code against the tests of a task; raises the errors of `try_file`."""
    try:
        settings = Sandbox.model_validate({"tier": tier, "url": url, "num_workers": 1})
    except ValidationError as error:
        raise DataError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from error
    limits = Limits(cpu_seconds=settings.cpu_seconds, wall_seconds=settings.wall_seconds, memory_mb=settings.memory_mb)
    recorder = _Recorder(open_local_sandbox(settings))
    try:
        (judgement,) = Judge(recorder, limits, allow_weak=allow_weak).judge_programs([task], [source])
        isolation = recorder.isolation()
    finally:
        recorder.close()
    # Besides the program itself, references and checkers may have run.
    own = [(job, execution) for job, execution in recorder.runs if job.source == source]
    job, execution = own[0] if own else (None, None)
    num_calls = len(job.calls) + len(job.stdin_cases) if job else 0
    return Trial(task=task, judgement=judgement, execution=execution, num_calls=num_calls, isolation=isolation)


def read_task(path: Path) -> Task:
    """Return the tests of a file as a task. Raises DataError when it is not in the format."""
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Tests are {FORMAT}") from error
    if isinstance(content, list):
        content = {"tests": content}
    if not isinstance(content, dict) or not isinstance(content.get("tests"), list) or not content["tests"]:
        raise DataError(f"{path} has no tests. Tests are {FORMAT}")
    if unknown := sorted(content.keys() - set(FIELDS)):
        raise DataError(f"{path} has the unknown key {unknown[0]!r}; known are {', '.join(FIELDS)}")
    tests = tuple(test if isinstance(test, str) else json.dumps(test) for test in content["tests"])
    rest = {key: value for key, value in content.items() if key != "tests"}
    if wrong := [key for key, value in rest.items() if not isinstance(value, str | float)]:
        raise DataError(f"{path}: {wrong[0]} must be a text or a number; got {rest[wrong[0]]!r}")
    try:
        return Task(uid=path.stem, prompt="", hidden_tests=tests, **rest)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


class _Recorder:
    """An executor that keeps every job's execution: a judgement holds neither its times nor its output."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.runs: list[tuple[Job, Execution]] = []

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        found = self._executor.run(jobs)
        self.runs += zip(jobs, found, strict=True)
        return found

    def isolation(self) -> Isolation:
        return self._executor.isolation()

    def close(self) -> None:
        self._executor.close()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)
