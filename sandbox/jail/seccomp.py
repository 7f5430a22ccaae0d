"""Which system calls a program may make: filters compiled by libseccomp, loaded without it.

Runs inside the zygote, loaded by path: standard library only. Two filters hold a program. The *base* filter is
loaded once by the zygote and inherited: an allow list of what computing needs and of what the zygote itself
still has to do (start a process, mount, change user). The *program* filter is loaded on top in every program's
process, as the last step of its lock-down, and takes away what only the zygote needed. The kernel applies the
stricter of the two, and loading the second costs one system call: nothing is compiled per program.

Profiles: `strict` computes, may start threads and nothing else; `compat` may also start processes and open
sockets and lock files, for tests that need them, inside namespaces of its own. Neither may make memory files or
System V memory, which no limit bounds; the same is true of locks, which a program on a shared file could also leave
in another one's way.

A call that is not allowed fails with EPERM. Calls that no honest program makes (tracing, loading code into the
kernel, mounting, keys, io_uring, another machine's calling convention) ends the program with SIGSYS.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_FAIL = 0x00050000
_NE, _EQ, _MASKED_EQ = 1, 4, 7
_ACT_BADARCH, _CTL_OPTIMIZE = 2, 8
_BINARY_TREE = 2
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020000
"""Every flag of clone that makes a namespace."""
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCK_STREAM, _SOCK_DGRAM, _SOCK_TYPES = 1, 2, 0xF
_SOCKETS = (
    *((_AF_UNIX, kind, 0) for kind in (_SOCK_STREAM, _SOCK_DGRAM)),
    *((family, _SOCK_STREAM, protocol) for family in (_AF_INET, _AF_INET6) for protocol in (0, 6)),
    *((family, _SOCK_DGRAM, protocol) for family in (_AF_INET, _AF_INET6) for protocol in (0, 17)),
)
"""Family, type, protocol: UNIX, TCP and UDP. Any other might have the kernel load a module."""
_SOL_SOCKET, _SO_PEERPIDFD = 1, 77
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_PID = 0x5EED5EE1
"""Stands for the program's own pid in a compiled filter, which `load` puts in its place."""

# Calls of a computing interpreter, whatever their arguments.
_COMPUTE = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
    open openat creat stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat
    getdents getdents64 getcwd chdir fchdir statfs fstatfs getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
    dup dup2 dup3 pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
    epoll_pwait2 eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime
    mmap mprotect munmap mremap madvise brk msync membarrier
    futex futex_waitv set_robust_list get_robust_list rseq set_tid_address arch_prctl sched_yield getcpu
    sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_min sched_get_priority_max getpriority
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
    pause alarm getitimer setitimer kill tkill tgkill wait4 waitid restart_syscall
    getpid gettid getppid getpgid getpgrp getsid getuid geteuid getgid getegid getresuid getresgid getgroups
    getrlimit setrlimit getrusage times sysinfo uname capget umask
    time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep getrandom exit exit_group
    recvfrom shutdown getsockname getpeername getsockopt fadvise64 fsync fdatasync ftruncate fallocate
    copy_file_range sendfile
"""
# Changes a program may make to files of its own. Landlock cannot forbid all of them, so its tier has none.
_CHANGE_FILES = """
    unlink unlinkat mkdir mkdirat rmdir rename renameat renameat2 link linkat symlink symlinkat
    chmod fchmod fchmodat truncate utime utimes utimensat futimesat
"""
_COMPAT_ONLY = """
    fork vfork execve socket connect bind listen accept accept4 sendmsg recvmsg sendmmsg recvmmsg setsockopt
    setpgid setsid pidfd_open pidfd_send_signal flock
"""
_ZYGOTE_EPERM = """
    capset setuid setgid setresuid setresgid setgroups setpriority landlock_restrict_self
"""
_ZYGOTE_KILL = "unshare setns mount umount2"
# Only while the zygote is between programs; its own filter denies them to every program alike.
_FORBIDDEN = """
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    keyctl add_key request_key open_by_handle_at
    pivot_root chroot umount fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr
    kexec_load kexec_file_load init_module finit_module delete_module create_module
    clock_settime settimeofday stime reboot swapon swapoff acct quotactl quotactl_fd syslog
    sethostname setdomainname iopl ioperm modify_ldt vhangup uselib fanotify_init
