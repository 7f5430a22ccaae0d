"""Doors of the kernel that no honest program knocks on. Numbers of x86-64; elsewhere this module has no programs."""

from __future__ import annotations

import platform

from attacks.record import UNPAID, Program

_CALL = """
import ctypes, errno, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *args):
    ctypes.set_errno(0)
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *plain)
    code = ctypes.get_errno()
    return f"refused {errno.errorcode.get(code, code)}" if result == -1 and code else f"WORKED {result}"
def machine_code(code):
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(code)
    where = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result = ctypes.CFUNCTYPE(ctypes.c_int)(where)()
    return f"refused {result}" if result < 0 else f"WORKED {result}"
zeros = ctypes.create_string_buffer(4096)
"""
_FILTERED = ("ok: refused EPERM", "ok: refused ENOSYS", "violation*")
"""The error of a filter, whatever the arguments; any other error would come from the call itself."""
_WORKED = ("ok: WORKED *",)
_ANYHOW = ("ok: *", "violation*", "crash*")

# name: (number and arguments, works where nothing contains it). Arguments are such that success does no lasting harm.
_CALLS = {
    "trace itself": ("101, 0, 0, 0, 0", True),
    "trace another": ('101, 16, HOST["twin"], 0, 0', False),
    "seize another": ('101, 0x4206, HOST["twin"], 0, 0', False),
    "read another's memory": ('310, HOST["twin"], zeros, 1, zeros, 1, 0', False),
    "write another's memory": ('311, HOST["twin"], zeros, 1, zeros, 1, 0', False),
    "compare with another": ('312, os.getpid(), HOST["twin"], 0, 0, 0', False),
    "take another's descriptor": ("438, 0, 0, 0", False),
    "advise another's memory": ("440, 0, zeros, 1, 0, 0", False),
    "load a program into the kernel": ("321, 0, zeros, 72", False),
    "set up a ring": ("425, 8, zeros", None),
    "enter a ring": ("426, 0, 0, 0, 0, 0, 0", False),
    "register with a ring": ("427, 0, 0, 0, 0", False),
    "use keys": ("250, 0, -3, 0, 0, 0", True),
    "join a keyring": ("250, 1, b'hostile', 0, 0, 0", True),
    "add a key": ("248, b'user', b'hostile', b'x', 1, -1", True),
    "ask for a key": ("249, b'user', b'hostile', 0, -3", False),
    "mount": ("165, b'none', b'/tmp', b'tmpfs', 0, 0", False),
    "mount over itself": ("165, b'/', b'/tmp', 0, 4096, 0", False),
    "remount writable": ("165, b'none', b'/usr', 0, 32 | 4096, 0", False),
    "unmount": ("166, b'/tmp', 2", False),
    "exchange roots": ("155, b'.', b'.'", False),
    "open a file system": ("430, b'tmpfs', 0", False),
    "open a tree": ("428, -100, b'/', 1", False),
    "move a mount": ("429, -1, b'', -1, b'', 0", False),
    "change a mount": ("442, -100, b'/', 0, zeros, 32", False),
    "join another's namespaces": ("308, 0, 0", False),
    "a user namespace": ("272, 0x10000000", True),
    "a mount namespace": ("272, 0x00020000", False),
    "a network namespace": ("272, 0x40000000", False),
    "a user namespace by cloning": ("56, 0x10000000 | 17, 0, 0, 0, 0", None),
    "a process by the newest call": ("435, zeros, 88", None),
    "a process by the oldest call": ("57,", None),
    "a process that borrows memory": ("58,", None),
    "measure events": ("298, zeros, 0, -1, -1, 0", False),
    "handle its own faults": ("323, 1", None),
    "a file in memory": ("319, b'hostile', 0", True),
    "a secret file in memory": ("447, 0", None),
    "a name for a file that survives": ('303, -100, HOST["file"].encode(), zeros, zeros, 0', False),
    "open a file by such a name": ("304, -100, zeros, 0", False),
    "another kernel": ("246, 0, 0, 0, 0", False),
    "another kernel from a file": ("320, -1, -1, 0, 0, 0", False),
    "load a module": ("175, zeros, 0, b''", False),
    "load a module from a file": ("313, 0, b'', 0", False),
    "unload a module": ("176, b'hostile', 0", False),
    "set the clock": ("227, 0, zeros", False),
    "set the clock by the older call": ("164, zeros, 0", False),
    "adjust the clock": ("159, ctypes.byref(ctypes.c_uint(1))", False),
    "restart the machine, with the wrong words": ("169, 0, 0, 0, 0", False),
    "swap to a file": ("167, b'/hostile', 0", False),
    "name the host": ("170, b'hostile', 7", False),
    "name the domain": ("171, b'hostile', 7", False),
    "touch ports": ("173, 0x80, 1, 1", False),
    "touch all ports": ("172, 3", False),
    "account for processes": ("163, b'/hostile'", False),
    "clear the kernel's messages": ("103, 5, 0, 0", False),
    "watch all files": ("300, 0, 0", None),
    "be another kind of machine": ("135, 0x0040000", True),
    "change the segments of memory": ("154, 1, zeros, 16", None),
    "move another's pages": ('279, HOST["twin"], 0, 0, 0, 0, 0', False),
    "hang up the terminal": ("153,", False),
    "put every capability back": ("126, zeros, zeros", None),
    "take the terminal's input": ("16, 0, 0x5412, b'x'", False),
    "be traceable again": ("157, 4, 1, 0, 0, 0", True),
    "forget that it dies with its parent": ("157, 1, 0, 0, 0, 0", True),
    "gain privileges again": ("157, 38, 0, 0, 0, 0", False),
    "move its own segments": ("157, 35, 1, 4096, 0, 0", False),
    "a filter that lies": ("317, 1, 0, zeros", False),
    "a call that does not exist": ("100000, 0", False),
}
# Success of these is no harm, in any tier.
_HARMLESS = {"put every capability back", "be another kind of machine"}


def _programs() -> tuple[Program, ...]:
    calls = tuple(
        Program(
            name=name,
            source=f"{_CALL}\ndef f(x): return call({arguments})",
            expect=_FILTERED if name not in _HARMLESS else _ANYHOW,
            tiers={"process": _ANYHOW if works is not None else UNPAID},
            works=_WORKED if works else (),
        )
        for name, (arguments, works) in _CALLS.items()
    )
    # getpid by a door with other numbers: an allow list of this machine's numbers would not see it.
    foreign = {
        "the door of 32-bit programs": ("b814000000cd80c3", None),
        "the door of small pointers": ("b8270000400f05c3", None),
    }
    return calls + tuple(
        Program(
            name=name,
            source=f"{_CALL}\ndef f(x): return machine_code(bytes.fromhex({code!r}))",
            expect=("violation*", "ok: refused -1", "ok: refused -38"),
            tiers={"process": _ANYHOW},
        )
        for name, (code, _) in foreign.items()
    )


PROGRAMS = _programs() if platform.machine() == "x86_64" else ()
