"""What a zygote asks of the kernel, once for itself and once per program.

Runs inside the zygote, loaded by path: standard library only. Each request that the kernel refuses is noted
in the `Confinement` and not papered over; whether the rest is enough is decided by the host.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIRST_SERVICE_FD = 200
"""The zygote's own descriptors lie above, so that placing a program's at 0..3 cannot overwrite one."""
RESULT_FD = 3

_CLONE = {
    "mount": 0x00020000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE, _MS_RELATIME = 32, 4096, 16384, 1 << 18, 1 << 21
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 1, 4, 38, 36
_SIGKILL = 9
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SCRATCH_OPTIONS = "mode=0777,size=64m,nr_inodes=4096"
_READ_ONLY_TREES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_READ_ONLY_FILES = ("/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True, kw_only=True)
class Confinement:
    """What took effect, and what a program needs to be started under it."""

    uid: int
    drops_user: bool
    """True: the zygote is root and every program becomes `uid`."""
    namespaces: set[str] = field(default_factory=set)
    has_private_root: bool = False
    scratch: str = "/tmp"
    """The program's working directory; empty when it starts."""
    notes: list[str] = field(default_factory=list)
    own_pid_ns: int = -1
    proc: int = -1
    """Descriptor of a /proc that shows this zygote's processes; -1 where there is none."""
    null: int = -1
    base_as: int = 0
    """Address space of the zygote, in bytes; limits of a program come on top."""
    base_data: int = 0


def enter(base: str, uid: int) -> Confinement:
    """Put this process into whatever namespaces it is given and return what took effect.

    `base` is an empty directory of ours on the host, `uid` the user that programs become when this process is
    root. With a pid namespace the process forks: the caller goes on as its first process, and the one in
    between only waits, so that killing either ends everything below. Raises OSError when not even the uid
    can be changed.
    """
    is_root = os.geteuid() == 0
    here = Confinement(uid=uid if is_root else os.getuid(), drops_user=is_root)
    here.base_as, here.base_data = _own_memory()
    here.null = service(os.open("/dev/null", os.O_RDWR))
    if not is_root:
        _try(here, "user", _enter_user_namespace)
    if is_root or "user" in here.namespaces:
        for name in ("mount", "ipc", "network", "pid"):
            _try(here, name, lambda name=name: unshare(name))
    if "pid" in here.namespaces:
        _continue_as_first_process()
    else:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        here.proc = service(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY))
    if "mount" in here.namespaces:
        try:
            _private_mounts()
            if "pid" in here.namespaces:
                here.own_pid_ns, here.proc = _own_proc(base)
            _private_root(base)
            here.has_private_root = True
        except OSError as error:
            here.notes.append(f"no private root: {error}")
            _libc.umount2(base.encode(), _MNT_DETACH)  # a half-built root would hide the directory we fall back to
    if "pid" in here.namespaces and here.own_pid_ns < 0:
        # Without a /proc of its own the zygote cannot return from a program's pid namespace to start the
        # next.
        here.namespaces.discard("pid")
        here.notes.append("no pid namespace per program: no /proc of our own")
    if not here.has_private_root:
        here.scratch = os.path.join(base, "work")
        os.chmod(base, 0o711)
    return here


def before_fork(here: Confinement) -> None:
    """Let the next child be the first process of a pid namespace of its own."""
    if "pid" in here.namespaces:
        _check(_libc.setns(here.own_pid_ns, _CLONE["pid"]), "setns to the own pid namespace")
        unshare("pid")


def lock_down(here: Confinement, limits: dict[str, Any], fds: list[int]) -> None:
    """Give up, for good, everything the program about to run must not have. Called in its process.

    `fds` is [result] or [result, stdin, stdout]. Raises OSError when anything is refused: the program must
    not start then.
    """
    os.setsid()
    result, stdin, stdout = fds if len(fds) == 3 else (fds[0], here.null, here.null)
    # Two steps, because a received number may be one of the targets.
    placed = [service(fd) for fd in (stdin, stdout, here.null, result)]
    for target, fd in enumerate(placed):
        os.dup2(fd, target)
    os.closerange(RESULT_FD + 1, 1 << 30)
    if "ipc" in here.namespaces:
        unshare("ipc")
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
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)  # last: a change of user clears it


