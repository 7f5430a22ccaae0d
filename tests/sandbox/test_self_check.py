from __future__ import annotations

import dataclasses
import json

import pytest

from coupled.sandbox import (
    CallResult,
    Execution,
    Isolation,
    Job,
    LocalExecutor,
    Outcome,
    run_self_check,
    zygote_process,
)
from coupled.sandbox.self_check import _foreign_mounts

EVERYWHERE = [
    "infinite loop", "sleep", "memory hog", "many descriptors", "exit with status 0", "flood of output", "privileges",
    "thread bomb", "new process", "other program", "network", "memory file", "shared memory", "locks",
    "byte out of band", "flags for the next program", "flags of the last program", "new user namespace", "mount",
    "io_uring", "trace", "kernel keys", "foreign system call",
]  # fmt: skip


def test_every_probe_is_stopped_by_namespaces(executor: LocalExecutor) -> None:
    checks = run_self_check(executor)
    assert not [check for check in checks if not check.held]
    names = [check.name for check in checks]
    assert names[0] == "honest program"
    assert names[-1] == "honest program afterwards"
    assert set(EVERYWHERE) <= set(names)
    assert {
        "huge file", "scratch directory", "root directory", "processes in sight", "the host's listeners",
        "file of the host", "files beside the scratch directory",
    } <= set(names)  # fmt: skip


def test_every_probe_is_stopped_by_landlock(open_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote_process, "PYTHON", open_python)
    with LocalExecutor("landlock") as executor:
        checks = run_self_check(executor)
    assert not [check for check in checks if not check.held]
    assert {*EVERYWHERE, "new file", "files in sight", "file of the host"} <= {check.name for check in checks}


class Fake:
    """Gives every job the same execution: a sandbox that lets the probe through, or does not run it."""

    def __init__(self, tier: str, outcome: Outcome, value: object) -> None:
        self.tier, self.outcome, self.value = tier, outcome, value

    def run(self, jobs: list[Job]) -> list[Execution]:
        results = (CallResult(value=self.value),)
        return [Execution(uid=job.uid, outcome=self.outcome, results=results, tier=self.tier) for job in jobs]

    def isolation(self) -> Isolation:
        return Isolation(tier=self.tier, user="", has_network=False, filesystem="", processes="", has_filter=True)

    def close(self) -> None: ...


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
@pytest.mark.parametrize(
    ("outcome", "value", "held"),
    [
        (Outcome.OK, "connected", set()),
        (Outcome.OK, 64, set()),
        (Outcome.OK, True, set()),
        (Outcome.OK, "48 45 0:48 / /mnt ro,nosuid - tmpfs tmpfs rw", set()),
        (Outcome.OK, [], {"file of the last program"}),
        (Outcome.OK, None, set()),
        (Outcome.SANDBOX_ERROR, None, set()),
        (Outcome.OVERLOADED, None, set()),
        (Outcome.VIOLATION, None, set()),
        (Outcome.OK, 10, {"honest program", "honest program afterwards"}),
    ],
)
def test_a_sandbox_that_holds_nothing_passes_no_probe(
    tier: str, outcome: Outcome, value: object, held: set[str]
) -> None:
    checks = run_self_check(Fake(tier, outcome, value))  # type: ignore[arg-type]
    assert {check.name for check in checks if check.held} == (held if tier == "namespaces" or value else set())


class Busy(Fake):
    """Reports the machine as too busy for the first tries of every program."""

    def __init__(self, tier: str, num_busy: int) -> None:
        super().__init__(tier, Outcome.TIMEOUT, None)
        self.num_busy = num_busy
        self.walls: list[float] = []

    def run(self, jobs: list[Job]) -> list[Execution]:
        (execution,) = super().run(jobs)
        if jobs[0].uid != "sleep":
            return [execution]
        self.walls.append(jobs[0].limits.wall_seconds)
        return (
            [dataclasses.replace(execution, outcome=Outcome.OVERLOADED)]
            if len(self.walls) <= self.num_busy
            else [execution]
        )


@pytest.mark.parametrize(("num_busy", "held"), [(0, True), (2, True), (3, False)])
def test_a_probe_on_a_busy_machine_is_given_more_time(num_busy: int, held: bool) -> None:
    busy = Busy("landlock", num_busy)
    checks = {check.name: check.held for check in run_self_check(busy)}  # type: ignore[arg-type]
    assert checks["sleep"] is held
    assert busy.walls == pytest.approx([0.4, 2.0, 10.0][: num_busy + 1])


def test_a_mount_that_should_not_be_there_is_found_in_a_program_s_table() -> None:
    good = """\
48 45 0:48 / / ro,nosuid,nodev,relatime - tmpfs tmpfs rw
49 48 254:0 /usr /usr ro,nosuid,nodev,relatime - ext4 /dev/vda rw
50 48 0:50 / /tmp rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw
51 48 0:51 / /proc ro,nosuid,nodev,noexec,relatime - proc proc rw
"""
    assert _foreign_mounts(good, ("/usr",)) == []
    for line, extra in {
        "52 48 254:0 / /mnt ro,nosuid,nodev - ext4 /dev/vda rw": True,
        "52 48 254:0 / /usr/coupled-hidden ro,nosuid,nodev - ext4 /dev/vda rw": True,
        "52 48 254:0 / /tmp/host rw,nosuid,nodev,noexec - ext4 /dev/vda rw": True,
    }.items():
        assert bool(_foreign_mounts(good + line + "\n", ("/usr",))) is extra
    assert _foreign_mounts(good.replace("/usr ro", "/usr rw"), ("/usr",)) != []
    assert _foreign_mounts(good.replace("/tmp rw,nosuid", "/tmp rw"), ("/usr",)) != []
    assert _foreign_mounts("", ("/usr",)) == ["no mount table"]
    assert _foreign_mounts(None, ("/usr",)) == ["no mount table"]


def test_the_isolation_in_effect_can_be_written_as_json(executor: LocalExecutor) -> None:
    record = json.loads(json.dumps(dataclasses.asdict(executor.isolation())))
    assert record["tier"] == "namespaces"
    assert record["user"].startswith("uid ")
    assert record["has_network"] is False
    assert record["has_filter"] is True
    assert "/usr" in record["shown"]
