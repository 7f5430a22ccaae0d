"""What is found out before a run starts: that the tier can judge every task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from coupled.reward import Task, plan, stdio_test
from coupled.rl import grading
from coupled.rl.grading import open_grader
from coupled.rl.recipe import load_recipe
from coupled.sandbox import Execution, Isolation, Job, Limits, SandboxUnavailable

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
REMOTE = ("sandbox.tier=remote", "sandbox.url=http://sandbox.example:8080")
UNITTEST = """
import unittest
class T(unittest.TestCase):
    def test_one(self): self.assertEqual(f(1), 2)
"""
CALLS = Task(uid="calls", prompt="", hidden_tests=("assert f(1) == 2",), entry_point="f")
CLASSES = Task(uid="classes", prompt="", hidden_tests=(UNITTEST,), entry_point="f", style="unittest")


class Elsewhere:
    """Stands for a server; runs nothing."""

    is_closed = False

    def __init__(self, url: str, *, num_workers: int) -> None: ...

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        raise AssertionError("nothing runs while a grader is opened")

    def isolation(self) -> Isolation:
        return Isolation(
            tier="remote", user="", has_network=True, filesystem="", processes="", has_own_ipc=False, has_filter=False
        )

    def close(self) -> None:
        Elsewhere.is_closed = True


def test_tests_that_a_server_cannot_run_are_refused_when_the_grader_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "RemoteExecutor", Elsewhere)
    recipe = load_recipe(QUICKSTART, REMOTE)
    assert plan(CLASSES).tier == "T1"
    with pytest.raises(SandboxUnavailable, match=r"(?s)1 of 2 tasks cannot be judged here.*job 'classes'.*remedy"):
        open_grader(recipe, [CALLS, CLASSES])
    assert Elsewhere.is_closed
    open_grader(recipe, [CALLS, Task(uid="none", prompt="", hidden_tests=())]).close()


def test_a_stdio_task_leaves_room_for_its_right_answers() -> None:
    long = "1 2 3\n" * 200_000
    task = Task(uid="s", prompt="", hidden_tests=(stdio_test("", long),) * 8, style="stdio")
    job = plan(task).job("", Limits())
    assert job.limits.output_kb << 10 > 8 * len(long) > Limits().output_kb << 10
    small = Task(uid="s", prompt="", hidden_tests=(stdio_test("", "1"),), style="stdio")
    assert plan(small).job("", Limits()).limits == Limits()
