"""Detects a worker that lies: now and then it gets a program whose answers the host knows.

Results leave the sandbox only after the worker that made them has answered such a canary: after at most
`NUM_BETWEEN` programs, after every outcome that suggests an attack, and at the end of a batch. To the worker a
canary is a job like any other: ordinary code, names and arguments drawn anew each time, limits and kind of the
job before it. A worker that answers wrongly is replaced, and what it did since its last good canary is run again,
one program at a time with a canary after each; a program that twice spoils a new worker has broken the rules.
A canary that the sandbox failed to run proves nothing and blames no program: the results before it are left out.

Not detected: a worker that lies about some programs only and recognises canaries. Only a program that broke out of
its jail can make a worker lie so; canaries are the second line of defence.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from coupled.sandbox.types import Call, Execution, Job, Limits, Outcome

NUM_BETWEEN = 32
"""Programs that one worker runs between two canaries, at most."""
SUSPICIOUS = frozenset({Outcome.VIOLATION, Outcome.PROTOCOL, Outcome.CRASH})
"""After these a canary comes at once."""
MAY_BE_BUSY = frozenset({Outcome.TIMEOUT, Outcome.KILLED})
"""A canary that ends so may have met a busy or crowded machine: a second one is run before the worker is blamed."""
_NUM_TRIES = 2
_NAMES = [
    "total",
    "count_items",
    "solve",
    "combine",
    "check_values",
    "get_result",
    "compute",
    "merge_all",
    "process",
    "transform",
]
_ARGUMENTS = ["values", "items", "data", "numbers", "xs", "arr", "nums", "sequence"]
_NO_CANARY = "the sandbox could not run a program with known answers, so nothing vouches for its worker"
_WRONG_ANSWERS = "a new worker gives wrong answers to programs with known ones: do not trust this machine"
_draw = secrets.SystemRandom()
_log = logging.getLogger(__name__)


class Restartable(Protocol):
    """A worker that can be replaced by a new one of its kind."""

    @property
    def incarnation(self) -> int:
        """A number that changes with every replacement."""
        ...

    def restart(self) -> None:
        """Replace it."""
        ...


W = TypeVar("W", bound=Restartable)


@dataclass(slots=True)
class Slot:
    """One job of a batch and, once it was run, its execution."""

    job: Job
    execution: Execution | None = None
    incarnation: int = -1
    """Incarnation of the worker that ran it."""

    @property
    def result(self) -> Execution:
        """Execution of the job, which must have been run."""
        assert self.execution is not None, f"job {self.job.uid!r} was not run"
        return self.execution


def run_watched(worker: W, todo: deque[Slot], run: Callable[[W, Job], Execution]) -> None:
    """Take jobs off `todo`, at most `NUM_BETWEEN`, run them on the worker, and prove it afterwards.

    When it returns every slot taken has an execution: made by a worker that answered a canary since,
    VIOLATION for a program that spoils workers, or SANDBOX_ERROR when a new worker answers wrongly too, or
    no canary could be run.
    """
    unproven: list[Slot] = []
    while len(unproven) < NUM_BETWEEN:
        try:
            slot = todo.popleft()
        except IndexError:
            break
        slot.execution = run(worker, slot.job)
        slot.incarnation = worker.incarnation
        if not slot.execution.outcome.is_infrastructure:  # which claims nothing
            unproven.append(slot)
            if slot.execution.outcome in SUSPICIOUS:
                break
    if not unproven:
        return
    answers = _answers(worker, unproven[-1].job, run)
    if answers is None:
        for slot in unproven:
            _leave_out(slot, _NO_CANARY)
        return
    if answers:
        unproven = [slot for slot in unproven if slot.incarnation != worker.incarnation and not _is_lowest(slot)]
    else:
        _retire(worker, f"one of {len(unproven)} programs was its last")
    for slot in unproven:
        _run_alone(worker, slot, run)


def _run_alone(worker: W, slot: Slot, run: Callable[[W, Job], Execution]) -> None:
    """Run one job between two canaries, so that a wrong answer has one possible cause."""
    for _ in range(_NUM_TRIES):
        answers = _answers(worker, slot.job, run)
        if answers is False:
            _retire(worker, "a new one is tried")
            answers = _answers(worker, slot.job, run)
            if answers is False:
                return _leave_out(slot, _WRONG_ANSWERS)
        if answers is None:
            return _leave_out(slot, _NO_CANARY)
        slot.execution = run(worker, slot.job)
        slot.incarnation = worker.incarnation
        if slot.execution.outcome.is_infrastructure:
            return None
        answers = _answers(worker, slot.job, run)
        if answers is None:
            return _leave_out(slot, _NO_CANARY)
        if not answers:
            _retire(worker, "a single program was its last")
        elif slot.incarnation == worker.incarnation or _is_lowest(slot):
            return None
    slot.execution = dataclasses.replace(
        slot.result,
        outcome=Outcome.VIOLATION,
        results=(),
        detail=f"spoiled {_NUM_TRIES} new workers, one after the other",
    )
    return None


def _leave_out(slot: Slot, why: str) -> None:
    """Replace the result of the slot by one that claims nothing about its program."""
    slot.execution = dataclasses.replace(slot.result, outcome=Outcome.SANDBOX_ERROR, results=(), detail=why)


def _is_lowest(slot: Slot) -> bool:
    """True when no lie can have made the result better than it is."""
    return slot.result.outcome is Outcome.VIOLATION


def _retire(worker: Restartable, why: str) -> None:
    _log.warning("a worker of the sandbox gave a wrong answer to a known program and is replaced: %s", why)
    worker.restart()


def _answers(worker: W, like: Job, run: Callable[[W, Job], Execution]) -> bool | None:
    """Run a canary; True when every value is right, None when the sandbox could not run it."""
    for _ in range(_NUM_TRIES):
        job, expected = canary(like)
        execution = run(worker, job)
        if execution.outcome not in MAY_BE_BUSY:
            break
    if execution.outcome.is_infrastructure:
        return None
    replies = [(type(result.value), result.value) for result in execution.results if result.raised is None]
    return execution.outcome is Outcome.OK and replies == [(type(value), value) for value in expected]


def canary(like: Job) -> tuple[Job, list[object]]:
    """Return a new program with the values it must give, of the kind of `like` and under limits like its.

    No value is 0 or empty, and the values of one canary differ: a worker that knows neither program nor arguments
    and gives the same answer to everything is never right.
    """
    limits = _roomy(like.limits)
    if like.stdin_cases:
        source, text, expected = _draw.choice((_read_sum, _read_words))()
        return Job(uid=like.uid, source=source, stdin_cases=(text,), limits=limits, profile=like.profile), [expected]
    while True:
        source, name, cases = _draw.choice((_filtered_sum, _sorted_pairs, _letters, _divisor))()
        if _are_telling([value for _, value in cases]):
            break
    calls = tuple(Call(function=name, args=args) for args, _ in cases)
    job = Job(uid=like.uid, source=source, calls=calls, limits=limits, profile=like.profile)
    return job, [value for _, value in cases]


def _are_telling(values: list[object]) -> bool:
    """Return whether no value could be given by chance: none is empty or 0, and they are not all the same."""
    return all(values) and any(value != values[0] for value in values)


def _roomy(limits: Limits) -> Limits:
    """Return the same limits, unless they are so tight that an honest program might break them on a busy machine."""
    return dataclasses.replace(
        limits,
        wall_seconds=limits.wall_seconds if limits.wall_seconds >= 5.0 else 30.0,
        memory_mb=max(limits.memory_mb, 64),
        output_kb=max(limits.output_kb, 64),
    )


Cases = list[tuple[tuple[object, ...], object]]


def _integers() -> list[int]:
    return [_draw.randint(-99, 999) for _ in range(_draw.randint(3, 9))]


def _text() -> str:
    return "".join(_draw.choice("abcdefghij klmno") for _ in range(_draw.randint(4, 24)))


def _filtered_sum() -> tuple[str, str, Cases]:
    name, items, divisor = _draw.choice(_NAMES), _draw.choice(_ARGUMENTS), _draw.randint(2, 9)
    source = f"""def {name}({items}):
    result = 0
    for item in {items}:
        if item % {divisor} == 0:
            result += item
        else:
            result -= 1
    return result
