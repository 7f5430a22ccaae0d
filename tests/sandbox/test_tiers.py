"""Tiers: which one is opened where, what it refuses, and its error when it cannot hold."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from coupled.sandbox import Call, Job, Limits, LocalExecutor, Outcome, SandboxUnavailable, open_executor, zygote_process
from coupled.sandbox.jail import seccomp as seccomp_module

REPOSITORY = Path(__file__).parents[2]

# Denies what the filter says, as a container's profile does, and opens executors under it.
_CONTAINED = """
import errno, json, sys
from coupled.sandbox import *
from coupled.sandbox.jail import seccomp
denied = json.loads(sys.argv[1])
def rules():
    for call, number, tests in denied:
        yield seccomp._Rule(seccomp._FAIL | number, call, tuple(map(tuple, tests)))
filter = seccomp._compile(seccomp._ALLOW, rules())
import ctypes
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
filter.load()
found = {}
for tier in ("namespaces", "landlock", "auto"):
    try:
        with open_executor(tier) as executor:
            job = Job(uid="a", source="def f(): return 7", calls=(Call(function="f"),))
            (run,) = executor.run([job])
            found[tier] = [run.tier, run.results[0].value, list(executor.isolation().notes)]
    except SandboxUnavailable as error:
        found[tier] = str(error)
print(json.dumps(found))
"""
CLONE_NEW = 0x7E020000
# Docker's default profile for a container without CAP_SYS_ADMIN.
DOCKER = [
    *((call, errno.EPERM, []) for call in ("unshare", "setns", "mount", "umount2", "pivot_root", "mount_setattr")),
    *(("clone", errno.EPERM, [[0, 7, flag, flag]]) for flag in (1 << bit for bit in (17, 25, 26, 27, 28, 29, 30))),
    ("clone3", errno.ENOSYS, []),
]
NO_LANDLOCK = [("landlock_create_ruleset", errno.EOPNOTSUPP, [])]


def _contained(python: str, denied: list[object], tmp_path: Path) -> dict[str, object]:
    package = tmp_path / "coupled"
    package.mkdir()
    (package / "sandbox").symlink_to(REPOSITORY / "sandbox")
    done = subprocess.run(
        [python, "-c", _CONTAINED, json.dumps(denied)],
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_in_a_container_that_refuses_namespaces_landlock_holds_and_says_why_it_is_not_more(
    open_python: str, tmp_path: Path
) -> None:
    found = _contained(open_python, [*DOCKER], tmp_path)
    assert isinstance(found["namespaces"], str)
    assert "Operation not permitted" in found["namespaces"]
    assert "unshare" in found["namespaces"]
    assert "a container's default seccomp profile refuses namespaces" in found["namespaces"]
    assert found["landlock"] == ["landlock", 7, []]
    assert found["auto"] == ["landlock", 7, [found["namespaces"]]]


def test_where_nothing_holds_every_reason_is_named_and_no_program_is_run(open_python: str, tmp_path: Path) -> None:
    found = _contained(open_python, [*DOCKER, *NO_LANDLOCK], tmp_path)
    for tier in ("namespaces", "landlock", "auto"):
        assert isinstance(found[tier], str)
        assert "remedy: " in str(found[tier])
    assert "ask for landlock's version" in str(found["landlock"])
    assert "must be in the boot parameter lsm=" in str(found["landlock"])
    assert "no tier holds untrusted programs on this machine" in str(found["auto"])
    assert str(found["namespaces"]) in str(found["auto"])
    assert str(found["landlock"]) in str(found["auto"])


def test_without_the_filter_library_no_tier_that_needs_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("zygote", "child", "codec", "confine", "seccomp", "landlock"):
        source = (REPOSITORY / "sandbox/jail" / f"{part}.py").read_text()
        (tmp_path / f"{part}.py").write_text(source.replace("libseccomp.so.2", "libseccomp-is-not-here.so.2"))
    monkeypatch.setattr(zygote_process, "_ZYGOTE", tmp_path / "zygote.py")
    for tier in ("namespaces", "landlock", "auto"):
        with pytest.raises(SandboxUnavailable, match=r"libseccomp-is-not-here\.so\.2 is needed to filter system calls"):
            open_executor(tier)


def test_a_tier_that_does_not_contain_is_never_chosen_and_warns_when_asked_for(open_python: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zygote_process, "PYTHON", open_python)
        with pytest.warns(UserWarning, match="does not contain a hostile program"):
            executor = open_executor("process")
        with executor:
            assert executor.isolation().tier == "process"
            assert not executor.isolation().has_filter
            job = Job(uid="c", source="", profile="compat")
            with pytest.raises(SandboxUnavailable, match="'compat' is available in tier 'namespaces' only"):
                executor.run([job])


def test_an_interpreter_that_the_programs_user_cannot_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() != 0 or (os.access("/root", os.X_OK, effective_ids=True) and os.stat("/root").st_mode & 0o005):
        pytest.skip("needs root with a home that nobody else may read")
    if not os.path.realpath(sys.executable).startswith("/root/"):
        pytest.skip("this interpreter is not in root's home")
    with pytest.raises(SandboxUnavailable, match="use an interpreter everybody may read"):
        open_executor("landlock")


def _ask(executor: LocalExecutor, source: str, profile: str = "strict", **limits: int) -> object:
    job = Job(uid="q", source=source, calls=(Call(function="f"),), limits=Limits(**limits), profile=profile)  # type: ignore[arg-type]
    (run,) = executor.run([job])
    assert run.outcome is Outcome.OK, run
    return run.results[0].value if run.results[0].raised is None else run.results[0].raised.type


def test_threads_run_up_to_their_limit_and_processes_in_compat_only(executor: LocalExecutor) -> None:
    pool = "from concurrent.futures import ThreadPoolExecutor\n"
    pool += "def f():\n    with ThreadPoolExecutor(4) as pool: return sum(pool.map(abs, range(10)))"
    assert _ask(executor, pool) == 45
    assert _ask(executor, pool, max_processes=0) == "RuntimeError"
    fork = "import subprocess\ndef f(): return subprocess.check_output(['/bin/echo', 'hi'], text=True)"
    assert _ask(executor, fork) == "PermissionError"
    assert _ask(executor, fork, "compat") == "hi\n"


def test_the_name_localhost_is_known_in_compat_and_the_hosts_names_are_not(executor: LocalExecutor) -> None:
    look_up = "import socket\ndef f(): return socket.gethostbyname('localhost')"
    assert _ask(executor, look_up, "compat") == "127.0.0.1"
    read = "def f(): return open('/etc/hosts').read()"
    assert _ask(executor, read, "compat") == "127.0.0.1 localhost\n::1 localhost\n"
    assert _ask(executor, read) == "FileNotFoundError"
    spoil = "import os\ndef f():\n    os.unlink('/dev/shm/.hosts')\n    return os.path.exists('/etc/hosts')"
    assert _ask(executor, spoil, "compat") is False  # its own, which goes with it
    assert _ask(executor, look_up, "compat") == "127.0.0.1"


def test_a_process_that_a_program_forks_draws_numbers_of_its_own(executor: LocalExecutor) -> None:
    source = """
