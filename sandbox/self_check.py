"""The self-check: does the sandbox hold on this very machine, and by the means it should hold by?

Hostile probes, one per thing that must not work, between two runs of an honest program. A probe counts as held only
when it failed in the way its tier means it to fail (the error number, the outcome, the exact size of the file): a
probe that something else happened to stop proves nothing about the measure it was made for. Every probe is bounded, so
that a machine that does not hold it survives.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import signal
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from coupled.sandbox.types import Call, Execution, Executor, Isolation, Job, Limits, Outcome

_LIMITS = Limits(
    cpu_seconds=1, wall_seconds=20.0, memory_mb=256, file_kb=1024, output_kb=256, max_files=32, max_processes=8
)
_NAP = Limits(cpu_seconds=1, wall_seconds=0.4, memory_mb=256)
_NUM_PATIENT = 3
"""Tries of a probe while the machine is too busy for a result, each with more wall time."""
_NUM_TRIED = 24
"""Threads or processes that a bomb tries to start: more than are allowed, few enough to survive."""

_TRY = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def tried(action, *args):
    try:
        return action(*args)
    except OSError as error:
        return f"errno {error.errno}"
def call(number, *args):
    done = libc.syscall(ctypes.c_long(number), *args)
    return f"errno {ctypes.get_errno()}" if done < 0 else done
"""
_HONEST = "def probe(): return sum(range(5))"
_LOOP = "def probe():\n    while True: pass"
_SLEEP = "import time\ndef probe():\n    time.sleep(600)\n    return 'slept'"
_HOG = "def probe(): return len(bytearray(1 << 29))"
_FORK = "def fork():\n    if os.fork() == 0: os._exit(0)\n    return 'forked'\ndef probe(): return tried(fork)"
_EXEC = "def probe(): return tried(os.execv, '/bin/true', ['true'])"
_THREADS = """
import threading
def probe(most):
    go, started = threading.Event(), 0
    try:
        while started < most:
            threading.Thread(target=go.wait).start()
            started += 1
    except RuntimeError:
        pass
    go.set()
    return started
"""
# os.write and not file.write: an unflushed file swallows the error, and "refused" would look like "worked".
_FILE = """
def write(path):
    fd, total = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), 0
    try:
        while total < 1 << 24: total += os.write(fd, bytes(1 << 16))
    except OSError as error:
        return [total, error.errno]
    return [total, 0]
def probe(path): return tried(write, path)
"""
_SCRATCH = """
def probe():
    found = os.statvfs(".")
    return [found.f_blocks * found.f_frsize, found.f_files, found.f_flag & 14]
"""
_DESCRIPTORS = """
def probe(most):
    last = -1
    try:
        while last < most: last = os.dup(0)
    except OSError as error:
        return [last, error.errno]
    return [last, 0]
"""
_READ = """
def read(path): return len(os.read(os.open(path, os.O_RDONLY), 99))
def probe(paths): return [tried(read, path) for path in paths]
"""
_WRITE = """
def probe(paths):
    return sorted({tried(os.open, f"{path}/coupled-probe", os.O_CREAT | os.O_WRONLY, 0o600) for path in paths}, key=str)
"""
_MOUNTS = "def probe(): return open('/proc/self/mountinfo').read()"
_PROC = """
def probe():
    numbers = [name for name in os.listdir("/proc") if name.isdigit()]
    return [numbers, os.path.exists("/proc/sys"), os.path.exists("/proc/meminfo")]
"""
_ROOT = "def probe(): return sorted(os.listdir('/'))"
_SIGNAL = "def probe(pid): return [tried(os.kill, pid, 0), os.getppid()]"
_MEMORY_FILE = "def probe(): return tried(os.memfd_create, 'm')"
_SHARED_MEMORY = "def probe(): return 'made' if libc.shmget(0, 4096, 0o1600) >= 0 else f'errno {ctypes.get_errno()}'"
_SOCKET = "import socket\ndef probe(): return tried(lambda: socket.socket().fileno() and 'opened')"
_CONNECT = """
import socket
def probe(port, name):
    where = ((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_UNIX, name))
    def reach(family, address):
        with socket.socket(family) as sock:
            sock.settimeout(2.0)
            sock.connect(address)
        return "connected"
    return [tried(reach, *place) for place in where]
"""
_RIGHTS = """
def probe(is_root):
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    ids = os.getresuid() + os.getresgid()
    return [any(data), libc.prctl(39, 0, 0, 0, 0), libc.prctl(3), 0 in ids, is_root and os.getgroups() != []]
"""
# Set a lock of the process or of the open file, at once or waiting; flock.
_LOCK = """
import fcntl, struct
def probe():
    shared = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)
    attempts = [tried(fcntl.fcntl, 0, command, shared) for command in (6, 7, 37, 38)] + [tried(fcntl.flock, 0, 5)]
    return sorted({str(attempt) for attempt in attempts})
"""
_URGENT = """
import socket
def probe():
    one, other = socket.socketpair()
    return tried(one.send, b"x", socket.MSG_OOB)
"""
# Append and non-blocking, on what this program and the next one have as standard input.
_FLAG = "import fcntl\ndef probe(): return fcntl.fcntl(0, 4, fcntl.fcntl(0, 3) | os.O_APPEND | os.O_NONBLOCK)"
_FLAGGED = """
import fcntl
def probe(): return [fcntl.fcntl(fd, 3) & (os.O_APPEND | os.O_NONBLOCK) for fd in range(4)]
"""
_LITTER = "def probe(): return tried(os.open, 'left', os.O_CREAT | os.O_WRONLY, 0o600) and 'left'"
_LEFT = "def probe(): return os.listdir('.')"
_EXIT = "def probe(): os._exit(0)"
_FLOOD = "def probe(): return 'x' * (1 << 20)"
_TRACE = "def probe(): return call({ptrace}, 0, 0, 0, 0)"
_NEW_USER = "def probe(): return libc.unshare(0x10000000)"
_MOUNT = "def probe(): return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)"
_RING = "def probe(): return call(425, 1, bytes(120))"
_KEYS = "def probe(): return call({add_key}, b'user', b'k', b'v', 1, -2)"
_FOREIGN = "def probe(): return call(0x40000000 + 39)"
_PTRACE = {"x86_64": 101, "aarch64": 117}
_ADD_KEY = {"x86_64": 248, "aarch64": 217}