"""
    rows = [_integers() for _ in range(_draw.randint(2, 5))]
    return source, name, [((row,), sum(x if x % divisor == 0 else -1 for x in row)) for row in rows]


def _sorted_pairs() -> tuple[str, str, Cases]:
    name, items, factor = _draw.choice(_NAMES), _draw.choice(_ARGUMENTS), _draw.randint(2, 50)
    source = f"""def {name}({items}):
    return sorted([(item * {factor}, index) for index, item in enumerate({items})], reverse=True)
"""
    rows = [_integers() for _ in range(_draw.randint(2, 4))]
    return source, name, [((row,), sorted(((x * factor, i) for i, x in enumerate(row)), reverse=True)) for row in rows]


def _letters() -> tuple[str, str, Cases]:
    name, least = _draw.choice(_NAMES), _draw.randint(1, 3)
    source = f"""from collections import Counter

def {name}(text):
    return {{letter: n for letter, n in Counter(text).items() if n >= {least}}}
"""
    # Without the letter that is there often enough, a short text would have none, and the answer would be {}.
    rows = [_text() + _draw.choice("abcdefghij") * least for _ in range(_draw.randint(2, 4))]
    return source, name, [((row,), {x: row.count(x) for x in row if row.count(x) >= least}) for row in rows]


def _divisor() -> tuple[str, str, Cases]:
    name, extra = _draw.choice(_NAMES), _draw.randint(0, 99)
    source = f"""def {name}(a, b):
    while b:
        a, b = b, a % b
    return a + {extra}
"""
    cases: Cases = []
    for _ in range(_draw.randint(2, 4)):
        common, left, right = _draw.randint(2, 40), _draw.randint(1, 90), _draw.randint(1, 90)
        a, b = common * left, common * right
        cases.append(((a, b), max(d for d in range(1, a + 1) if a % d == b % d == 0) + extra))
    return source, name, cases


def _read_sum() -> tuple[str, str, str]:
    numbers, factor = _integers(), _draw.randint(2, 50)
    source = f"n = int(input())\nvalues = list(map(int, input().split()))\nprint(n, sum(values) * {factor})\n"
    return (
        source,
        f"{len(numbers)}\n{' '.join(map(str, numbers))}\n",
        f"{len(numbers)} {sum(numbers) * factor}\n",
    )


def _read_words() -> tuple[str, str, str]:
    lines = [_text() + _draw.choice("abcdefghij") for _ in range(_draw.randint(2, 5))]
    source = "import sys\nfor line in sys.stdin:\n    print(line.rstrip('\\n')[::-1].upper())\n"
    return source, "".join(f"{line}\n" for line in lines), "".join(f"{line[::-1].upper()}\n" for line in lines)