import os, random, threading
def f():
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, f"{random.random()} {threading.current_thread() is threading.main_thread()}".encode())
        os._exit(0)
    os.wait()
    return os.read(reader, 100).decode() + f" {random.random()}"
"""
    first, second = (str(_ask(executor, source, "compat")).split() for _ in range(2))
    expected = str(random.Random(0).random())
    assert first[1:] == second[1:] == ["True", expected]  # seeded, whatever the program did with processes
    assert len({first[0], second[0], expected}) == 3


def test_compat_programs_talk_to_themselves_over_loopback(executor: LocalExecutor) -> None:
    source = """
import socket, threading
def f():
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"hello"))
        thread.start()
        with socket.create_connection(server.getsockname()) as client:
            heard = client.recv(9)
        thread.join()
    return heard
"""
    assert _ask(executor, source, "compat") == b"hello"
    assert _ask(executor, source) == "PermissionError"


@pytest.mark.parametrize("profile", ["strict", "compat"])
@pytest.mark.parametrize(
    "action",
    [
        "libc.ptrace(0, 0, 0, 0)", "libc.unshare(0x10000000)", "libc.setns(0, 0)", "libc.umount2(b'/tmp', 2)",
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)", "libc.process_vm_readv(1, None, 0, None, 0, 0)",
        "libc.syscall(425, 1, None)", "libc.syscall(428, -100, b'/', 0)", "libc.syscall(438, 0, 0, 0)",
        "os.chroot('/')",
        "libc.init_module(None, 0, b'')", "libc.reboot(0)", "libc.syscall(250, 0, 0)",
    ],
)  # fmt: skip
def test_what_no_honest_program_asks_for_ends_it(action: str, profile: str, executor: LocalExecutor) -> None:
    if action == "libc.syscall(250, 0, 0)" and os.uname().machine != "x86_64":
        pytest.skip("the number of keyctl on x86_64")
    source = f"import ctypes, os\nlibc = ctypes.CDLL(None)\ndef f(): return {action}"
    (run,) = executor.run([Job(uid="v", source=source, calls=(Call(function="f"),), profile=profile)])
    assert run.outcome is Outcome.VIOLATION, run


def test_an_old_calling_convention_ends_the_program(executor: LocalExecutor) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("int 0x80 and x32 exist on x86_64 only")
    code = "b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3'"  # mov eax, 20 (getpid of i386); int 0x80; ret
    source = f"""