"""
# The C library falls back to an older call when these do not exist, and only then.
_MISSING = "clone3 openat2"

_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034)
"""Duplicate, flags, locks, and questions: not F_SETOWN, which sends signals, nor F_SETPIPE_SZ, which takes memory."""
_LOCKS = (6, 7, 37, 38)
"""Set a lock, of a process or of an open file: each takes memory that no limit bounds, and others see it."""
_MSG_OOB = 1
_ASK_ABOUT_PID = ("getpgid", "getsid", "sched_getaffinity", "sched_getparam", "sched_getscheduler")
"""Take a pid and answer for the host's processes; 0 is the caller."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Is it a terminal, how large, how much to read, non-blocking, close on exec."""
_PRCTL = (2, 3, 15, 16, 21, 23, 27, 30, 39, 0x53564D41)
"""Questions, the thread's name, and the name of a mapping."""
_ZYGOTE_PRCTL = (1, 4, _PR_SET_SECCOMP, 38)
"""Death signal, dumpable, seccomp, no_new_privs."""


_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


class FilterError(OSError):
    """libseccomp is missing, or a filter could not be built."""


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


class _Rule(NamedTuple):
    action: int
    call: str
    tests: tuple[tuple[int, int, int, int], ...] = ()
    """(argument, comparison, value, second value), all of which must hold."""


class Filter:
    """A compiled filter, ready to be loaded any number of times."""

    def __init__(self, code: bytes) -> None:
        self.num_instructions = len(code) // ctypes.sizeof(_Instruction)
        self._code = (_Instruction * self.num_instructions).from_buffer_copy(code)
        self._pids = [index for index, instruction in enumerate(self._code) if instruction.k == _PID]
        self._program = _Program(self.num_instructions, self._code)
        self._where = ctypes.c_ulong(ctypes.addressof(self._program))

    def load(self) -> None:
        """Put this process under the filter, for good; it must have no_new_privs. OSError when refused."""
        for index in self._pids:
            self._code[index].k = os.getpid()
        if _prctl(_PR_SET_SECCOMP, _MODE_FILTER, self._where, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"load a seccomp filter: {os.strerror(number)}")


def base_filter() -> Filter:
    """The allow list that a zygote loads once. FilterError when it cannot be built."""
    return _compile(_FAIL | errno.EPERM, _base_rules())


def program_filter(profile: str, *, is_alone: bool = False) -> Filter:
    """Rules for calls that a program may not make although its zygote may; on top of the base filter.

    `is_alone`: the program shares the host's processes and files (tier landlock), so it may start not even a
    thread, signal only itself, and change no file. FilterError when it cannot be built.
    """
    return _compile(_ALLOW, _program_rules(profile, is_alone))


def _base_rules() -> Iterator[_Rule]:
    for call in (_COMPUTE + _CHANGE_FILES + _COMPAT_ONLY + _ZYGOTE_EPERM + _ZYGOTE_KILL).split():
        if call != "socket":
            yield _Rule(_ALLOW, call)
    yield _Rule(_ALLOW, "sendto")
    yield _Rule(_ALLOW, "clone", ((0, _MASKED_EQ, _CLONE_NEW, 0),))
    yield _Rule(_ALLOW, "prlimit64", ((0, _EQ, 0, 0),))
    yield _Rule(_ALLOW, "socketpair", ((0, _EQ, _AF_UNIX, 0), (1, _MASKED_EQ, _SOCK_TYPES, _SOCK_STREAM)))
    for family, kind, protocol in _SOCKETS:
        tests = ((0, _EQ, family, 0), (1, _MASKED_EQ, _SOCK_TYPES, kind), (2, _EQ, protocol, 0))
        yield _Rule(_ALLOW, "socket", tests)
    for command in _FCNTL:
        yield _Rule(_ALLOW, "fcntl", ((1, _EQ, command, 0),))
    for request in (*_IOCTL, _SIOCGIFFLAGS, _SIOCSIFFLAGS):
        yield _Rule(_ALLOW, "ioctl", ((1, _EQ, request, 0),))
    for option in (*_PRCTL, *_ZYGOTE_PRCTL):
        yield _Rule(_ALLOW, "prctl", ((0, _EQ, option, 0),))
    for call in _FORBIDDEN.split():
        yield _Rule(_KILL, call)
    for call in _MISSING.split():
        yield _Rule(_FAIL | errno.ENOSYS, call)


