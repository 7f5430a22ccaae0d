"""The confinement of programs by the kernel, requested once for the zygote and once per program.

Runs inside the zygote, loaded by path: standard library only. Every tier is a fixed list of measures, and in the
tiers `namespaces` and `landlock` a measure that the kernel refuses is an error: the zygote, or the program, then
does not start. Requested where granted (a /proc, the host's name, control groups; in tier `process`
network and ipc namespaces) is noted in the `Confinement`.

`namespaces`  the zygote: user (unless root), mount, ipc, network and pid namespace, a root of system libraries and the
              interpreter, read-only. A program: mount, ipc, network and pid namespace of its own, an empty /tmp with
              limits of size and number of files, a read-only /proc with its own processes alone.
`landlock`    on the host's file system, of which a Landlock ruleset leaves the same trees to read and nothing to
              write; the program is one process with one thread that may signal only itself. It can find out whether
              a path or a process of the host exists, and the host's name.
`process`     limits and an unprivileged user alone: it does **not** hold a hostile program.

All tiers: limits, no capability, no_new_privs, not traceable, an unprivileged user when the host is root. The first
two: system calls filtered (see `seccomp`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import socket
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIRST_SERVICE_FD = 200
"""The zygote's own descriptors lie above, so that placing a program's at 0..3 cannot overwrite one."""
_ASIDE_FD = FIRST_SERVICE_FD - 10
"""Temporary numbers of a program's descriptors: above the received ones, which take the lowest numbers."""
RESULT_FD = 3
PACKAGES = "/opt/packages"
"""Directory of the preloaded packages in a private root."""

_CLONE = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
_PER_PROGRAM = {"strict": ("mount", "ipc"), "compat": ("mount", "ipc", "network")}
"""A program's own, besides its pid namespace, which `before_fork` prepares. Strict programs can open no socket, so
the worker's empty network namespace will do for all of them: one each would cost a fifth of a small program's time."""
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 1, 4, 38, 36
_SIGKILL = 9
_HOST_NAME = b"sandbox"
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SCRATCH_OPTIONS = "mode=0777,size=64m,nr_inodes=4096"
_SHARED_MEMORY_OPTIONS = "mode=0777,size=16m,nr_inodes=64"
_HOSTS = "/dev/shm/.hosts"
_PROC_FLAGS = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_READ_ONLY_TREES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_READ_ONLY_FILES = ("/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_LIMITED = (
    *(resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE),
    *(resource.RLIMIT_NPROC, resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE),
    resource.RLIMIT_SIGPENDING,
)
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1

# Made once, because making a type of ctypes costs more than the call.
_CAPABILITY_VERSION, _NO_CAPABILITIES = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()

_libc = ctypes.CDLL(None, use_errno=True)
# Looked up here, once: a program's process would look up for itself what the zygote has not called.
for _name, _arguments in {
    "capset": [ctypes.c_void_p] * 2,
    "mount": [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p],
    "prctl": [ctypes.c_int] + [ctypes.c_ulong] * 4,
    "setns": [ctypes.c_int] * 2,
    "unshare": [ctypes.c_int],
}.items():
    getattr(_libc, _name).argtypes = _arguments


@dataclass(slots=True, kw_only=True)
class Confinement:
    """The confinement in effect, and the handles that a program needs to be started under it."""

    tier: str
    uid: int
    drops_user: bool
    """True: the zygote is root and every program becomes `uid`."""
    namespaces: set[str] = field(default_factory=set)
    has_proc: bool = False
    """True: a program gets a /proc of its own."""
    scratch: str = "/tmp"
    """The program's working directory; empty when it starts."""
    packages: str = ""
    """Directory of the preloaded packages as a program sees it; empty when there are none."""
    shown: tuple[str, ...] = ()
    """The host's paths that a program sees."""
    notes: list[str] = field(default_factory=list)
    own_pid_ns: int = -1
    proc: int = -1
    """Descriptor of the host's /proc, for the zygote alone."""
    dies_first: bool = False
    """True: the kernel ends a program before anything else when the machine is out of memory."""
    ruleset: int = -1
    filters: dict[str, Any] = field(default_factory=dict)
    """The filter of each profile that programs may have."""
    base_as: int = 0
    """Address space of the zygote, in bytes; limits of a program come on top."""
    base_data: int = 0
    most: dict[int, int] = field(default_factory=dict)
    """The zygote's own hard limit of each kind, which no program's is above."""


