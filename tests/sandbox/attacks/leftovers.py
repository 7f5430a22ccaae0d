"""Traces of one program, which a second program on the same worker looks for."""

from __future__ import annotations

from attacks.record import REFUSED, UNPAID, Program, probe, steps

ANY = ("ok: WORKED *", *REFUSED)


def _left(
    name: str, leave: str, look: str, *, before: str = "", expect: tuple[str, ...] = ANY, **more: object
) -> Program:
    """`look` is an expression that is true when the trace of the first program is found; `before`: what it needs."""
    then = f"{before}\nimport os, sys\ndef f(x):\n    try: found = {look}\n    except OSError: found = False\n"
    then += "    return 'a trace' if found else 'clean'"
    return Program(name=name, source=leave, then=then, expect=expect, **more)  # type: ignore[arg-type]


_WITH_LOCKS = "import fcntl, struct"
_LOCK = "struct.pack('hhqqi4x', 1, 0, 0, 0, 0)"
# For the program that looks. The kernel is asked what lock is in the way of one of ours; flock can only be tried.
_LOOK_FOR_LOCKS = f"""
import errno, fcntl, os, struct
def is_locked(question):
    told = fcntl.fcntl(os.open('/dev/null', os.O_RDWR), question, {_LOCK})
    return told[:2] != struct.pack('h', fcntl.F_UNLCK)
def is_flocked():
    try: return fcntl.flock(os.open(os.__file__, 0), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error: return error.errno == errno.EAGAIN
"""
_CREATE = "os.close(os.open({!r}, os.O_CREAT | os.O_WRONLY, 0o777))"
_C = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)"
_THEN_C = "__import__('ctypes').CDLL(None)"

