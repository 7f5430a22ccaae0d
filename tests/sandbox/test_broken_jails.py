"""A jail broken on purpose, one measure at a time: the self-check must notice each.

The files that make up the jail are copied, one line is changed, and the worker is pointed at the copy.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coupled.sandbox import Limits, LocalExecutor, SandboxUnavailable, conversation, run_self_check, zygote_process
from coupled.sandbox import executor as executor_module
from coupled.sandbox import self_check as check_module

JAIL = Path(__file__).parents[2] / "sandbox/jail"
PARTS = ("zygote", "child", "codec", "confine", "seccomp", "landlock")
BEFORE_PACKAGES = "    for path in packages:\n        here"
NPROC = '_num_tasks(here, limits["max_processes"])'

Break = Callable[..., set[str]]

# name: (changes as (text, replacement), probes that must notice)
BROKEN: dict[str, tuple[list[tuple[str, str]], set[str]]] = {
    "no filter of a program's own": (
        [("here.filters[profile].load()", "pass")],
        {"new process", "other program", "network", "new user namespace", "mount"},
    ),
    "no base filter": ([("    base.load()", "    pass")], {"trace", "io_uring", "kernel keys", "memory file"}),
    "no filter at all": (
        [("    base.load()", "    pass"), ("here.filters[profile].load()", "pass")],
        {"new process", "network", "trace", "foreign system call"},
    ),
    "the host's / in the root": (
        [(BEFORE_PACKAGES, "    _show('/', f'{base}/mnt')\n" + BEFORE_PACKAGES)],
        {"root directory", "mount table"},
    ),
    "the host's / where nobody looks": (
        [(BEFORE_PACKAGES, "    _show('/', f'{base}/dev/x')\n" + BEFORE_PACKAGES)],
        {"mount table"},
    ),
    "system libraries that can be written": (
        [("_MS_RDONLY | _MS_NOSUID | (0", "_MS_NOSUID | (0")],
        {"mount table", "files beside the scratch directory"},
    ),
    "a whole /proc": (
        [('"/proc", "proc", _PROC_FLAGS, "subset=pid")\n    if', '"/proc", "proc", _PROC_FLAGS)\n    if')],
        {"processes in sight"},
    ),
    "no /proc of its own": ([("    if here.has_proc:\n", "    if 0:\n")], {"processes in sight"}),
    "standard input of all programs": (
        [('null = os.open("/dev/null", os.O_RDWR)', "null = 0")],
        {"flags of the last program"},
    ),
    "locks": ([("for command in _LOCKS:", "for command in ():")], {"locks"}),
    "bytes out of band": (
        [("((3, _MASKED_EQ, _MSG_OOB, _MSG_OOB),)", "((3, _MASKED_EQ, 1 << 30, 1 << 30),)")],
        {"byte out of band"},
    ),
    "no scratch directory": ([('_mount("tmpfs", "/tmp", "tmpfs", ', "abs(0) and (")], {"scratch directory"}),
    "a scratch directory of any size": ([("size=64m,", "size=1g,")], {"scratch directory"}),
    "no limit of threads": ([(NPROC, "10_000")], {"thread bomb"}),
    "no limit of a file's size": ([('limits["file_kb"] << 10', "1 << 40")], {"huge file"}),
    "no limit of memory": (
        [("here.base_as + memory", "1 << 45"), ("here.base_data + memory", "1 << 45")],
        {"memory hog"},
    ),
    "no limit of descriptors": ([('limits["max_files"]', "512")], {"many descriptors"}),
    "no pid namespace": ([('        unshare("pid")\n', "        pass\n")], {"signal to the host"}),
    "no network namespace": (
        [('unshare("mount", "ipc", "network", "pid")', 'unshare("mount", "ipc", "pid")'),
         ('"compat": ("mount", "ipc", "network")', '"compat": ("mount", "ipc")')],
        {"the host's listeners"},
    ),
}  # fmt: skip


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Break:
    """Break the jail and return the names of the probes that were not held: `broken("namespaces", [(text, other)])`."""

    def check(tier: str, changes: list[tuple[str, str]]) -> set[str]:
        left = list(changes)
        for part in PARTS:
            source = (JAIL / f"{part}.py").read_text()
            for change in changes:
                if change[0] in source:
                    assert source.count(change[0]) == 1, f"not clear which {change[0]!r} is meant"
                    source = source.replace(*change)
                    left.remove(change)
            (tmp_path / f"{part}.py").write_text(source)
        assert left == [], "the measure is not where this test looks for it"
        monkeypatch.setattr(zygote_process, "_ZYGOTE", tmp_path / "zygote.py")
        with LocalExecutor(tier) as executor:
            return {check.name for check in run_self_check(executor) if not check.held}

    return check


@pytest.mark.parametrize("name", BROKEN)
def test_the_self_check_notices_what_is_missing_from_namespaces(
    name: str, broken: Break, executor: LocalExecutor
) -> None:
    if name == "no pid namespace" and os.getuid() != 0:
        pytest.skip("without root a program in the worker's pid namespace cannot be told from one in its own by uid")
    changes, noticed = BROKEN[name]
    assert noticed <= broken("namespaces", changes)


def test_the_self_check_notices_programs_that_run_as_root(broken: Break, executor: LocalExecutor) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: another user has nothing to drop")
    assert "privileges" in broken(
        "namespaces", [("    if here.drops_user:\n        os.setgroups", "    if 0:\n        os.setgroups")]
    )


def test_the_self_check_notices_that_processor_time_is_not_limited(
    broken: Break, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "_LIMITS", dataclasses.replace(check_module._LIMITS, wall_seconds=5.0))
    assert broken("namespaces", [('resource.RLIMIT_CPU: limits["cpu_seconds"]', "resource.RLIMIT_CPU: 999")]) == {
        "infinite loop"
    }


def test_the_self_check_notices_that_wall_time_is_not_limited(
    executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = conversation._attend

    def patient(*args: object) -> object:
        slow = [dataclasses.replace(arg, wall_seconds=60.0) if isinstance(arg, Limits) else arg for arg in args]
        return attend(*slow)  # type: ignore[arg-type]

    monkeypatch.setattr(conversation, "_attend", patient)
    monkeypatch.setattr(check_module, "_SLEEP", check_module._SLEEP.replace("600", "3"))  # or it would be long
    assert {check.name for check in run_self_check(executor) if not check.held} == {"sleep"}


def test_the_self_check_notices_groups_of_the_host(broken: Break, executor: LocalExecutor) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root: another user cannot give up its groups")
    assert "privileges" in broken("namespaces", [("os.setgroups([])", "os.setgroups([0])")])


def test_the_self_check_reads_files_that_no_private_directory_hides(
    broken: Break, open_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(zygote_process, "PYTHON", open_python)
    monkeypatch.setattr(check_module, "_open_directory", lambda: str(tmp_path))
    readable = ("= [path for path in here.shown if path not in _DEVICES]", '= ["/"]')
    assert "file of the host" in broken("landlock", [readable])


@pytest.mark.parametrize(
    ("changes", "noticed"),
    [
        ([("landlock.restrict(ruleset)", "pass")], {"file of the host", "files in sight", "new file"}),
        (
            [("files=_known(_FILE_RIGHTS, known)", "files=_known(_FILE_RIGHTS, known) & ~0x102"),
             ("_allow(fd, path, _READ_FILE | _WRITE_FILE)", "_allow(fd, path, _READ_FILE)")],
            {"new file", "files beside the scratch directory"},
        ),
        ([("here.filters[profile].load()", "pass")], {"new process", "network", "new user namespace"}),
        ([("    base.load()", "    pass")], {"trace", "io_uring", "kernel keys"}),
        ([("= [path for path in here.shown if path not in _DEVICES]", '= ["/"]')], {"file of the host"}),
    ],
)  # fmt: skip
def test_the_self_check_notices_what_is_missing_from_landlock(
    changes: list[tuple[str, str]],
    noticed: set[str],
    broken: Break,
    open_python: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zygote_process, "PYTHON", open_python)
    assert noticed <= broken("landlock", changes)


def test_a_tier_that_fails_its_self_check_is_not_opened_and_the_next_one_is_tried(
    tmp_path: Path, open_python: str, monkeypatch: pytest.MonkeyPatch, executor: LocalExecutor
) -> None:
    for part in PARTS:
        shutil.copy(JAIL / f"{part}.py", tmp_path)
    source = (tmp_path / "confine.py").read_text()
    (tmp_path / "confine.py").write_text(source.replace("size=64m,", "size=1g,"))
    monkeypatch.setattr(zygote_process, "_ZYGOTE", tmp_path / "zygote.py")
    monkeypatch.setattr(zygote_process, "PYTHON", open_python)
    monkeypatch.setattr(executor_module, "_held", set())
    with pytest.raises(SandboxUnavailable, match="'namespaces' does not hold on this machine: scratch directory"):
        executor_module.open_executor("namespaces")
    with executor_module.open_executor() as second:
        assert second.isolation().tier == "landlock"
        assert "scratch directory" in second.isolation().notes[0]
