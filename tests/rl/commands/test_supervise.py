"""The supervisor: what is resumed, what is not, and how often."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coupled.rl.commands.supervise import MAX_RESTARTS, supervise

PROGRAM = """
import os, signal, sys
log, ends = sys.argv[1], sys.argv[2].split(",")
with open(log, "a") as out:
    out.write(sys.argv[3] + "\\n")
end = ends[len(open(log).readlines()) - 1]
os.kill(os.getpid(), int(end[1:])) if end.startswith("-") else sys.exit(int(end))
"""


def run(folder: Path, ends: str) -> tuple[int, list[str], list[str]]:
    """Exit status, what was started, and what was said, of a command that ends in these ways one after the other."""
    said: list[str] = []
    first, again = ([sys.executable, "-c", PROGRAM, str(folder / "log"), ends, which] for which in ("first", "again"))
    status = supervise(first, again, said.append, backoff_seconds=0.0)
    return status, (folder / "log").read_text().split(), said


def test_a_run_that_is_interrupted_is_resumed_until_it_is_done(tmp_path: Path) -> None:
    status, started, said = run(tmp_path, "75,-9,-11,0")
    assert status == 0
    assert started == ["first", "again", "again", "again"]
    assert "ended with status 75" in said[0]
    assert "ended by signal 9" in said[1]


@pytest.mark.parametrize(("end", "status"), [("0", 0), ("2", 2), ("70", 70), ("130", 130), ("-15", 143)])
def test_what_resuming_cannot_mend_is_not_resumed(tmp_path: Path, end: str, status: int) -> None:
    assert run(tmp_path, end) == (status, ["first"], [])


def test_counting_begins_again_after_a_new_checkpoint_and_not_with_time(tmp_path: Path) -> None:
    ends = ["75"] * (MAX_RESTARTS + 2) + ["0"]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "log"), ",".join(ends), "again"]
    left = iter([*[[]] * 5, *[["step_000001"]] * 100])
    status = supervise(command, command, lambda _: None, committed=lambda: frozenset(next(left)), backoff_seconds=0.0)
    assert status == 0, "the third process left a checkpoint"


def test_it_gives_up_in_the_end(tmp_path: Path) -> None:
    status, started, said = run(tmp_path, ",".join(["75"] * 10))
    assert status == 75
    assert len(started) == 1 + MAX_RESTARTS
    assert len(said) == MAX_RESTARTS