PROGRAMS = (
    _left("a file in the working directory", probe(_CREATE.format("hostile")), "os.listdir('.')"),
    _left(
        "a file in /tmp",
        probe(_CREATE.format("/tmp/hostile")),
        "os.path.exists('/tmp/hostile')",
        tiers={"process": ("ok: *",)},
        works=("ok: WORKED *",),
    ),
    _left(
        "a file in shared memory",
        probe(_CREATE.format("/dev/shm/hostile")),
        "os.path.exists('/dev/shm/hostile')",
        works=("ok: WORKED *",),
    ),
    _left(
        "a file in /var/tmp",
        probe(_CREATE.format("/var/tmp/hostile")),
        "os.path.exists('/var/tmp/hostile')",
        works=("ok: WORKED *",),
    ),
    _left("a file below the root", probe(_CREATE.format("/hostile")), "os.path.exists('/hostile')"),
    _left("a file among the devices", probe(_CREATE.format("/dev/hostile")), "os.path.exists('/dev/hostile')"),
    _left(
        "shared memory of the system",
        probe("libc.shmget(4711, 4096, 0o1666)", _C),
        f"{_THEN_C}.shmget(4711, 4096, 0) != -1",
        works=("ok: WORKED [0-9]*",),
    ),
    _left(
        "a semaphore of the system",
        probe("libc.semget(4711, 1, 0o1666)", _C),
        f"{_THEN_C}.semget(4711, 1, 0) != -1",
        works=("ok: WORKED [0-9]*",),
    ),
    _left(
        "a message queue of the system",
        probe("libc.msgget(4711, 0o1666)", _C),
        f"{_THEN_C}.msgget(4711, 0) != -1",
        works=("ok: WORKED [0-9]*",),
    ),
    _left(
        "a message queue by name",
        probe("libc.syscall(240, b'hostile', 0o102, 0o666, None)", _C),
        f"{_THEN_C}.syscall(240, b'hostile', 2, 0, None) != -1",
    ),
    _left(
        "a listener without a path",
        steps("s = socket.socket(socket.AF_UNIX)\ns.bind('\\0hostile')\ns.listen()", "import socket"),
        "__import__('socket').socket(1).connect('\\0hostile') is None",
    ),
    _left(
        "a patched module",
        "import json, math\njson.dumps = math.sqrt = None\ndef f(x): return 0",
        "__import__('math').sqrt is None or __import__('json').dumps is None",
        expect=UNPAID,
    ),
    _left(
        "a patched builtin",
        "import builtins\nbuiltins.hostile = 1\ndef f(x): return 0",
        "hasattr(__import__('builtins'), 'hostile')",
        expect=UNPAID,
    ),
    _left(
        "a module of its own",
        "import sys\nsys.modules['hostile'] = sys\nsys.path.insert(0, '.')\ndef f(x): return 0",
        "'hostile' in sys.modules or '.' in sys.path",
        expect=UNPAID,
    ),
    _left(
        "a module where imports look first",
        probe("os.write(os.open('json.py', os.O_CREAT | os.O_WRONLY), b'x = 1')"),
        "hasattr(__import__('json'), 'x')",
    ),
    _left(
        "compiled code beside the library",
        probe("py_compile.compile(os.__file__, doraise=True)", "import py_compile"),
        "False",
        expect=REFUSED,
    ),
    _left(
        "an environment variable",
        "import os\nos.environ['HOSTILE'] = '1'\ndef f(x): return 0",
        "'HOSTILE' in os.environ",
        expect=UNPAID,
    ),
    _left("a changed mask of modes", probe("os.umask(0)"), "os.umask(0) == 0"),
    _left("another directory", probe("os.chdir('/')"), "os.getcwd() == '/'"),
    _left(
        "a changed seed",
        "import random\nrandom.seed(99)\ndef f(x): return 0",
        "abs(random() - 0.8444218515250481) > 1e-12 if (random := __import__('random').random) else 1",
        expect=UNPAID,
    ),
    _left(
        "no collector", "import gc\ngc.disable()\ndef f(x): return 0", "not __import__('gc').isenabled()", expect=UNPAID
    ),
    _left(
        "another limit of recursion",
        "import sys\nsys.setrecursionlimit(50)\ndef f(x): return 0",
        "sys.getrecursionlimit() == 50",
        expect=UNPAID,
    ),
    _left(
        "a handler of signals",
        probe("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "import signal"),
        "__import__('signal').getsignal(15) == __import__('signal').SIG_IGN",
    ),
    _left(
        "blocked signals",
        probe("signal.pthread_sigmask(0, range(1, 32))", "import signal"),
        "__import__('signal').pthread_sigmask(0, [])",
    ),
    _left(
        "an alarm",
        probe("signal.setitimer(0, 0.03)", "import signal"),
        "__import__('signal').getitimer(0)[0] or __import__('time').sleep(0.06)",
    ),
    _left("a lower priority", probe("os.nice(10)"), "os.nice(0) > 9"),
    _left(
        "lower limits",
        probe("resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))", "import resource"),
        "__import__('resource').getrlimit(7)[0] == 9",
    ),
    _left(
        "a lock on a file that all share",
        probe("fcntl.flock(os.open(os.__file__, 0), fcntl.LOCK_EX | fcntl.LOCK_NB)", _WITH_LOCKS),
        "is_flocked()",
        before=_LOOK_FOR_LOCKS,
    ),
    _left(
        "a lock of a file that is open for all",
        probe(f"fcntl.fcntl(0, fcntl.F_OFD_SETLK, {_LOCK})", _WITH_LOCKS),
        "is_locked(fcntl.F_OFD_GETLK)",
        before=_LOOK_FOR_LOCKS,
    ),
    _left(
        "a lock of its own on a file that all share",
        probe(f"fcntl.fcntl(os.open('/dev/null', os.O_RDWR), fcntl.F_SETLK, {_LOCK})", _WITH_LOCKS),
        "is_locked(fcntl.F_GETLK)",
        before=_LOOK_FOR_LOCKS,
    ),
    _left(
        "other ways of its input",
        probe("fcntl.fcntl(0, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)", "import fcntl"),
        "__import__('fcntl').fcntl(0, 3) & (os.O_APPEND | os.O_NONBLOCK)",
    ),
    _left(
        "another place in its input",
        probe("os.lseek(0, 5, 0)"),
        "os.lseek(0, 0, 1)",
    ),
    _left(
        "another name of the host",
        probe("socket.sethostname('hostile')", "import socket"),
        "os.uname().nodename == 'hostile'",
        expect=REFUSED,
    ),
    _left("a closed working directory", probe("os.chmod('.', 0)"), "os.stat('.').st_mode & 0o700 == 0"),
    _left("no working directory", probe("os.rmdir(os.getcwd())"), "not os.path.isdir(os.getcwd())"),
    _left(
        "a link in place of the working directory",
        steps("here = os.getcwd()\nos.rename(here, here + '-hostile')\nos.symlink('/', here)"),
        "os.getcwd() == '/' or os.listdir('.')",
    ),
    _left(
        "a tree deeper than a path may be",
        steps("for _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')"),
        "os.listdir('.')",
    ),
    _left("a tree nobody may enter", steps("os.makedirs('d/e')\nos.chmod('d', 0)"), "os.listdir('.')"),
    _left(
        "names that are no text",
        steps("for n in range(1, 256):\n    if n != 47: os.mkdir(b'-' + bytes([n]))"),
        "os.listdir('.')",
    ),
    _left(
        "a file that runs as its owner",
        steps("os.close(os.open('hostile', os.O_CREAT, 0o777))\nos.chmod('hostile', 0o6777)"),
        "os.listdir('.')",
    ),
    _left("a pipe with a name", probe("os.mkfifo('hostile')"), "os.listdir('.')"),
    _left(
        "a hole in the numbers",
        "import ctypes\nctypes.c_uint.from_address(id(7) + 24).value = 8\ndef f(x): return 0",
        "3 + 4 != int('7')",
        expect=UNPAID,
    ),
)
