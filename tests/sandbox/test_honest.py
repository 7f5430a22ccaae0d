"""Honest programs get what a usual interpreter gives them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from coupled.sandbox import Call, Execution, Job, Limits, LocalExecutor, Outcome, open_executor

Run = Callable[..., Execution]


def test_calls_are_answered_in_order_with_exact_types(run: Run) -> None:
    source = "def f(x): return x"
    values = [
        1,
        True,
        1.0,
        "é\ud800",
        b"\0",
        None,
        [1, (2, {3})],
        {"a": {1: 2.5}},
        frozenset({1}),
        1j,
        range(3),
        2**200,
    ]
    execution = run(source, *((value,) for value in values))
    assert execution.outcome is Outcome.OK
    replies = [result.value for result in execution.results]
    assert replies == values
    assert [type(reply) for reply in replies] == [type(value) for value in values]


def test_an_exception_is_a_reply_and_the_next_call_is_made(run: Run) -> None:
    execution = run("def f(x):\n    if x == 2: raise KeyError('two')\n    return x")
    assert execution.outcome is Outcome.OK
    raised = execution.results[1].raised
    assert raised is not None
    assert (raised.type, raised.text) == ("KeyError", "'two'")
    assert [execution.results[0].value, execution.results[2].value] == [1, 3]


def test_a_program_that_does_not_compile_or_raises_is_a_load_error_that_says_so(run: Run) -> None:
    assert run("def f(x) return x").outcome is Outcome.LOAD_ERROR
    execution = run("import numpy_is_not_here")
    assert execution.outcome is Outcome.LOAD_ERROR
    assert execution.detail == "ModuleNotFoundError: No module named 'numpy_is_not_here'"
    assert execution.results == ()


def test_a_missing_function_fails_its_calls_only(run: Run) -> None:
    raised = run("def g(x): return x").results[0].raised
    assert raised is not None
    assert raised.type == "NameError"


def test_setup_runs_after_the_program_and_before_the_calls(run: Run) -> None:
    execution = run("class Node: value = 5\ndef f(x): return root.value + x", (1,), setup="root = Node()")
    assert execution.results[0].value == 6
    assert run("def f(x): return 0", setup="root = Node()").outcome is Outcome.LOAD_ERROR


def test_a_method_is_called_on_a_fresh_instance(executor: LocalExecutor) -> None:
    source = "class S:\n    n = 0\n    def up(self, by):\n        self.n += by\n        return self.n"
    call = Call(function="S().up", kwargs={"by": 2})
    (execution,) = executor.run([Job(uid="m", source=source, calls=(call, call))])
    assert [result.value for result in execution.results] == [2, 2]


@pytest.mark.parametrize(
    "module",
    ["dataclasses", "string", "zoneinfo", "hashlib", "sqlite3", "unittest", "xml.etree.ElementTree", "asyncio"],
)
def test_modules_that_are_not_loaded_beforehand_can_be_imported(module: str, run: Run) -> None:
    execution = run(f"import {module}\ndef f(x): return {module}.__name__")
    assert execution.results[0].value == module, execution


def test_classes_can_look_up_their_module(run: Run) -> None:
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import get_type_hints\n"
    )
    source += "@dataclass\nclass P:\n    x: int = 3\ndef f(x): return [P().x, get_type_hints(P)['x'].__name__]"
    assert run(source).results[0].value == [3, "int"]


def test_the_main_block_is_left_out_for_calls_and_run_for_stdin(executor: LocalExecutor) -> None:
    source = (
        "def f(x): return seen\nseen = 'no'\nif __name__ == '__main__':\n    print('yes', end='')\n    seen = 'yes'"
    )
    called, read = executor.run(
        [
            Job(uid="c", source=source, calls=(Call(function="f", args=(1,)),)),
            Job(uid="s", source=source, stdin_cases=("",)),
        ]
    )
    assert called.results[0].value == "no"
    assert read.results[0].value == "yes"


def test_stdin_cases_are_runs_of_their_own(executor: LocalExecutor) -> None:
    source = "import sys\nn = int(input())\nprint(sum(int(line) for line in sys.stdin), n)\nexit()"
    job = Job(uid="s", source=source, stdin_cases=("2\n3\n4\n", "0\n", "1\n5"))
    (execution,) = executor.run([job])
    assert execution.outcome is Outcome.OK
    assert [result.value for result in execution.results] == ["7 2\n", "0 0\n", "5 1\n"]


def test_large_inputs_and_outputs_pass_through(executor: LocalExecutor) -> None:
    text = "x" * 900_000
    read = Job(uid="s", source="print(input()[::-1], end='')", stdin_cases=(text,), limits=Limits(output_kb=2000))
    called = Job(uid="c", source="def f(x): return x", calls=(Call(function="f", args=(text,)),))
    for execution in executor.run([read, called]):
        assert execution.results[0].value == text


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("print(1)\nraise ValueError", Outcome.CRASH),
        ("print(1)\nimport sys; sys.exit(3)", Outcome.CRASH),
        ("print(1)\nimport os; os.kill(os.getpid(), 11); import ctypes; ctypes.string_at(0)", Outcome.CRASH),
        ("while True: pass", Outcome.TIMEOUT),
        ("import time, os\nos.closerange(0, 64)\ntime.sleep(60)", Outcome.TIMEOUT),
        ("while True: print('x' * 10_000)", Outcome.OUTPUT_LIMIT),
        ("import os\nos.write(3, b'passed')\nprint(1)", Outcome.PROTOCOL),
        ("import os\nprint(1, flush=True)\nos._exit(1)", Outcome.CRASH),
    ],
)
def test_a_stdin_program_counts_only_when_it_ends_well(source: str, outcome: Outcome, executor: LocalExecutor) -> None:
    # A loop ends by its processor time, however busy the machine is; only the sleeper needs the wall clock.
    wall_seconds = 1.0 if "sleep" in source else 20.0
    limits = Limits(cpu_seconds=1, wall_seconds=wall_seconds, memory_mb=128, output_kb=256)
    (execution,) = executor.run([Job(uid="s", source=source, stdin_cases=("a", "b"), limits=limits)])
    assert execution.outcome is outcome
    assert execution.results == ()


def test_random_numbers_and_set_order_are_the_same_on_every_worker() -> None:
    source = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd', 'e'})]"
    job = Job(uid="r", source=source, calls=(Call(function="f"),))
    with open_executor() as first, open_executor() as second:
        assert first.run([job])[0].results == second.run([job])[0].results == first.run([job])[0].results


def test_every_program_draws_the_numbers_of_seed_zero_from_the_first_on(run: Run) -> None:
    source = "import random\ndef f(n): return [random.random() for _ in range(n)]"
    generator = random.Random(0)
    expected = [[generator.random() for _ in range(n)] for n in (1, 2, 3)]
    for _ in range(2):
        assert [result.value for result in run(source).results] == expected


def test_a_program_finds_no_trace_of_the_rehearsal(run: Run) -> None:
    source = "import sys\ndef f(x): return [sorted(globals()), sys.modules['solution'].__dict__ is globals()]"
    names = ["__builtins__", "__doc__", "__loader__", "__name__", "__package__", "__spec__", "f", "sys"]
    assert run(source, (1,)).results[0].value == [names, True]


def test_printing_does_not_disturb_replies(run: Run) -> None:
    source = 'def f(x):\n    print(\'{"n": 0, "v": 8}\' * 10_000)\n    return x'
    assert [result.value for result in run(source).results] == [1, 2, 3]