class Check(NamedTuple):
    """One probe. Example: `Check("infinite loop", True, "timeout")`."""

    name: str
    held: bool
    detail: str


class _Probe(NamedTuple):
    name: str
    source: str
    holds: Callable[[Execution], bool]
    args: tuple[object, ...] = ()
    limits: Limits | None = None
    """None: the limits of all probes."""
    profile: str = "strict"


def run_self_check(executor: Executor) -> list[Check]:
    """Run an honest program, some two dozen hostile ones and the honest one again; return what held.

    Give it an executor of one worker. The probes listen on 127.0.0.1 and put a directory with a file where temporary
    files go, to see that neither is in reach. In tier `process` that several do not hold is a finding, not an error.
    Takes one to two seconds.
    """
    isolation = executor.isolation()
    name = f"\0coupled-probe-{os.getpid()}-{id(executor)}"
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as local,
        tempfile.TemporaryDirectory(prefix="coupled-probe-", dir=_open_directory()) as place,
    ):
        local.bind(name)
        local.listen()
        # Modes that admit every user, so that only the sandbox can refuse.
        os.chmod(place, 0o777)
        Path(place, "secret").write_bytes(b"secret")
        Path(place, "secret").chmod(0o644)
        probes = [
            _Probe("honest program", _HONEST, _gives(10)),
            *_everywhere(isolation),
            *(_in_namespaces(isolation, listener.getsockname()[1], name) if isolation.tier == "namespaces" else ()),
            *(_in_landlock(place) if isolation.tier == "landlock" else ()),
            *_out_of_reach(isolation, place),
            _Probe("honest program afterwards", _HONEST, _gives(10)),
        ]
        return [_checked(executor, probe) for probe in probes]


def _checked(executor: Executor, probe: _Probe) -> Check:
    call = Call(function="probe", args=probe.args)
    source = _TRY + probe.source
    job = Job(uid=probe.name, source=source, calls=(call,), limits=probe.limits or _LIMITS, profile=probe.profile)
    for _ in range(_NUM_PATIENT):
        (run,) = executor.run([job])
        if run.outcome is not Outcome.OVERLOADED:
            break
        longer = dataclasses.replace(job.limits, wall_seconds=job.limits.wall_seconds * 5)
        job = dataclasses.replace(job, limits=longer)
    held = probe.holds(run)
    return Check(probe.name, held, _detail(run)[: 80 if held else 400])