def enter(tier: str, base: str, uid: int, packages: list[str], landlock: Any) -> Confinement:
    """Put this process where the programs of a tier live, and return what took effect.

    `base` is an empty directory of ours on the host, `uid` the user that programs become when this process is
    root, `packages` the host's paths of the packages that programs may import. In tier `namespaces` the process
    forks: the caller goes on as the first process of a pid namespace, and the one in between only waits, so that
    killing either ends everything below. Raises OSError when something that the tier needs is refused.
    """
    is_root = os.geteuid() == 0
    here = Confinement(tier=tier, uid=uid if is_root else os.getuid(), drops_user=is_root)
    here.proc = service(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY))
    here.shown = tuple(path for path in (*_interpreter_trees(), *_READ_ONLY_FILES, *_DEVICES) if os.path.exists(path))
    try:
        _put_first_to_die(here, _read(here.proc, "self/oom_score_adj"))  # no change: may we?
        here.dies_first = True
    except OSError as error:
        here.notes.append(f"a machine out of memory may end another process before a program: {error}")
    if tier == "namespaces":
        _enter_namespaces(here, base, packages)
    else:
        _stay_on_the_host(here, base, packages)
        if tier == "landlock":
            _drop_into_landlock(here, base, packages, landlock)
    return here


def seal(here: Confinement, seccomp: Any) -> None:
    """Close the door behind the zygote's preparations: measure it, and filter its and all programs' calls.

    Raises OSError when the filters cannot be built or loaded.
    """
    here.base_as, here.base_data = _own_memory(here)
    here.most = {name: resource.getrlimit(name)[1] for name in _LIMITED}
    if here.tier == "process":
        return
    profiles = ("strict", "compat") if here.tier == "namespaces" else ("strict",)
    here.filters = {name: seccomp.program_filter(name, is_alone=here.tier == "landlock") for name in profiles}
    base = seccomp.base_filter()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    base.load()


def before_fork(here: Confinement) -> None:
    """Let the next child be the first process of a pid namespace of its own."""
    if "pid" in here.namespaces:
        _check(_libc.setns(here.own_pid_ns, _CLONE["pid"]), "setns to the own pid namespace")
        unshare("pid")


def lock_down(here: Confinement, limits: dict[str, Any], profile: str, fds: list[int], landlock: Any) -> None:
    """Give up, for good, everything the program about to run must not have. Called in its process.

    `fds` is [result, output] or [result, output, stdin]; without stdin the program reads nothing and `output` takes
    its standard error too. Raises OSError when anything is refused: the program must not start then.
    """
    if here.tier != "process" and profile not in here.filters:
        raise PermissionError(f"profile {profile!r} is not available in tier {here.tier!r}")
    if here.dies_first:
        _put_first_to_die(here, "1000")
    os.setsid()
    result, output = fds[:2]
    # Opened anew: flags and locks of an open file would be the next program's too.
    null = os.open("/dev/null", os.O_RDWR)
    stdin, stderr = (fds[2], null) if len(fds) == 3 else (null, output)
    # Two steps, because a received number may be one of the targets.
    for target, fd in enumerate((stdin, output, stderr, result)):
        os.dup2(fd, _ASIDE_FD + target)
    for target in range(RESULT_FD + 1):
        os.dup2(_ASIDE_FD + target, target)
    ruleset = os.dup2(here.ruleset, RESULT_FD + 1) if here.ruleset >= 0 else RESULT_FD
    os.closerange(ruleset + 1, 1 << 30)
    if here.tier == "namespaces":
        _own_namespaces(here, profile)
    os.chdir(here.scratch)
    os.umask(0o077)
    _set_limits(here, limits)
    if here.drops_user:
        os.setgroups([])
        os.setresgid(here.uid, here.uid, here.uid)
        os.setresuid(here.uid, here.uid, here.uid)
        if os.getresuid() != (here.uid,) * 3 or os.getresgid() != (here.uid,) * 3:
            raise PermissionError(f"could not become uid {here.uid}")
    _drop_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)  # last but for the filters: a change of user clears it
    if ruleset != RESULT_FD:
        landlock.restrict(ruleset)
        os.close(ruleset)
    if here.filters:
        here.filters[profile].load()


def clear_scratch(here: Confinement) -> None:
    """Make the working directory empty again, whatever a program left there, where programs share one."""
    if here.tier != "process":
        return
    try:
        os.rmdir(here.scratch)
    except FileNotFoundError:
        pass
    except OSError:
        remove_tree(here.scratch)
    os.mkdir(here.scratch, 0o700)
    if here.drops_user:
        os.chown(here.scratch, here.uid, here.uid)


def remove_tree(path: str) -> None:
    """Remove a directory of any depth; `rm` walks without recursion, shutil does not."""
    pid = os.posix_spawnp("rm", ["rm", "-rf", "--", path], {"PATH": "/usr/bin:/bin"})
    os.waitpid(pid, 0)


