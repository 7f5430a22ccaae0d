"""Landlock: what a process may open, held by the kernel without any privilege.

Runs inside the zygote, loaded by path: standard library only. A ruleset handles every right that the kernel's
Landlock knows and grants back only reading below the paths given, so that all else is refused: writing,
creating, connecting, and, where the kernel knows scopes, signals and abstract sockets.

Landlock does not stop a program from asking whether a path exists, from changing a file's mode or times, or
from using sockets and signals on older kernels: the seccomp filter of the tier does.
"""

from __future__ import annotations

import ctypes
import os
import stat

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_RULE_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""Rights on files by the version that brought them: the first thirteen, refer, truncate, device ioctl."""
_NETWORK_RIGHTS = {4: 0b11}
"""Bind and connect a TCP port."""
_SCOPES = {6: 0b11}
"""Abstract UNIX sockets, signals."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """Return the version of the kernel's Landlock, 1 or more. OSError when it has none, or it is turned off."""
    return _call(_CREATE_RULESET, None, 0, _ASK_VERSION, what="ask for landlock's version")


def ruleset(readable: list[str], writable: list[str]) -> int:
    """Return the descriptor of a ruleset: reading below `readable`, reading and writing the files `writable`.

    Paths that do not exist are left out. OSError when the kernel refuses.
    """
    known = version()
    rules = _Ruleset(
        files=_known(_FILE_RIGHTS, known), network=_known(_NETWORK_RIGHTS, known), scopes=_known(_SCOPES, known)
    )
    # Older kernels know a shorter record and insist that what they do not know is zero, which it is.
    fd = _call(_CREATE_RULESET, ctypes.byref(rules), ctypes.sizeof(rules), 0, what="create a landlock ruleset")
    for path in readable:
        _allow(fd, path, _READ_FILE | _READ_DIR)
    for path in writable:
        _allow(fd, path, _READ_FILE | _WRITE_FILE)
    return fd


def restrict(fd: int) -> None:
    """Put this process under the ruleset, for good; it must have no_new_privs. OSError when refused."""
    _call(_RESTRICT_SELF, fd, 0, what="enter a landlock domain")


def _known(rights: dict[int, int], known: int) -> int:
    return sum(mask for since, mask in rights.items() if since <= known)


def _allow(ruleset_fd: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            rights &= ~_READ_DIR
        rule = _PathBeneath(rights, parent)
        _call(_ADD_RULE, ruleset_fd, _RULE_PATH_BENEATH, ctypes.byref(rule), 0, what=f"allow {path} in landlock")
    finally:
        os.close(parent)


def _call(number: int, *arguments: object, what: str) -> int:
    done: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return done