def _everywhere(isolation: Isolation) -> Iterator[_Probe]:
    """Probes that limits and the system-call filter stop, in every tier alike."""
    machine = os.uname().machine
    yield _Probe("infinite loop", _LOOP, lambda run: run.outcome is Outcome.TIMEOUT and run.usage.cpu_seconds < 1.6)
    yield _Probe("sleep", _SLEEP, lambda run: run.outcome is Outcome.TIMEOUT and run.usage.cpu_seconds < 0.5, (), _NAP)
    yield _Probe("memory hog", _HOG, _ran_out_of_memory)
    yield _Probe("many descriptors", _DESCRIPTORS, _gives([_LIMITS.max_files - 1, errno.EMFILE]), (256,))
    yield _Probe("exit with status 0", _EXIT, lambda run: run.outcome is Outcome.INCOMPLETE)
    yield _Probe("flood of output", _FLOOD, lambda run: run.outcome is Outcome.OUTPUT_LIMIT)
    yield _Probe("privileges", _RIGHTS, _gives([False, 1, 0, False, False]), (os.geteuid() == 0,))
    most = 0 if isolation.tier == "landlock" else _LIMITS.max_processes
    yield _Probe("thread bomb", _THREADS, lambda run: _is_count(_value(run), most), (_NUM_TRIED,))
    yield _Probe("new process", _FORK, _refuses(errno.EPERM))
    yield _Probe("other program", _EXEC, _refuses(errno.EPERM))
    yield _Probe("network", _SOCKET, _refuses(errno.EPERM))
    yield _Probe("memory file", _MEMORY_FILE, _refuses(errno.EPERM))
    yield _Probe("shared memory", _SHARED_MEMORY, _refuses(errno.EPERM))
    yield _Probe("locks", _LOCK, _gives([f"errno {errno.EPERM}"]))
    yield _Probe("byte out of band", _URGENT, _refuses(errno.EPERM))
    yield _Probe("flags for the next program", _FLAG, _gives(0))
    yield _Probe("flags of the last program", _FLAGGED, _gives([0, 0, 0, 0]))
    yield _Probe("new user namespace", _NEW_USER, _is_violation)
    yield _Probe("mount", _MOUNT, _is_violation)
    yield _Probe("io_uring", _RING, _is_violation)
    if machine in _PTRACE:
        yield _Probe("trace", _TRACE.format(ptrace=_PTRACE[machine]), _is_violation)
        yield _Probe("kernel keys", _KEYS.format(add_key=_ADD_KEY[machine]), _is_violation)
    if machine == "x86_64":
        yield _Probe("foreign system call", _FOREIGN, _is_violation)


def _in_namespaces(isolation: Isolation, port: int, name: str) -> Iterator[_Probe]:
    """Probes that a private root, a private /tmp and namespaces stop."""
    yield _Probe("huge file", _FILE, _gives([_LIMITS.file_kb << 10, errno.EFBIG]), ("big",))
    # Bits 2, 4 and 8 of the flags: nosuid, nodev, noexec.
    yield _Probe("scratch directory", _SCRATCH, _gives([64 << 20, 4096, 14]))
    yield _Probe("file for the next program", _LITTER, _gives("left"))
    yield _Probe("file of the last program", _LEFT, _gives([]))
    yield _Probe("signal to the host", _SIGNAL, _gives([f"errno {errno.ESRCH}", 0]), (os.getpid(),))
    expected = {path.split("/")[1] for path in isolation.shown} | {"tmp", "proc", "dev"}
    yield _Probe("root directory", _ROOT, _gives(sorted(expected)))
    if not any("no /proc" in note for note in isolation.notes):
        yield _Probe("processes in sight", _PROC, _gives([["1"], False, False]))
        yield _Probe("mount table", _MOUNTS, lambda run: not _foreign_mounts(_value(run), isolation.shown))
    # Sockets are allowed here, so that it is the namespace that refuses, and not the filter.
    refused = [f"errno {errno.ECONNREFUSED}"] * 2
    yield _Probe("the host's listeners", _CONNECT, _gives(refused), (port, name), profile="compat")


