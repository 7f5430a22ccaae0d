"""The attack suite in every tier: no program is paid, the host is unharmed, the next program is judged as ever.

Every program goes through the real judge, with hidden tests whose expected value it cannot guess. Canaries are looked
at after each; so is an honest program on the same worker. Tier `process` does not contain programs: there the attempts
of the suite are seen to *work*, which shows that elsewhere it is the tier that stops them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
from attacks import CATEGORIES, arrays
from attacks.record import Program
from canaries import Canaries

from coupled.reward import Judge, Judgement, Status, Task, arguments_test, stdio_test
from coupled.sandbox import (
    TIERS,
    Call,
    Execution,
    Executor,
    Job,
    Limits,
    SandboxUnavailable,
    open_executor,
    zygote_process,
)

PROGRAMS = [(category, program) for category, programs in CATEGORIES.items() for program in programs]
CONTAINER = "namespaces"
"""The tier in which `scripts/check` runs every program. In the others it runs those that end differently there, and a
tenth of the rest; the long tier runs all."""
CONTAINMENT = ("filesystem", "network", "processes", "leftovers", "kernel", "resources")
"""Categories that tier `process` does not contain."""
SMALL: dict[str, Any] = {
    "cpu_seconds": 1,
    "wall_seconds": 20.0,
    "memory_mb": 192,
    "output_kb": 1024,
    "file_kb": 1024,
}
INPUTS = (1, 2, 3)
SECRET = random.SystemRandom().randrange(900_000_001, 1_000_000_000)
"""The value that `f` must return: no program can compute it, so one that returns it has found it."""

SQUARE_TASK = Task(
    uid="square",
    prompt="",
    hidden_tests=tuple(f"assert f({x}) == {x * x + 7}" for x in INPUTS),
    entry_point="f",
)
SECRET_TASK = Task(
    uid="secret",
    prompt="",
    hidden_tests=tuple(f"assert f({x}) == {SECRET}" for x in INPUTS),
    entry_point="f",
)
STDIO_TASK = Task(
    uid="stdio",
    prompt="",
    hidden_tests=tuple(stdio_test(f"{x}\n", f"{x * x + 7}\n{x}\n") for x in INPUTS),
    style="stdio",
)


def _beside(*expected: int) -> Task:
    """Tests that end early, having compared nothing, when an exception of the program's ends their loop."""
    answers = dict(zip(INPUTS, expected, strict=True))
    return Task(
        uid="beside",
        prompt="",
        hidden_tests=(
            f"for got, wanted in zip(map(f, {[*answers]}), {[*answers.values()]}):\n    assert got == wanted",
            f"for x, wanted in {answers}.items():\n    assert not any(got != wanted for got in map(f, [x]))",
            f"for x, wanted in {answers}.items():\n    assert all(map(lambda got: got == wanted, (f(y) for y in [x])))",
        ),
        entry_point="f",
    )


def _sets(*expected: int) -> Task:
    """Tests in which the judge walks the replies."""
    checks = ("set(f(1)) == {{{}}}", "sorted(f(2)) == [{}]", "sum(f(3)) == {}")
    return Task(
        uid="sets",
        prompt="",
        hidden_tests=tuple(f"assert {check.format(value)}" for check, value in zip(checks, expected, strict=True)),
        entry_point="f",
    )


_ORACLE_TASK = Task(
    uid="oracle",
    prompt="",
    hidden_tests=tuple(arguments_test([x]) for x in INPUTS),
    entry_point="f",
    style="evalplus",
    reference=f"def f(x): return [{SECRET}]",
    oracle="set",
)
TASKS = {"stdio": STDIO_TASK, "beside": _beside(*[SECRET] * 3), "sets": _sets(*[SECRET] * 3), "oracle": _ORACLE_TASK}
_SQUARES = [x * x + 7 for x in INPUTS]
_RIGHT_TASKS = {
    "stdio": STDIO_TASK,
    "beside": _beside(*_SQUARES),
    "sets": _sets(*_SQUARES),
    "calls": SQUARE_TASK,
}
_LEFT = "import os\ndef f(x): return sorted(os.listdir('.')) if os.access('.', os.R_OK) else []"