import ctypes, mmap
def f():
    page = mmap.mmap(-1, 4096, prot=7)
    page.write({code})
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)()
"""
    (run,) = executor.run([Job(uid="i", source=source, calls=(Call(function="f"),))])
    assert run.outcome is Outcome.VIOLATION, run


@pytest.mark.parametrize(
    "action",
    [
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())", "fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
        "os.sched_setaffinity(0, {0})", "os.nice(1)", "os.setpriority(os.PRIO_PROCESS, 0, 19)", "os.mkfifo('p')",
        "resource.prlimit(1, resource.RLIMIT_CPU)", "signal.pidfd_send_signal(0, 9)", "os.chown('.', 0, 0)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socketpair()[0].sendto(b'x', '\\0elsewhere')",
    ],
)  # fmt: skip
def test_what_an_honest_program_may_try_is_refused_with_an_error(action: str, executor: LocalExecutor) -> None:
    source = f"import fcntl, os, resource, signal, socket\ndef f(): return {action}"
    assert _ask(executor, source) == "PermissionError"


def test_the_event_loop_the_clock_and_a_database_work_under_the_filter(executor: LocalExecutor) -> None:
    loop = (
        "import asyncio\nasync def g():\n    await asyncio.sleep(0.01)\n    return 5\ndef f(): return asyncio.run(g())"
    )
    assert _ask(executor, loop) == 5
    alarm = "import signal, time\ndef f():\n    got = []\n    signal.signal(signal.SIGALRM, lambda *a: got.append(1))\n"
    alarm += "    signal.setitimer(signal.ITIMER_REAL, 0.01)\n    time.sleep(0.05)\n    return got"
    assert _ask(executor, alarm) == [1]
    database = "import sqlite3\ndef f(path):\n    with sqlite3.connect(path) as db:\n"
    database += "        db.execute('create table t (x)')\n        db.execute('insert into t values (3)')\n"
    database += "        return db.execute('select x from t').fetchone()"
    assert _ask(executor, f"{database}\ng = f\ndef f(): return g(':memory:')") == (3,)
    # One in a file takes locks, which memory is not counted for.
    assert _ask(executor, f"{database}\ng = f\ndef f(): return g('a.db')", "compat") == (3,)
    assert _ask(executor, f"{database}\ng = f\ndef f(): return g('a.db')") == "OperationalError"
    files = "import pathlib, shutil, tempfile\ndef f():\n    with tempfile.TemporaryDirectory() as d:\n"
    files += "        p = pathlib.Path(d, 'a')\n        p.write_text('x')\n"
    files += "        return pathlib.Path(shutil.copy2(p, d + '/b')).read_text()"
    assert _ask(executor, files) == "x"


def test_the_host_s_clones_and_files_are_the_only_thing_landlock_needs_to_refuse_by_filter(
    open_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote_process, "PYTHON", open_python)
    with LocalExecutor("landlock") as executor:
        attempts = {
            "chmod": "os.chmod('/usr', 0o777)",
            "times": "os.utime('/usr')",
            "unlink": "os.unlink('/tmp/nothing')",
            "rename": "os.rename('/tmp/a', '/tmp/b')",
            "kill its group": "os.killpg(0, 0)",
            "kill everything": "os.kill(-1, 0)",
            "kill its parent": "os.kill(os.getppid(), 0)",
            "group of its parent": "os.getpgid(os.getppid())",
            "session of its parent": "os.getsid(os.getppid())",
            "processors of its parent": "os.sched_getaffinity(os.getppid())",
            "scheduling of its parent": "os.sched_getscheduler(os.getppid())",
            "priority of its parent": "os.getpriority(os.PRIO_PROCESS, os.getppid())",
        }
        for name, action in attempts.items():
            assert _ask(executor, f"import os\ndef f(): return {action}") == "PermissionError", name
        assert _ask(executor, "import os\ndef f(): return os.kill(os.getpid(), 0)") is None
        itself = "os.getpgid(0) == os.getsid(0) == os.getpid() and os.cpu_count() and os.sched_getscheduler(0)"
        assert _ask(executor, f"import os\ndef f(): return {itself}") == os.SCHED_OTHER
        assert _ask(executor, "import os\ndef f(): return os.listdir('.')") == []
        thread = "import threading\ndef f(): threading.Thread(target=print).start()"
        assert _ask(executor, thread) == "RuntimeError"


def test_what_a_program_prints_is_kept_up_to_a_limit_and_never_stops_it(executor: LocalExecutor) -> None:
    source = "import sys\ndef f():\n    print('out')\n    print('err', file=sys.stderr, flush=True)\n    return 1"
    (run,) = executor.run([Job(uid="p", source=source, calls=(Call(function="f"),))])
    assert sorted(run.stdout.split()) == ["err", "out"]
    source = "import os\ndef f():\n    for _ in range(300): os.write(1, b'x' * 10_000)\n    return 1"
    (run,) = executor.run([Job(uid="p", source=source, calls=(Call(function="f"),))])
    assert run.outcome is Outcome.OK
    assert run.results[0].value == 1
    assert run.stdout == "x" * 4096


def test_the_memory_a_program_took_is_reported(executor: LocalExecutor) -> None:
    source = "def f(size):\n    return len(bytearray(b'x') * size)"
    small, large = (
        executor.run([Job(uid="m", source=source, calls=(Call(function="f", args=(size,)),))])[0].usage.memory_mb
        for size in (1, 100 << 20)
    )
    assert 3 < small < 80
    assert 95 < large - small < 110


NUMPY = """
def f():
    import random
    import numpy
    return [float(numpy.arange(6).reshape(2, 3).sum()), numpy.random.rand(), random.random()]