def _in_landlock(place: str) -> Iterator[_Probe]:
    """Probes that the ruleset and the filter of a program on the host's file system stop."""
    yield _Probe("new file", _FILE, _refuses(errno.EACCES), (f"{place}/new",))
    yield _Probe("signal to the host", _SIGNAL, lambda run: _refused(_item(run, 0)) == errno.EPERM, (os.getpid(),))
    yield _Probe("files in sight", "def probe(): return tried(os.listdir, '/')", _refuses(errno.EACCES))


def _out_of_reach(isolation: Isolation, place: str) -> Iterator[_Probe]:
    is_private = isolation.tier == "namespaces"
    # More than one file: where the directory of temporary files is root's alone, its mode refuses the first.
    secrets = [f"{place}/secret", "/etc/passwd", *([] if is_private else ["/proc/self/status"])]
    hidden = {errno.ENOENT} if is_private else {errno.EACCES}
    yield _Probe("file of the host", _READ, lambda run: _all_refused(run, hidden), (secrets,))
    places = ["/", "/dev", "/usr", "/etc", os.path.dirname(os.__file__)] + ([] if is_private else [place])
    # A private root is read-only for every user; EACCES would be the modes of the host's directories.
    wanted = {errno.EROFS, errno.ENOENT} if is_private else {errno.EROFS, errno.EACCES}
    yield _Probe("files beside the scratch directory", _WRITE, lambda run: _all_refused(run, wanted), (places,))


def _open_directory() -> str:
    """Return a directory for temporary files that every user may enter, if there is one."""
    for path in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if os.access(path, os.W_OK | os.X_OK):
            real = Path(path).resolve()
            if all(parent.stat().st_mode & stat.S_IXOTH for parent in (real, *real.parents)):
                return path
    return tempfile.gettempdir()


def _foreign_mounts(table: object, shown: tuple[str, ...]) -> list[str]:
    """Return the lines of a program's mount table that should not be there, or not in this way."""
    if not isinstance(table, str) or not table:
        return ["no mount table"]
    own = {"/": "ro", "/tmp": "rw nosuid nodev noexec", "/proc": "ro nosuid nodev noexec"}
    places = _mount_points(Path("/proc/self/mountinfo").read_text())
    real = {os.path.realpath(path) for path in shown}
    below = {place for place in places if any(place.startswith(f"{path}/") for path in real)}
    foreign = []
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 6:
            return [f"no mount table: {line[:80]}"]
        place, options = _unescaped(fields[4]), set(fields[5].split(","))
        is_own = place in own and set(own[place].split()) <= options
        if not is_own and not (place in real | below | set(shown) and {"ro", "nosuid"} <= options):
            foreign.append(line)
    return foreign


def _mount_points(table: str) -> set[str]:
    return {_unescaped(line.split()[4]) for line in table.splitlines()}


def _unescaped(path: str) -> str:
    """The kernel writes a space in a path as `\\040`."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), path)


def _value(run: Execution) -> object:
    """Return the only reply; None when there is none."""
    return run.results[0].value if run.outcome is Outcome.OK and run.results[0].raised is None else None


def _item(run: Execution, index: int) -> object:
    value = _value(run)
    return value[index] if isinstance(value, list) and len(value) > index else None


def _gives(expected: object) -> Callable[[Execution], bool]:
    return lambda run: type(_value(run)) is type(expected) and _value(run) == expected


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _refuses(number: int) -> Callable[[Execution], bool]:
    return lambda run: _refused(_value(run)) == number


def _refused(value: object) -> int | None:
    match = re.fullmatch(r"errno (\d+)", value) if isinstance(value, str) else None
    return int(match[1]) if match else None


def _all_refused(run: Execution, numbers: set[int]) -> bool:
    value = _value(run)
    return isinstance(value, list) and bool(value) and all(_refused(item) in numbers for item in value)


def _is_violation(run: Execution) -> bool:
    """True when the filter of system calls ended it: its zygote's end is a violation as well."""
    return run.outcome is Outcome.VIOLATION and run.detail.endswith(f"signal {signal.SIGSYS:d}")


def _ran_out_of_memory(run: Execution) -> bool:
    raised = run.results[0].raised if run.results else None
    return raised is not None and raised.type == "MemoryError"


def _detail(run: Execution) -> str:
    reply = run.results[0] if run.results else None
    answer = "" if reply is None else f", raised {reply.raised.type}" if reply.raised else f", gave {reply.value!r}"
    return f"{run.outcome}{answer}{f' ({run.detail})' if run.detail else ''}"