class Recorder:
    """An executor that keeps what it passes on, and may change the profile of what it is given."""

    def __init__(self, executor: Executor, profile: str = "strict") -> None:
        self._executor = executor
        self._profile = profile
        self.last: Execution | None = None

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        executions = self._executor.run([replace(job, profile=self._profile) for job in jobs])
        self.last = executions[-1] if executions else self.last
        return executions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


class Arena:
    """One worker of a tier with canaries around it."""

    def __init__(self, tier: str, preload: Sequence[str] = ()) -> None:
        self.tier = tier
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tier process warns, as it should
            self.executor = open_executor(tier, num_workers=1, preload=preload)
        self.canaries = self._watch()

    def _watch(self) -> Canaries:
        pid = self.executor._workers[0].pid
        assert pid is not None
        return Canaries(int(self.executor.isolation().user.split()[1]), pid)

    def watch_afresh(self) -> None:
        self.canaries.close()
        self.canaries = self._watch()

    def judge(self, program: Program) -> tuple[Judgement, str]:
        """Return the judgement and how the program ended, in one line."""
        source = program.source
        if "HOST" in source:
            source = f"HOST = {self.canaries.about!r}\n{source}"
        limits = Limits(**(SMALL | dict(program.limits)))
        task = _RIGHT_TASKS[program.mode] if program.is_right else TASKS.get(program.mode, SECRET_TASK)
        recorder = Recorder(self.executor, "compat" if program.is_compat else "strict")
        start = time.monotonic()
        (judgement,) = Judge(recorder, limits).judge_programs([task], [source])
        assert time.monotonic() - start < 30 + 3 * limits.wall_seconds, "it kept the host"
        execution = recorder.last
        if execution is None:  # the judge saw that it cannot be run; the sandbox must stand it all the same
            calls = tuple(Call(function="f", args=(x,)) for x in INPUTS)
            cases = {"stdin_cases": ("1\n",)} if program.mode == "stdio" else {"calls": calls}
            (execution,) = self.executor.run([Job(uid="t", source=source, limits=limits, **cases)])  # type: ignore[arg-type]
        assert self.tier == "process" or self.canaries.secret not in _text(execution), execution
        assert not execution.outcome.is_infrastructure, f"it made itself a fault of the machine: {execution}"
        return judgement, _ending(execution)

    def reply(self, source: str) -> object:
        """The first reply of a program to `f(1)`."""
        limits = Limits(**(SMALL | {"wall_seconds": 60.0}))
        job = Job(uid="t", source=source, calls=(Call(function="f", args=(1,)),), limits=limits)
        (execution,) = self.executor.run([job])
        assert execution.outcome == "ok", execution
        return execution.results[0].raised or execution.results[0].value


def _ending(execution: Execution) -> str:
    if not execution.results:
        return str(execution.outcome)
    first = execution.results[0]
    return f"{execution.outcome}: {f'raised {first.raised.type}' if first.raised else _text(first.value)}"


def _text(value: object) -> str:
    """The value as text; of a number with more digits than python writes, its type."""
    try:
        return str(value)
    except ValueError:
        return type(value).__name__


def _in_tiers() -> Iterator[Any]:
    """Every program in every tier, those last that repeat what another tier shows."""
    for tier in (tier for tier in TIERS if tier != "auto"):
        for category, program in PROGRAMS:
            differs = tier in program.tiers or (tier == "process" and bool(program.works))
            is_short = tier == CONTAINER or differs or zlib.crc32(program.name.encode()) % 10 == 0
            marks = () if is_short else (pytest.mark.long,)
            yield pytest.param(tier, category, program, id=f"{tier}-{category}: {program.name}", marks=marks)


@pytest.fixture(scope="module")
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "namespaces":
            # There programs read the interpreter where it lies; in `namespaces` it is shown to them.
            patch.setattr(zygote_process, "PYTHON", request.getfixturevalue("open_python"))
        try:
            arena = Arena(request.param)
        except SandboxUnavailable as error:
            pytest.skip(f"this machine has no tier {request.param}: {error}")
        with arena.executor:
            yield arena
            arena.canaries.close()


