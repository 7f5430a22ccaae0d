"""Signals to others, processes and threads, priorities of others."""

from __future__ import annotations

from attacks.record import REFUSED, UNPAID, Program, probe, steps

WORKED = ("ok: WORKED *",)


def _probe(name: str, action: str, *, works: tuple[str, ...] = (), before: str = "", **more: object) -> Program:
    source = probe(action, "import resource, signal, subprocess, threading\n" + before)
    return Program(name=name, source=source, expect=REFUSED, works=works, **more)  # type: ignore[arg-type]


_DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        time.sleep(600)
    os._exit(0)
os.wait()
return 'left a daemon'
"""

PROGRAMS = (
    _probe("kill a process", 'os.kill(HOST["process"], signal.SIGKILL)'),
    _probe("kill a process of its own user", 'os.kill(HOST["twin"], signal.SIGTERM)', works=WORKED, is_for_root=True),
    _probe("stop a process of its own user", 'os.kill(HOST["twin"], signal.SIGSTOP)', works=WORKED, is_for_root=True),
    _probe("kill the judge", 'os.kill(HOST["judge"], signal.SIGKILL)', is_for_root=True),
    _probe("kill everything", "os.kill(-1, signal.SIGKILL)", works=WORKED, is_for_root=True),
    _probe("kill its parent", "os.kill(os.getppid() or 1 << 22, signal.SIGKILL)", is_for_root=True),
    _probe("stop its parent", "os.kill(os.getppid() or 1 << 22, signal.SIGSTOP)", is_for_root=True),
    _probe("kill the group of its parent", "os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)", is_for_root=True),
    _probe(
        "signal a thread of its own user",
        'libc.tgkill(HOST["twin"], HOST["twin"], 15) and os.kill(1 << 22, 0)',
        before="import ctypes\nlibc = ctypes.CDLL(None)",
        works=WORKED,
        is_for_root=True,
    ),
    _probe(
        "signal by descriptor",
        'signal.pidfd_send_signal(os.pidfd_open(HOST["twin"]), signal.SIGTERM)',
        works=WORKED,
        is_for_root=True,
    ),
    Program(
        name="signal by owning a descriptor",
        source=steps(
            "r, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, HOST['twin'])\nfcntl.fcntl(r, fcntl.F_SETFL, "
            "os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')\nreturn 'sent'",
            "import fcntl",
        ),
        expect=REFUSED,
        works=WORKED,
        is_for_root=True,
    ),
    _probe("fork", "os.fork() or os._exit(0)", works=WORKED),
    _probe("spawn", 'os.posix_spawn("/bin/true", ["true"], {})', works=WORKED),
    _probe("run a command", 'subprocess.run(["/bin/true"]).returncode', works=WORKED),
    _probe("run a shell", 'os.system("echo owned > /tmp/hostile-shell") and os.kill(1 << 22, 0)', works=WORKED),
    _probe("a pool of processes", "multiprocessing.Pool(1)", before="import multiprocessing", works=WORKED),
    Program(
        name="become a shell",
        source=probe('os.execv("/bin/sh", ["sh", "-c", "exit 0"])'),
        expect=REFUSED,
        works=("incomplete*",),
    ),
    Program(
        name="become the interpreter",
        source=probe('os.execv(sys.executable, ["python", "-c", "print(1)"])', "import sys"),
        expect=REFUSED,
        works=("incomplete*",),
    ),
    Program(
        name="become a program that exists in memory only",
        source=steps(
            'fd = os.memfd_create("hostile")\nos.write(fd, open("/bin/true", "rb").read())\nos.execve(fd, ["true"], {})'
        ),
        expect=REFUSED,
        works=("incomplete*",),
    ),
    Program(
        name="fork bomb",
        source="import os, time\ndef f(x):\n    n = 0\n    for _ in range(200):\n        try: pid = os.fork()\n"
        "        except OSError: continue\n        if pid == 0:\n            time.sleep(60)\n            os._exit(0)\n"
        "        n += 1\n    return n",
        expect=("ok: 0", "violation*"),
        works=("ok: [1-9]", "ok: [12][0-9]"),
    ),
    Program(
        name="thread bomb",
        source="import threading, time\ndef f(x):\n    n = 0\n    for _ in range(200):\n"
        "        try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "        except RuntimeError: return n\n        n += 1\n    return 'no limit'",
        expect=("ok: [0-9]", "ok: [0-9][0-9]", "timeout*"),
        limits={"max_processes": 8},
    ),
    Program(
        name="leave a daemon",
        source=steps(_DAEMON, "import time"),
        expect=REFUSED,
        works=("ok: WORKED 'left a daemon'",),
        limits={"max_processes": 8},
    ),
    Program(
        name="forks itself to answer twice",
        source="import os\ndef f(x):\n    try: os.fork()\n    except OSError: pass\n    return 0",
        expect=UNPAID,
        limits={"max_processes": 4},
    ),
    _probe("a new session", "os.setsid() or 1"),
    _probe("a higher priority", "os.nice(-5)"),
    _probe("real-time scheduling", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))"),
    _probe(
        "lower another's priority", 'os.setpriority(os.PRIO_PROCESS, HOST["twin"], 19)', works=WORKED, is_for_root=True
    ),
    _probe(
        "move another to one processor",
        'os.sched_setaffinity(HOST["twin"], os.sched_getaffinity(0))',
        works=WORKED,
        is_for_root=True,
    ),
    _probe("limit another", 'resource.prlimit(HOST["twin"], resource.RLIMIT_NOFILE, (3, 3))', is_for_root=True),
    _probe("raise its limits", "resource.setrlimit(resource.RLIMIT_AS, (1 << 45, 1 << 45))"),
    _probe("raise its number of processes", "resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))"),
    _probe("become root", "os.setresuid(0, 0, 0)"),
    _probe("become the group of root", "os.setresgid(0, 0, 0)"),
    _probe("join groups", "os.setgroups([0])"),
)
