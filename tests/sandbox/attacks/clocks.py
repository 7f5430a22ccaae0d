"""Tricks with time and waiting; none may look like a fault of the machine, which would be tried again or left out."""

from __future__ import annotations

from attacks.record import ENDED, UNPAID, Program

_SHORT = {"wall_seconds": 0.5}


def _late(name: str, source: str, *expect: str, **more: object) -> Program:
    return Program(name=name, source=source, expect=expect or ("timeout*",), limits=_SHORT, **more)  # type: ignore[arg-type]


PROGRAMS = (
    _late("sleeps", "import time\ndef f(x): time.sleep(60)"),
    _late("sleeps while loading", "import time\ntime.sleep(60)"),
    _late("waits for a lock it holds", "import threading\nl = threading.Lock()\nl.acquire()\ndef f(x): l.acquire()"),
    _late("waits for a signal", "import signal\ndef f(x): signal.pause()"),
    _late("waits for the host", "import os\ndef f(x): return os.read(3, 1)", *UNPAID),
    _late("waits for nothing", "import select\ndef f(x): select.select([], [], [])"),
    _late("stops itself", "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)", *UNPAID),
    _late("sleeps after it has hung up", "import os, time\nos.close(3)\ntime.sleep(60)", *ENDED, "timeout*"),
    _late(
        "sleeps when asked for its truth",
        "import time\nclass E:\n    def __bool__(s): time.sleep(60)\ndef f(x): return E()",
    ),
    _late(
        "sleeps with its signals blocked",
        "import signal, time\nsignal.pthread_sigmask(0, range(1, 65))\ndef f(x): time.sleep(60)",
    ),
    _late(
        "sleeps and prints", "import time\nwhile True:\n    print(1, flush=True)\n    time.sleep(0.01)", mode="stdio"
    ),
    _late("closes its output and sleeps", "import os, time\nos.closerange(0, 64)\ntime.sleep(60)", mode="stdio"),
    Program(
        name="asks for less than its share and computes",
        source="import os\ntry: os.nice(19)\nexcept OSError: pass\n"
        "try: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nexcept OSError: pass\n"
        "def f(x):\n    while True: pass",
        expect=("timeout*",),
    ),
    Program(
        name="a clock that stands still",
        source="import time\ntime.time = time.monotonic = time.perf_counter = time.process_time = lambda: 0\n"
        "def f(x):\n    while True: pass",
        expect=("timeout*",),
    ),
    # Where a processor is shared, each of these would seem to be kept waiting by others.
    Program(
        name="yields without end",
        source="import os\ndef f(x):\n    while True: os.sched_yield()",
        expect=("timeout*",),
    ),
    Program(
        name="an alarm a thousand times a second",
        source="import signal\nsignal.signal(14, lambda *a: None)\nsignal.setitimer(0, 0.001, 0.001)\n"
        "def f(x):\n    while True: pass",
        expect=("timeout*", *ENDED),
    ),
)