def _program_rules(profile: str, is_alone: bool) -> Iterator[_Rule]:
    fail = _FAIL | errno.EPERM
    for call in _ZYGOTE_KILL.split():
        yield _Rule(_KILL, call)
    for call in _ZYGOTE_EPERM.split():
        yield _Rule(fail, call)
    for option in _ZYGOTE_PRCTL:
        yield _Rule(fail, "prctl", ((0, _EQ, option, 0),))
    yield _Rule(fail, "ioctl", ((1, _EQ, _SIOCSIFFLAGS, 0),))
    # Of a socket's other end, which is the host's: a handle of a process has no use that is the program's business.
    yield _Rule(fail, "getsockopt", ((1, _EQ, _SOL_SOCKET, 0), (2, _EQ, _SO_PEERPIDFD, 0)))
    # It succeeds and does nothing: who yields without end on a busy machine would seem to be kept waiting by others.
    yield _Rule(_FAIL, "sched_yield")
    if profile == "strict":
        for call in _COMPAT_ONLY.split():
            yield _Rule(fail, call)
        yield _Rule(fail, "sendto", ((4, _NE, 0, 0),))  # to an address: only a connected pair may talk
        yield _Rule(fail, "sendto", ((3, _MASKED_EQ, _MSG_OOB, _MSG_OOB),))
        for command in _LOCKS:
            yield _Rule(fail, "fcntl", ((1, _EQ, command, 0),))
        if not is_alone:
            yield _Rule(fail, "clone", ((0, _MASKED_EQ, _CLONE_THREAD, 0),))
    if is_alone:
        yield _Rule(fail, "clone")
        for call in _CHANGE_FILES.split():
            yield _Rule(fail, call)
        for call in ("kill", "tkill", "tgkill"):
            yield _Rule(fail, call, ((0, _NE, _PID, 0),))
        for call in _ASK_ABOUT_PID:
            yield _Rule(fail, call, ((0, _NE, 0, 0),))
        yield _Rule(fail, "getpriority", ((1, _NE, 0, 0),))


def _compile(default: int, rules: Iterator[_Rule]) -> Filter:
    library = _library()
    context = library.seccomp_init(ctypes.c_uint32(default))
    if not context:
        raise FilterError(errno.ENOSYS, "libseccomp does not know this machine")
    try:
        _need(library.seccomp_attr_set(context, _ACT_BADARCH, ctypes.c_uint32(_KILL)), "kill foreign system calls")
        if default != _ALLOW:
            _need(library.seccomp_attr_set(context, _CTL_OPTIMIZE, ctypes.c_uint32(_BINARY_TREE)), "sort the filter")
        for rule in rules:
            number = library.seccomp_syscall_resolve_name(rule.call.encode())
            if number < 0:
                continue  # not a call of this machine, or younger than the library: it falls under the default
            tests = (_Compare * len(rule.tests))(*(_Compare(*test) for test in rule.tests))
            added = library.seccomp_rule_add_array(context, ctypes.c_uint32(rule.action), number, len(tests), tests)
            _need(added, f"rule for {rule.call}")
        fd = os.memfd_create("filter")
        try:
            _need(library.seccomp_export_bpf(context, fd), "export")
            return Filter(os.pread(fd, os.fstat(fd).st_size, 0))
        finally:
            os.close(fd)
    finally:
        library.seccomp_release(context)


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise FilterError(errno.ENOENT, f"libseccomp.so.2 is needed to filter system calls: {error}") from error
    library.seccomp_init.restype = ctypes.c_void_p
    for name, arguments in {
        "seccomp_init": [ctypes.c_uint32],
        "seccomp_release": [ctypes.c_void_p],
        "seccomp_attr_set": [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32],
        "seccomp_syscall_resolve_name": [ctypes.c_char_p],
        "seccomp_rule_add_array": [
            ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare),
        ],
        "seccomp_export_bpf": [ctypes.c_void_p, ctypes.c_int],
    }.items():  # fmt: skip
        getattr(library, name).argtypes = arguments
    return library


def _need(status: int, what: str) -> None:
    if status != 0:
        raise FilterError(-status, f"libseccomp, {what}: {os.strerror(-status)}")