def waited(here: Confinement, pidfd: int, pid: int) -> tuple[float, float]:
    """Return how long a process was runnable without a processor and how long its first thread ran, in seconds.

    (0.0, 0.0) where the kernel does not report it, and for a process that requested less than its share: it would be
    waiting of its own will.
    """
    if _scheduling(pid) != _scheduling(0):
        return 0.0, 0.0
    try:
        # The zygote knows the process by another number than the host's /proc.
        about = _read(here.proc, f"self/fdinfo/{pidfd}")
        number = next(line.split()[1] for line in about.splitlines() if line.startswith("Pid:"))
        ran, queued = _read(here.proc, f"{number}/schedstat").split()[:2]
    except OSError:
        return 0.0, 0.0
    return int(queued) / 1e9, int(ran) / 1e9


def _scheduling(pid: int) -> tuple[set[int], int, int]:
    return os.sched_getaffinity(pid), os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)


def living_children(here: Confinement) -> list[int]:
    """Return the pids of this process's children, orphans it inherited included.

    Empty where the kernel ends a program's processes with it, or it can have none.
    """
    if here.tier != "process":
        return []
    return [int(pid) for pid in _read(here.proc, "thread-self/children").split()]


def service(fd: int) -> int:
    """Return a copy of a descriptor above FIRST_SERVICE_FD, closed on exec."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_SERVICE_FD)


def unshare(*names: str) -> None:
    """Enter new namespaces of the given kinds; OSError when refused."""
    flags = 0
    for name in names:
        flags |= _CLONE[name]
    if _libc.unshare(flags) != 0:
        _check(-1, f"unshare {' and '.join(names)} namespace")


def _enter_namespaces(here: Confinement, base: str, packages: list[str]) -> None:
    if not here.drops_user:
        _enter_user_namespace()
        here.namespaces.add("user")
    unshare("mount", "ipc", "network", "pid")
    here.namespaces |= {"mount", "ipc", "network", "pid"}
    _try_namespaces(here, "uts", "cgroup")
    if "uts" in here.namespaces:
        for name in (_libc.sethostname, _libc.setdomainname):
            _check(name(_HOST_NAME, len(_HOST_NAME)), "hide the host's name")
    _continue_as_first_process()
    here.own_pid_ns = service(os.open("self/ns/pid", os.O_RDONLY, dir_fd=here.proc))
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _private_root(here, base, packages)


def _stay_on_the_host(here: Confinement, base: str, packages: list[str]) -> None:
    """Prepare the working directory and links to the packages below `base`; the host's file system stays in sight."""
    os.chmod(base, 0o711)
    here.scratch = f"{base}/work"
    os.mkdir(here.scratch, 0o555)
    if packages:
        here.packages = f"{base}/packages"
        os.mkdir(here.packages, 0o755)
        for path in packages:
            os.symlink(path, f"{here.packages}/{os.path.basename(path)}")
    if here.tier == "process":
        if not here.drops_user:
            _try_namespaces(here, "user")
        _try_namespaces(here, "network", "ipc")
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _drop_into_landlock(here: Confinement, base: str, packages: list[str], landlock: Any) -> None:
    readable = [path for path in here.shown if path not in _DEVICES] + packages + [here.scratch]
    if here.packages:
        readable.append(here.packages)
    here.ruleset = service(landlock.ruleset(readable, list(_DEVICES)))


def _try_namespaces(here: Confinement, *names: str) -> None:
    for name in names:
        try:
            if name == "user":
                _enter_user_namespace()
            else:
                unshare(name)
            here.namespaces.add(name)
        except OSError as error:
            here.notes.append(f"no {name} namespace: {error}")