"""


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_a_preloaded_package_is_there_seeded_and_alone(
    tier: str, open_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tier == "landlock":
        monkeypatch.setattr(zygote_process, "PYTHON", open_python)
    if importlib.util.find_spec("numpy") is None:
        pytest.skip("numpy is not installed")
    try:
        executor = open_executor(tier, preload=("numpy",))
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with executor:
        first, second = _ask(executor, NUMPY), _ask(executor, NUMPY)
        assert isinstance(first, list)
        assert first[0] == 15.0
        assert first == second
        assert (
            _ask(executor, "def f():\n    import numpy.polynomial\n    return numpy.linalg.det(numpy.eye(3)).item()")
            == 1.0
        )
        assert _ask(executor, "def f(): import torch") == "ModuleNotFoundError"


def test_packages_nobody_asked_for_cannot_be_imported(executor: LocalExecutor) -> None:
    assert _ask(executor, "def f(): import numpy") == "ModuleNotFoundError"


def test_a_package_that_is_not_installed_is_named_before_anything_starts() -> None:
    with pytest.raises(SandboxUnavailable, match="it has no 'no_such_package'\nremedy: pip install no_such_package"):
        open_executor(preload=("no_such_package",))
    with pytest.raises(ValueError, match="names of whole packages"):
        open_executor(preload=("numpy.linalg",))


def test_the_base_filter_names_calls_once(executor: LocalExecutor) -> None:
    calls = [
        call
        for group in (
            seccomp_module._COMPUTE, seccomp_module._CHANGE_FILES, seccomp_module._COMPAT_ONLY,
            seccomp_module._ZYGOTE_EPERM, seccomp_module._ZYGOTE_KILL, seccomp_module._FORBIDDEN,
        )
        for call in group.split()
    ]  # fmt: skip
    assert len(calls) == len(set(calls))
