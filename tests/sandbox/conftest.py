from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coupled.sandbox import Call, Execution, Job, Limits, LocalExecutor, SandboxUnavailable, open_executor


@pytest.fixture(scope="session")
def executor() -> Iterator[LocalExecutor]:
    """One worker of tier `namespaces`, so that every program runs where the one before it ran."""
    try:
        executor = open_executor("namespaces")
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with executor:
        yield executor


@pytest.fixture(scope="session")
def open_python() -> str:
    """An interpreter that an unprivileged user may read, as tier `landlock` needs it when the host is root."""
    if os.getuid() != 0:
        return sys.executable
    ask = "import os, sys; os.setuid(65534); print(os.access(sys.executable, os.X_OK) and sys.version_info >= (3, 11))"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(python):
            asked = subprocess.run([python, "-c", ask], capture_output=True, text=True)
            if asked.stdout.strip() == "True":
                return python
    pytest.skip("needs an interpreter of 3.11 or newer that everybody may read")


@pytest.fixture
def own_temporary_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of this test and the processes that it starts: other sandboxes leave nothing in it."""
    folder = Path(tempfile.mkdtemp(prefix="own-"))
    folder.chmod(0o711)  # programs of another user pass through it
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


Run = Callable[..., Execution]


@pytest.fixture
def run(executor: LocalExecutor) -> Run:
    """Run a source whose `f` is called with 1, 2 and 3 (or with `calls`) under small limits."""

    def run(source: str, *args: tuple[object, ...], setup: str = "", **limits: float) -> Execution:
        calls = tuple(Call(function="f", args=call) for call in args or ((1,), (2,), (3,)))
        small = {"cpu_seconds": 1, "wall_seconds": 20.0, "memory_mb": 128, "output_kb": 1024, "file_kb": 1024}
        job = Job(uid="t", source=source, setup=setup, calls=calls, limits=Limits(**(small | limits)))  # type: ignore[arg-type]
        return executor.run([job])[0]

    return run
