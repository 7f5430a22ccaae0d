from __future__ import annotations

import dataclasses
import json

import pytest

from coupled.sandbox import CallResult, Execution, Isolation, Job, Outcome, ProcessExecutor, self_check


def test_every_probe_holds_on_this_machine_as_far_as_the_isolation_goes(executor: ProcessExecutor) -> None:
    checks = self_check(executor)
    assert [check.name for check in checks] == [
        "honest program", "infinite loop", "memory hog", "fork bomb", "huge file", "network", "exit with status 0",
        "honest program afterwards",
    ]  # fmt: skip
    allowed = {"network"} if executor.isolation().has_network else set()
    assert {check.name for check in checks if not check.held} <= allowed, checks


class Fake:
    """Gives every job the same execution: a sandbox that lets the probe through, or does not run it."""

    def __init__(self, outcome: Outcome, value: object) -> None:
        self.outcome, self.value = outcome, value

    def run(self, jobs: list[Job]) -> list[Execution]:
        results = (CallResult(value=self.value),)
        return [Execution(uid=job.uid, outcome=self.outcome, results=results, tier="fake") for job in jobs]

    def isolation(self) -> Isolation:
        raise NotImplementedError

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("outcome", "value", "held"),
    [
        (Outcome.OK, "connected", set()),
        (Outcome.OK, 64, set()),
        (Outcome.OK, 1 << 26, set()),
        (Outcome.SANDBOX_ERROR, None, set()),
        (Outcome.OK, 10, {"honest program", "honest program afterwards"}),
    ],
)
def test_a_sandbox_that_holds_nothing_passes_no_probe(outcome: Outcome, value: object, held: set[str]) -> None:
    checks = self_check(Fake(outcome, value))  # type: ignore[arg-type]
    assert {check.name for check in checks if check.held} == held


def test_the_isolation_in_effect_can_be_written_as_json(executor: ProcessExecutor) -> None:
    record = json.loads(json.dumps(dataclasses.asdict(executor.isolation())))
    assert record["tier"] == "process"
    assert record["user"].startswith("uid ")
    assert isinstance(record["has_network"], bool)