@pytest.mark.parametrize(("arena", "category", "program"), list(_in_tiers()), indirect=["arena"], scope="module")
def test_a_hostile_program_earns_nothing_harms_nothing_and_an_honest_one_passes(
    category: str, program: Program, arena: Arena
) -> None:
    if program.is_compat and arena.tier != "namespaces":
        pytest.skip("profile compat is of tier namespaces alone")
    is_open = arena.tier == "process" and category in CONTAINMENT
    if is_open and program.is_for_root and os.getuid() != 0:
        pytest.skip("tier process would let it harm this very user")
    judgement, ending = arena.judge(program)
    expected = program.tiers.get(arena.tier, program.expect)
    if is_open:
        expected = program.works or (*expected, "ok: WORKED *")
    assert any(fnmatchcase(ending, pattern) for pattern in expected), ending
    assert judgement.passed == (len(INPUTS) if program.is_right else 0), judgement
    assert judgement.status is not Status.INFRA
    damage = arena.canaries.damage()
    if is_open:
        if damage:
            arena.watch_afresh()
    else:
        assert damage == []
    if program.then and not is_open:
        assert arena.reply(program.then) == "clean"
    (honest,) = Judge(arena.executor, Limits(**(SMALL | {"wall_seconds": 60.0}))).judge_programs(
        [SQUARE_TASK], ["def f(x): return x * x + 7"]
    )
    assert honest.passed == len(INPUTS), honest
    if not is_open:
        assert arena.reply(_LEFT) == [], "something is left in the working directory"


@pytest.fixture(scope="module")
def numpy_arena() -> Iterator[Arena]:
    try:
        arena = Arena("namespaces", ("numpy",))
    except SandboxUnavailable as error:
        pytest.skip(f"this machine has no tier namespaces with numpy: {error}")
    with arena.executor:
        yield arena
        arena.canaries.close()


@pytest.mark.parametrize("program", [pytest.param(program, id=program.name) for program in arrays.PROGRAMS])
def test_values_of_numpy_are_judged_by_what_they_are(program: Program, numpy_arena: Arena) -> None:
    judgement, ending = numpy_arena.judge(program)
    assert any(fnmatchcase(ending, pattern) for pattern in program.expect), ending
    assert judgement.passed == (len(INPUTS) if program.is_right else 0), judgement
    assert numpy_arena.canaries.damage() == []


# The way most graders work: the tests run in the program's own process, and exit status 0 means passed.
_NAIVE_GRADER = """
import json, sys
def grade(source, tests):
    names = {"__name__": "solution"}
    exec(compile(source, "<program>", "exec", dont_inherit=True), names)
    for x, expected in tests:
        assert names["f"](x) == expected
grade(*json.load(sys.stdin))
"""
_FORGERS = [
    pytest.param(program, id=f"{category}: {program.name}")
    for category, programs in CATEGORIES.items()
    for program in programs
    if program.forges
]


def _naively_passes(source: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-I", "-c", _NAIVE_GRADER],
        input=json.dumps([source, [[x, SECRET] for x in INPUTS]]).encode(),
        capture_output=True,
        timeout=60,
    )
    return done.returncode == 0


@pytest.mark.parametrize("program", _FORGERS)
def test_a_grader_in_the_program_s_process_would_pay_it(program: Program) -> None:
    assert _naively_passes(program.source)


def test_the_grader_in_the_program_s_process_pays_a_right_answer_and_no_other() -> None:
    assert _naively_passes(f"def f(x): return {SECRET}")
    assert not _naively_passes("def f(x): return 0")


def test_the_suite_is_as_large_as_it_says() -> None:
    hostile = [p for programs in CATEGORIES.values() for p in programs if not p.is_right]
    assert len(hostile) >= 190
    assert len(CATEGORIES["honest"]) >= 15
    assert sum(bool(p.works) for p in hostile) >= 25
    assert sum(p.forges for p in hostile) >= 25
    for category, programs in CATEGORIES.items():
        assert len({program.name for program in programs}) == len(programs), category