def clear_scratch(here: Confinement) -> None:
    """Make the working directory empty again, whatever a program left there."""
    if here.has_private_root:
        with os.scandir(here.scratch) as entries:
            if next(entries, None) is None:
                return
        # A fresh file system instead of a walk: a hostile tree can be deeper than any walk likes.
        _check(_libc.umount2(here.scratch.encode(), _MNT_DETACH), "umount scratch")
        _mount("tmpfs", here.scratch, "tmpfs", _MS_NOSUID | _MS_NODEV, _SCRATCH_OPTIONS)
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


def queued_seconds(here: Confinement, pid: int) -> float:
    """Return how long the process was runnable without a processor; 0.0 where the kernel does not tell.

    Also 0.0 for a process that asked for less than its share: it would be waiting of its own will.
    """
    if here.proc < 0 or _scheduling(pid) != _scheduling(0):
        return 0.0
    try:
        fd = os.open(f"{pid}/schedstat", os.O_RDONLY, dir_fd=here.proc)
    except OSError:
        return 0.0
    try:
        return int(os.read(fd, 100).split()[1]) / 1e9
    finally:
        os.close(fd)


def _scheduling(pid: int) -> tuple[set[int], int, int]:
    return os.sched_getaffinity(pid), os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)


def living_children(here: Confinement) -> list[int]:
    """Return the pids of this process's children, orphans it inherited included.

    Empty where programs have a pid namespace: there the kernel has ended them all.
    """
    if "pid" in here.namespaces:
        return []
    fd = os.open("thread-self/children", os.O_RDONLY, dir_fd=here.proc)
    try:
        return [int(pid) for pid in os.read(fd, 65536).split()]
    finally:
        os.close(fd)


def service(fd: int) -> int:
    """Return a copy of a descriptor above FIRST_SERVICE_FD, closed on exec."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_SERVICE_FD)


def unshare(name: str) -> None:
    """Enter a new namespace of the given kind; OSError when refused."""
    _check(_libc.unshare(_CLONE[name]), f"unshare {name} namespace")


def _try(here: Confinement, name: str, enter: Any) -> None:
    try:
        enter()
        here.namespaces.add(name)
    except OSError as error:
        here.notes.append(f"no {name} namespace: {error}")


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


def _private_mounts() -> None:
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)


def _own_proc(base: str) -> tuple[int, int]:
    _mount("proc", base, "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    proc = service(os.open(base, os.O_RDONLY | os.O_DIRECTORY))
    own = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)
    _check(_libc.umount2(base.encode(), _MNT_DETACH), "umount proc")
    return service(own), proc


def _private_root(base: str) -> None:
    """Make `base` the root: system libraries and the interpreter read-only, five devices, an empty /tmp."""
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    for path in _interpreter_trees():
        _show(path, base)
    for path in (*_READ_ONLY_FILES, *_DEVICES):
        if os.path.exists(path):
            _show(path, base, is_device=path in _DEVICES)
    os.mkdir(f"{base}/tmp")
    _mount("tmpfs", f"{base}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, _SCRATCH_OPTIONS)
    _mount("none", base, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root has no known number on {os.uname().machine}")
    os.chdir(base)
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount the old root")
    os.chdir("/")


def _interpreter_trees() -> list[str]:
    """Return the directories a running interpreter reads from, none inside another."""
    wanted = [*_READ_ONLY_TREES, f"{sys.base_prefix}/lib", os.path.dirname(os.__file__)]
    shown: list[str] = []
    for path in wanted:
        is_inside = any(path == seen or path.startswith(f"{seen}/") for seen in shown)
        if os.path.exists(path) and not is_inside:
            shown.append(path)
    return shown


def _show(path: str, base: str, is_device: bool = False) -> None:
    target = base + path
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(path) and not is_device and os.path.isdir(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _MS_BIND | _MS_REC)
    if not is_device:
        # A remount inside a user namespace must keep the flags the mount came with, or it is refused.
        flags = os.statvfs(target).f_flag
        kept = flags & (_MS_NODEV | _MS_NOEXEC | 1024 | 2048) | (_MS_RELATIME if flags & 4096 else 0)
        _mount("none", target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | kept)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    done = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode(),
    )
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
        resource.RLIMIT_NPROC: limits["max_processes"] and limits["max_processes"] + 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    for name, value in wanted.items():
        _, hard = resource.getrlimit(name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def _own_memory() -> tuple[int, int]:
    """Return this process's address space and its data part, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[5]) * resource.getpagesize()


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "drop capabilities")


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _check(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
