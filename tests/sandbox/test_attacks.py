"""Hostile programs: none may earn a right answer, hurt the host, or leave anything for the next program.

Each defines `f`, which should return x * x + 7. None of them does; a value that equals it would be a forgery.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from coupled.sandbox import Call, Execution, Job, Limits, LocalExecutor, Opaque, Outcome, open_executor

Run = Callable[..., Execution]

O = Outcome  # noqa: E741
HONEST = "def f(x): return x * x + 7"
FORGE = """
import json, os, struct
def frame(tree):
    body = json.dumps(tree).encode()
    os.write(3, struct.pack(">I", len(body)) + body)
"""
SUBCLASS = """
class Liar({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 8
    def __int__(self): return 8
    def __index__(self): return 8
    def __iter__(self): return iter([8])
    def __reduce__(self): return (int, (8,))
    __class__ = int
def f(x): return Liar()
"""

# name: (source, outcomes that are as they should be)
ATTACKS: dict[str, tuple[str, set[Outcome]]] = {
    "sys.exit while loading": ("import sys\nsys.exit(0)", {O.LOAD_ERROR}),
    "exit while loading": ("exit()", {O.LOAD_ERROR}),
    "os._exit while loading": ("import os\nos._exit(0)", {O.INCOMPLETE}),
    "os._exit in a call": ("import os\ndef f(x): os._exit(0)", {O.INCOMPLETE}),
    "sys.exit in a call": ("import sys\ndef f(x): sys.exit(0)", {O.OK}),
    "os._exit at exit": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0", {O.OK}),
    "abort": ("import os\ndef f(x): os.abort()", {O.CRASH}),
    "exit with the status of a failed lock-down": ("import os\nos._exit(70)", {O.INCOMPLETE}),
    "close every descriptor": ("import os\nos.closerange(0, 64)\ndef f(x): return 0", {O.INCOMPLETE}),
    "close the result socket and go on": (
        "import os, time\ndef f(x):\n    os.close(3)\n    time.sleep(60)",
        {O.INCOMPLETE},
    ),
    "always equal object": (
        "class E:\n def __eq__(self, o): return True\n __hash__ = None\ndef f(x): return E()",
        {O.OK},
    ),
    "always equal object in a list": (
        "class E:\n def __eq__(self, o): return True\ndef f(x): return [E()]",
        {O.OK},
    ),
    **{f"lying {base}": (SUBCLASS.format(base=base), {O.OK}) for base in ("int", "float", "str", "list", "dict")},
    "class with a lying metaclass": (
        "class M(type):\n def __instancecheck__(c, o): return True\n def __eq__(c, o): return True\n"
        " __hash__ = type.__hash__\nclass L(metaclass=M): pass\ndef f(x): return L",
        {O.OK},
    ),
    "forged replies before the real ones": (
        FORGE + "frame({'load': None})\nfor n in range(3): frame({'n': n, 'v': 0})\ndef f(x): return 0",
        {O.PROTOCOL},
    ),
    "forged replies instead of the real ones": (
        FORGE + "frame({'load': None})\nfor n in range(3): frame({'n': n, 'v': True})\nos._exit(0)",
        {O.OK},
    ),
    "forged verdicts": (
        FORGE + "frame({'load': None})\nfor n in range(3): frame({'n': n, 'v': 0, 'passed': True})\nos._exit(0)",
        {O.PROTOCOL},
    ),
    "replies out of order": (
        FORGE + "frame({'load': None})\nfor n in (2, 1, 0): frame({'n': n, 'v': 0})\nos._exit(0)",
        {O.PROTOCOL},
    ),
    "too many replies": (FORGE + "def f(x):\n    frame({'n': 9, 'v': 0})\n    return 0", {O.PROTOCOL}),
    "garbage on the result socket": ("import os\nos.write(3, b'\\0\\0\\0\\5hello')\ndef f(x): return 0", {O.PROTOCOL}),
    "a lock-down report of its own": (
        "import os\nos.write(3, b'\\x55' * 9)\ndef f(x): return 0",
        {O.PROTOCOL, O.INCOMPLETE},
    ),
    "half a frame": ("import os\nos.write(3, b'\\0\\0')\nos._exit(0)", {O.INCOMPLETE}),
    "patched json": (
        'import json\njson.dumps = lambda *a, **k: \'{"n": 0, "v": true}\'\ndef f(x): return 0',
        {O.PROTOCOL, O.OK, O.INCOMPLETE},
    ),
    "patched builtins": (
        "import builtins\nbuiltins.type = lambda *a: int\nbuiltins.isinstance = lambda *a: True\ndef f(x): return 0",
        {O.OK, O.INCOMPLETE, O.PROTOCOL},
    ),
    "walks up the frames": (
        "import sys\ndef f(x):\n    frame, seen = sys._getframe(), []\n    while frame:\n"
        "        seen.append(sorted(frame.f_locals))\n        frame = frame.f_back\n    return seen",
        {O.OK},
    ),
    "rewrites its caller's replies": (
        "import sys\ndef f(x):\n    up = sys._getframe(1)\n    up.f_locals['index'] = 0\n"
        "    up.f_globals['_write_frame'] = lambda fd, body: None\n    return 0",
        {O.INCOMPLETE, O.OK},
    ),
    "raises an exception that cannot be shown": (
        "class E(BaseException):\n def __str__(self): raise self\ndef f(x): raise E()",
        {O.OK},
    ),
    "infinite loop": ("def f(x):\n    while True: pass", {O.TIMEOUT}),
    "infinite loop while loading": ("while True: pass", {O.TIMEOUT}),
    "infinite loop deaf to signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass",
        {O.TIMEOUT},
    ),
    "memory bomb": ("def f(x):\n    data = []\n    while True: data.append(bytearray(1 << 20))", {O.OK}),
    "one huge allocation": ("def f(x): return len(bytearray(1 << 40))", {O.OK}),
    "fork": ("import os\ndef f(x): return 8 if os.fork() else 11", {O.OK}),
    "thread": (
        "import threading\ndef f(x):\n    threading.Thread(target=print).start()\n    return 'started'",
        {O.OK},
    ),
    "becomes another program": ("import os\ndef f(x): os.execv('/bin/true', ['true'])", {O.OK, O.INCOMPLETE}),
    "huge reply": ("def f(x): return 'x' * (8 << 20)", {O.OUTPUT_LIMIT}),
    "many replies": (
        "import os\nwhile True: os.write(3, b'\\0\\0\\0\\2{}' * 1000)",
        {O.OUTPUT_LIMIT, O.PROTOCOL},
    ),
    "huge file": (
        "import os\ndef f(x):\n    fd = os.open('big', os.O_CREAT | os.O_WRONLY)\n"
        "    return sum(os.write(fd, bytes(1 << 20)) for _ in range(64))",
        {O.OK},
    ),
    "many descriptors": ("import os\ndef f(x): return [os.dup(0) for _ in range(10_000)]", {O.OK}),
    "deep recursion": ("def f(x): return f(x)", {O.OK}),
    "deep recursion with the limit raised": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
        {O.OK, O.CRASH, O.TIMEOUT},
    ),
    "recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\na = []\nfor _ in range(10**6): a = [a]\ndef f(x): return repr(a)",
        {O.CRASH, O.TIMEOUT},
    ),
    "a list that contains itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", {O.OK}),
    "a small value with a huge shape": (
        "def f(x):\n    a = [0]\n    for _ in range(60): a = [a, a]\n    return a",
        {O.OK},
    ),
    "huge int": ("def f(x): return 1 << 1_000_000", {O.OK}),
    "null pointer": ("import ctypes\ndef f(x): ctypes.string_at(0)", {O.CRASH}),
    "kills everything": ("import os, signal\ndef f(x): os.kill(-1, signal.SIGKILL)", {O.OK, O.VIOLATION}),
    "kills its parent": ("import os, signal\ndef f(x): os.kill(os.getppid(), signal.SIGKILL)", {O.OK, O.VIOLATION}),
    "stops its parent": ("import os, signal\ndef f(x): os.kill(os.getppid(), signal.SIGSTOP)", {O.OK, O.VIOLATION}),
    "stops itself": ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)", {O.OK, O.TIMEOUT}),
    "becomes root": ("import os\ndef f(x): os.setuid(0)", {O.OK}),
    "raises its limits": (
        "import resource\ndef f(x): resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))",
        {O.OK},
    ),
    "reads stdin": ("def f(x): return input()", {O.OK}),
    "leaves a deep tree": (
        "import os\ndef f(x):\n    for _ in range(1500):\n        os.mkdir('d')\n        os.chdir('d')\n    return 0",
        {O.OK},
    ),
    "leaves a closed directory": (
        "import os\ndef f(x):\n    os.makedirs('d/e')\n    os.chmod('d', 0)\n    return 0",
        {O.OK},
    ),
}

CPU_SECONDS = {"a small value with a huge shape": 5}
"""Limits of programs that are to end by themselves and need nearly a second on a busy machine."""


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_earns_nothing_and_the_next_one_is_judged_as_ever(name: str, run: Run) -> None:
    source, expected = ATTACKS[name]
    execution = run(source, cpu_seconds=CPU_SECONDS.get(name, 1))
    assert execution.outcome in expected, execution
    assert not any(_is_right(execution, index) for index in range(3)), execution
    after = run("import os\n" + HONEST + "\nleft = os.listdir('.')")
    assert [result.value for result in after.results] == [8, 11, 16]
    assert run("import os\ndef f(x): return os.listdir('.')").results[0].value == []


def _is_right(execution: Execution, index: int) -> bool:
    if index >= len(execution.results) or execution.results[index].raised is not None:
        return False
    x = index + 1
    return bool(execution.results[index].value == x * x + 7)


def test_the_attack_table_would_notice_a_right_answer(run: Run) -> None:
    execution = run(HONEST)
    assert execution.outcome is Outcome.OK
    assert [_is_right(execution, index) for index in range(3)] == [True, True, True]


def test_an_always_equal_object_arrives_as_a_value_equal_to_nothing(run: Run) -> None:
    (result, *_) = run("class E:\n def __eq__(self, other): return True\ndef f(x): return E()").results
    assert isinstance(result.value, Opaque)
    assert result.value != 8
    assert result.value != result.value


def test_a_lying_subclass_arrives_as_its_plain_base_value(run: Run) -> None:
    assert [type(result.value) for result in run(SUBCLASS.format(base="int")).results] == [int] * 3
    assert run(SUBCLASS.format(base="int")).results[0].value == 0
    assert run(SUBCLASS.format(base="list")).results[0].value == []


def test_an_exit_in_the_middle_keeps_the_replies_before_it(run: Run) -> None:
    execution = run("import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x * x + 7")
    assert execution.outcome is Outcome.INCOMPLETE
    assert [result.value for result in execution.results] == [8]


def test_a_program_that_sleeps_is_stopped_by_the_wall_clock(run: Run) -> None:
    execution = run("import time\ndef f(x): time.sleep(60)", wall_seconds=0.3)
    assert execution.outcome is Outcome.TIMEOUT
    assert 0.3 <= execution.usage.wall_seconds < 10.0
    assert execution.usage.cpu_seconds < 0.3


def test_a_program_that_computes_is_stopped_by_its_own_processor_time(run: Run) -> None:
    execution = run("def f(x):\n    while True: pass", wall_seconds=30.0)
    assert execution.outcome is Outcome.TIMEOUT
    assert 0.6 <= execution.usage.cpu_seconds < 1.5


def test_memory_and_processes_are_refused_with_the_error_python_gives(run: Run) -> None:
    refused = {name: run(ATTACKS[name][0]).results[0].raised for name in ("memory bomb", "fork", "becomes root")}
    assert {name: raised.type for name, raised in refused.items() if raised is not None} == {
        "memory bomb": "MemoryError",
        "fork": "PermissionError",
        "becomes root": "PermissionError",
    }


def test_memory_shared_with_nobody_and_with_anybody_both_count(run: Run) -> None:
    source = "import mmap\ndef f(flags): return len(mmap.mmap(-1, 256 << 20, flags=flags))"
    execution = run(source, (0x22,), (0x21,))  # MAP_ANONYMOUS with MAP_PRIVATE and with MAP_SHARED
    assert [result.raised.type if result.raised else None for result in execution.results] == ["OSError", "OSError"]


def test_descriptors_run_out_at_their_limit(run: Run) -> None:
    source = "import os\ndef f(x):\n    try:\n        while True: last = os.dup(0)\n    except OSError: return last"
    assert run(source, max_files=20).results[0].value == 19


def test_a_program_has_no_capability_no_way_to_gain_one_and_no_other_parent(run: Run) -> None:
    source = """
import ctypes, os
libc = ctypes.CDLL(None)
def f(x):
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    signal = ctypes.c_int()
    libc.prctl(2, ctypes.byref(signal))
    return {
        "capabilities": [data[0], data[1], data[3], data[4]],
        "no new privileges": libc.prctl(39, 0, 0, 0, 0),
        "can be traced": libc.prctl(3),
        "dies with": signal.value,
        "root": 0 in os.getresuid() + os.getresgid(),
    }
"""
    assert run(source, (1,)).results[0].value == {
        "capabilities": [0, 0, 0, 0],
        "no new privileges": 1,
        "can be traced": 0,
        "dies with": 9,
        "root": False,
    }


@pytest.mark.parametrize("profile", ["strict", "compat"])
def test_memory_that_no_limit_bounds_is_refused(profile: str, executor: LocalExecutor) -> None:
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def f():
    made = libc.shmget(4711, 4096, 0o1666)
    try:
        return [made, ctypes.get_errno(), os.memfd_create("m")]
    except OSError as error:
        return [made, ctypes.get_errno(), -error.errno]
"""
    (execution,) = executor.run([Job(uid="m", source=source, calls=(Call(function="f"),), profile=profile)])
    assert execution.results[0].value == [-1, 1, -1]


def test_a_file_stops_growing_at_its_limit(run: Run) -> None:
    (result, *_) = run(ATTACKS["huge file"][0], file_kb=1536).results
    assert result.raised is not None
    assert result.raised.type == "OSError"
    source = (
        "import os\ndef f(x):\n    fd = os.open('b', os.O_CREAT | os.O_WRONLY)\n    return os.write(fd, bytes(1 << 22))"
    )
    assert run(source, file_kb=1536).results[0].value == 1536 << 10


def test_daemons_that_leave_their_session_die_with_the_program(executor: LocalExecutor) -> None:
    source = """
import os, time
def f(x):
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 64)
                time.sleep(600)
            os._exit(0)
        os.wait()
    return 'left two daemons'
"""
    job = Job(uid="d", source=source, calls=(Call(function="f", args=(1,)),), profile="compat")
    (execution,) = executor.run([job])
    assert execution.results[0].value == "left two daemons", execution
    assert _pids_of(executor) == []


def test_no_process_of_a_program_is_left_after_any_end(run: Run, executor: LocalExecutor) -> None:
    for name in (
        "infinite loop",
        "os._exit in a call",
        "close the result socket and go on",
        "huge reply",
        "stops itself",
    ):
        run(ATTACKS[name][0], wall_seconds=1.0)
        assert _pids_of(executor) == [], name


def _pids_of(executor: LocalExecutor) -> list[int]:
    """Host pids of processes that run as the executor's unprivileged user."""
    uid = int(executor.isolation().user.split()[1])
    if uid == os.getuid():
        pytest.skip("not root: programs run as this very user and cannot be told apart from other processes")
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                found.append(int(entry.name))
        except FileNotFoundError:
            continue
    return found


def test_the_host_s_name_is_hidden_and_a_program_is_the_first_to_die_without_memory(run: Run) -> None:
    source = "import os\ndef f(x): return [os.uname().nodename, open('/proc/self/oom_score_adj').read().strip()]"
    assert run(source, (1,)).results[0].value == ["sandbox", "1000"]
    assert Path("/proc/self/oom_score_adj").read_text().strip() != "1000"


@pytest.mark.usefixtures("executor")  # skipped where there is no such tier
def test_no_temporary_directory_is_left_by_attacks(own_temporary_files: Path) -> None:
    limits = Limits(cpu_seconds=1, wall_seconds=20.0, memory_mb=128, output_kb=1024, file_kb=1024)
    calls = tuple(Call(function="f", args=(x,)) for x in (1, 2, 3))
    sources = [ATTACKS[name][0] for name in ("leaves a deep tree", "leaves a closed directory")]
    with open_executor("namespaces") as executor:
        executor.run([Job(uid="t", source=source, calls=calls, limits=limits) for source in sources])
        assert not list(own_temporary_files.glob("coupled-sandbox-*"))


@pytest.mark.parametrize(("profile", "error"), [("strict", "PermissionError"), ("compat", "ConnectionRefusedError")])
def test_a_listener_on_this_machine_cannot_be_reached(profile: str, error: str, executor: LocalExecutor) -> None:
    source = "import socket\ndef f(port):\n    socket.create_connection(('127.0.0.1', port), 1)\n    return 'connected'"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        job = Job(uid="n", source=source, calls=(Call(function="f", args=(port,)),), profile=profile)
        (result,) = executor.run([job])[0].results
    assert result.raised is not None
    assert result.raised.type == error


def test_the_host_s_files_and_processes_are_out_of_sight(run: Run, executor: LocalExecutor) -> None:
    source = """
import os
def f(path):
    try:
        return os.listdir(path)
    except OSError as error:
        return type(error).__name__
"""
    repository = str(Path(__file__).parents[2])
    replies = [result.value for result in run(source, (repository,), ("/proc",), ("/root",), ("/tmp",)).results]
    assert replies[0] == "FileNotFoundError"
    assert isinstance(replies[1], list)
    assert [name for name in replies[1] if name.isdigit()] in ([], ["1"]), "a program sees no process but itself"
    assert set(replies[1]) <= {"1", "self", "thread-self"}
    assert isinstance(replies[2], str) or replies[2] == [".pyenv"]  # the interpreter may live there; nothing else
    assert replies[3] == []


def test_nothing_outside_the_working_directory_can_be_written(run: Run) -> None:
    source = """
import os
def f(path):
    try:
        os.close(os.open(path + '/probe', os.O_CREAT | os.O_WRONLY))
        return 'written'
    except OSError as error:
        return type(error).__name__
"""
    paths = ("/", "/usr", "/usr/lib", "/dev", os.path.dirname(os.__file__))
    replies = [result.value for result in run(source, *((path,) for path in paths)).results]
    assert set(replies) <= {"OSError", "PermissionError"}, replies
    assert run(source, (".",)).results[0].value == "written"
