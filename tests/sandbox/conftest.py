from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from coupled.sandbox import Call, Execution, Job, Limits, ProcessExecutor, open_executor


@pytest.fixture(scope="session")
def executor() -> Iterator[ProcessExecutor]:
    """One worker, so that every program runs where the one before it ran."""
    with open_executor(num_workers=1) as executor:
        yield executor


Run = Callable[..., Execution]


@pytest.fixture
def run(executor: ProcessExecutor) -> Run:
    """Run a source whose `f` is called with 1, 2 and 3 (or with `calls`) under small limits."""

    def run(source: str, *args: tuple[object, ...], setup: str = "", **limits: float) -> Execution:
        calls = tuple(Call(function="f", args=call) for call in args or ((1,), (2,), (3,)))
        small = {"cpu_seconds": 1, "wall_seconds": 20.0, "memory_mb": 128, "output_kb": 1024, "file_kb": 1024}
        job = Job(uid="t", source=source, setup=setup, calls=calls, limits=Limits(**(small | limits)))  # type: ignore[arg-type]
        return executor.run([job])[0]

    return run