def _own_namespaces(here: Confinement, profile: str) -> None:
    """Give the program about to run namespaces, a scratch directory and a /proc of its own."""
    unshare(*_PER_PROGRAM[profile])
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, _SCRATCH_OPTIONS)
    if here.has_proc:
        _mount("proc", "/proc", "proc", _PROC_FLAGS, "subset=pid")
    if profile == "compat":
        _mount("tmpfs", "/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, _SHARED_MEMORY_OPTIONS)
        fd = os.open(_HOSTS, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(fd, b"127.0.0.1 localhost\n::1 localhost\n")
        os.close(fd)
        _loopback_up()


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        (flags,) = struct.unpack_from("h", request, 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def _enter_user_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    unshare("user")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", name).write_text(text)


def _continue_as_first_process() -> None:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def _private_root(here: Confinement, base: str, packages: list[str]) -> None:
    """Make `base` the root: what `here.shown` names, the packages, empty /tmp, /proc and /dev/shm; read-only."""
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    hidden = [path for path in here.shown if path == "/tmp" or path.startswith("/tmp/")]
    if hidden:
        raise FileExistsError(f"{hidden[0]} would be hidden by a program's own /tmp: install the interpreter elsewhere")
    for path in here.shown:
        _show(path, base + path)
    for path in packages:
        here.packages = PACKAGES
        _show(path, f"{base}{PACKAGES}/{os.path.basename(path)}")
    for path in ("/tmp", "/proc", "/dev/shm"):
        os.makedirs(base + path, mode=0o755, exist_ok=True)
    # Programs of profile `compat` have a /dev/shm, and find the names of their loopback there.
    os.makedirs(f"{base}/etc", mode=0o755, exist_ok=True)
    os.symlink(_HOSTS, f"{base}/etc/hosts")
    try:
        # The lower one stays, unseen: the kernel shows a user namespace a new /proc only where it has one already.
        _mount("proc", f"{base}/proc", "proc", _PROC_FLAGS)
        _mount("proc", f"{base}/proc", "proc", _PROC_FLAGS, "subset=pid")
        here.has_proc = True
    except OSError as error:
        here.notes.append(f"programs have no /proc: {error}")
    _mount("none", base, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"pivot_root has no known number on {os.uname().machine}")
    os.chdir(base)
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount the old root")
    os.chdir("/")


def _interpreter_trees() -> list[str]:
    """Return the paths a running interpreter reads from, itself included, none inside another."""
    wanted = [
        *_READ_ONLY_TREES,
        f"{sys.base_prefix}/lib",
        os.path.dirname(os.__file__),
        os.path.realpath(sys.executable),
    ]
    shown: list[str] = []
    for path in wanted:
        is_inside = any(path == seen or path.startswith(f"{seen}/") for seen in shown)
        if os.path.exists(path) and not is_inside:
            shown.append(path)
    return shown


def _show(path: str, target: str) -> None:
    """Let `target` in the new root show the host's `path`: a directory or file, read-only, or a device."""
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(path) and os.path.isdir(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _MS_BIND | _MS_REC)
    # Whatever the host has mounted further down must become read-only as well, which a remount would not do.
    attributes = struct.pack("4Q", _MS_RDONLY | _MS_NOSUID | (0 if path in _DEVICES else _MS_NODEV), 0, 0, 0)
    done = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR), _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, len(attributes)
    )
    _check(done, f"make {path} read-only (Linux 5.12 or newer)")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    done = _libc.mount(source.encode(), target.encode(), kind.encode() if kind else None, flags, options.encode())
    if done != 0:
        _check(done, f"mount {source} on {target}")


def _set_limits(here: Confinement, limits: dict[str, Any]) -> None:
    memory = limits["memory_mb"] << 20
    wanted = {
        # Soft = hard: the first process of a pid namespace is deaf to the soft limit's signal.
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: here.base_as + memory,
        resource.RLIMIT_DATA: here.base_data + memory,
        resource.RLIMIT_FSIZE: limits["file_kb"] << 10,
        resource.RLIMIT_NOFILE: limits["max_files"],
        resource.RLIMIT_NPROC: _num_tasks(here, limits["max_processes"]),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    for name, value in wanted.items():
        hard = here.most[name]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def _num_tasks(here: Confinement, extra: int) -> int:
    """Return the limit that leaves a program `extra` tasks besides itself.

    The kernel counts the tasks of one user in one user namespace (before Linux 5.14 in all of them, which leaves a
    program fewer): the program, and, where the zygote is no other user, its two processes.
    """
    if here.tier == "landlock" or extra == 0:
        return 0
    return 1 + extra + (0 if here.drops_user else 2)


def _own_memory(here: Confinement) -> tuple[int, int]:
    """Return this process's address space and its data part, in bytes."""
    pages = _read(here.proc, "self/statm").split()
    return int(pages[0]) * resource.getpagesize(), int(pages[5]) * resource.getpagesize()


def _put_first_to_die(here: Confinement, score: str) -> None:
    fd = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=here.proc)
    try:
        os.write(fd, score.encode())
    finally:
        os.close(fd)


def _read(directory: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    try:
        return os.read(fd, 65_536).decode()
    finally:
        os.close(fd)


def _drop_capabilities() -> None:
    _check(_libc.capset(_CAPABILITY_VERSION, _NO_CAPABILITIES), "drop capabilities")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        _check(-1, f"prctl {option}")


def _check(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
