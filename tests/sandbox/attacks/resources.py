"""Programs that use more than their share, and ask the host to do so."""

from __future__ import annotations

from attacks.record import ENDED, REFUSED, UNPAID, Program, probe, steps

_TOO_MUCH = ("ok: raised MemoryError", "ok: raised OverflowError", "ok: refused MemoryError", *ENDED)


def _calls(name: str, source: str, *expect: str, **more: object) -> Program:
    return Program(name=name, source=source, expect=expect or UNPAID, **more)  # type: ignore[arg-type]


def _stdio(name: str, source: str, *expect: str, **more: object) -> Program:
    return Program(name=name, source=source, expect=expect, mode="stdio", **more)  # type: ignore[arg-type]


_FILL = """
def f(x):
    total = 0
    for n in range(200):
        try:
            fd = os.open(f"hostile-{n}", os.O_CREAT | os.O_WRONLY)
            total += os.write(fd, bytes(SIZE))
            os.close(fd)
        except OSError: return total >> 20
    return total >> 20
"""

PROGRAMS = (
    _calls("loop", "def f(x):\n    while True: pass", "timeout*"),
    _calls("one long operation", "def f(x): return 3 ** 3 ** 3 ** 3", "timeout*", *_TOO_MUCH),
    _calls(
        "a regular expression without end",
        "import re\ndef f(x): return re.match(r'(a+)+$', 'a' * 64 + 'b')",
        "timeout*",
    ),
    _calls(
        "deaf to signals",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "timeout*",
    ),
    # Each input fills the memory again, so on a slow machine the time may be up before the last one.
    _calls(
        "memory by a list",
        "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 20))",
        *_TOO_MUCH,
        "timeout*",
    ),
    _calls("memory at once", "def f(x): return len(bytearray(1 << 40))", *_TOO_MUCH),
    _calls("memory by text", "def f(x): return len('ab' * 10 ** 12)", *_TOO_MUCH),
    _calls("memory shared with nobody", probe("len(mmap.mmap(-1, 1 << 30))", "import mmap"), *REFUSED),
    _calls("memory mapped without a file", probe("len(mmap.mmap(-1, 1 << 30, flags=0x22))", "import mmap"), *REFUSED),
    _calls("memory in a file of memory", probe("os.memfd_create('hostile')"), *REFUSED, works=("ok: WORKED *",)),
    _calls(
        "memory locked",
        probe("libc.mlockall(7) and os.kill(1 << 22, 0)", "import ctypes\nlibc = ctypes.CDLL(None)"),
        "ok: refused *",
        "violation*",
    ),
    _calls(
        "shared memory of the system",
        probe("libc.shmget(0x600d, 1 << 30, 0o1666)", "import ctypes\nlibc = ctypes.CDLL(None)"),
        "ok: WORKED -1",
        *REFUSED,
    ),
    _calls(
        "a list that never ends", "import itertools\ndef f(x): return list(itertools.count())", *_TOO_MUCH, "timeout*"
    ),
    _calls("recursion", "def f(x): return f(x) + 1", "ok: raised RecursionError"),
    _calls(
        "recursion without a limit",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x) + 1",
        *_TOO_MUCH,
        "timeout*",
    ),
    _calls(
        "recursion of C",
        "a = []\nimport sys\nsys.setrecursionlimit(10 ** 9)\nfor _ in range(10 ** 6): a = [a]\n"
        "def f(x): return repr(a)",
        *ENDED,
        "timeout",  # a slow processor reaches its limit before the end of the stack
    ),
    _calls(
        "fill the disk",
        "import os" + _FILL.replace("SIZE", "1 << 20"),
        "ok: [0-9]",
        "ok: [0-9][0-9]",
        tiers={"process": ("ok: *", "timeout*")},
        limits={"cpu_seconds": 4},
    ),
    _calls(
        "use up the inodes",
        "import os\ndef f(x):\n    for n in range(6000):\n        try: os.mkdir(str(n))\n"
        "        except OSError: return n\n    return 'no limit'",
        "ok: [0-9]*",
        limits={"cpu_seconds": 4},
        tiers={"process": ("ok: no limit", "timeout*")},
    ),
    _calls(
        "one huge file",
        probe(
            "sum(os.write(fd, bytes(1 << 20)) for _ in range(4096))",
            "try: fd = os.open('hostile-big', os.O_CREAT | os.O_WRONLY)\nexcept OSError: fd = -1",
        ),
        *REFUSED,
    ),
    _calls(
        "a file of holes",
        steps("fd = os.open('hostile-holes', os.O_CREAT | os.O_WRONLY)\nreturn os.ftruncate(fd, 1 << 40)"),
        *REFUSED,
    ),
    _calls(
        "a file set aside",
        steps("fd = os.open('hostile-set', os.O_CREAT | os.O_WRONLY)\nreturn os.posix_fallocate(fd, 0, 1 << 36)"),
        *REFUSED,
    ),
    _calls("all descriptors", probe("[os.dup(0) for _ in range(100_000)]"), "ok: refused EMFILE"),
    _calls(
        "memory of the kernel by pipes",
        steps(
            "total = 0\nfor _ in range(1000):\n    r, w = os.pipe()\n"
            "    os.set_blocking(w, False)\n    try:\n        while True: total += os.write(w, bytes(65536))\n"
            "    except BlockingIOError: pass"
        ),
        "ok: refused EMFILE",
    ),
    _calls(
        "large pipes",
        probe("fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)", "import fcntl"),
        "ok: refused *",
        works=("ok: WORKED *",),
    ),
    # Taking a digest of much costs the program its own CPU time.
    _calls("a huge reply", "def f(x): return 'x' * (64 << 20)", "output_limit*", "ok: Digest*", "timeout*"),
    _calls(
        "a huge reply of few characters",
        "def f(x): return chr(0x10ffff) * (1 << 20)",
        "output_limit*",
        "ok*",
        "timeout*",
    ),
    _calls("a reply of many values", "def f(x): return [0] * 1_000_000", "output_limit*", "ok*", "timeout*"),
    _calls(
        "a reply that shares its parts",
        "def f(x):\n    a = [0]\n    for _ in range(60): a = [a, a]\n    return a",
        "ok: Opaque*",
        "timeout*",
    ),
    _calls("a reply within itself", "def f(x):\n    a = []\n    a.append(a)\n    return a", "ok*"),
    _calls(
        "a reply whose hashes collide", "def f(x): return {n * (2 ** 61 - 1) for n in range(500)}", "ok*", "protocol*"
    ),
    _calls("a reply of huge numbers", "def f(x): return [1 << 2_000_000] * 8", "ok*", "output_limit*"),
    _calls("an exception with a huge text", "def f(x): raise ValueError('x' * (8 << 20))", "ok: raised ValueError"),
    _calls(
        "an exception whose type has a huge name",
        "def f(x): raise type('E' * (1 << 20), (Exception,), {})()",
        "ok: raised EEE*",
    ),
    _calls(
        "an exception that takes its time",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f(x): raise E()",
        "timeout*",
    ),
    _calls("much printing", "def f(x):\n    for _ in range(1000): print('x' * 10_000)\n    return 0", "ok: 0"),
    _stdio("printing without end", "while True: print('x' * 10_000)", "output_limit*"),
    _stdio(
        "complaining without end", "import sys\nwhile True: sys.stderr.write('x' * 10_000)", "timeout*", "output_limit*"
    ),
    _stdio("printing nothing but line ends", "print('\\n' * 100_000)", "ok*"),
    _calls(
        "unpacks a bomb",
        "import zlib\ndef f(x):\n    d = zlib.compress(bytes(64 << 20))\n"
        "    return len(b''.join(zlib.decompress(d) for _ in range(64)))",
        *_TOO_MUCH,
        "timeout*",
    ),
    _calls(
        "garbage that is never collected",
        "import gc\ngc.disable()\ndef f(x):\n    while True:\n        a = [bytearray(1 << 16)]\n        a.append(a)",
        *_TOO_MUCH,
    ),
)
