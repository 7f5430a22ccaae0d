"""Ends that look like success."""

from __future__ import annotations

from attacks.record import ENDED, UNPAID, Program

_LINES = {
    # name: (source, expected, passes a grader in the same process)
    "sys.exit while loading": ("import sys\nsys.exit(0)", ("load_error*",), True),
    "exit while loading": ("exit(0)", ("load_error*",), True),
    "an exit of another class": ("class E(SystemExit): pass\nraise E(0)", ("load_error*",), True),
    "os._exit while loading": ("import os\nos._exit(0)", ("incomplete*",), True),
    "os._exit in a call": ("import os\ndef f(x): os._exit(0)", ("incomplete*",), True),
    "sys.exit in a call": ("import sys\ndef f(x): sys.exit(0)", ("ok: raised SystemExit",), True),
    "an interrupt": ("raise KeyboardInterrupt", ("load_error*",), False),
    "an end of a generator": ("raise GeneratorExit", ("load_error*",), False),
    "an exit when the interpreter ends": (
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
        ("ok: 0",),
        True,
    ),
    "an exit in the hook of exceptions": (
        "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): return 0",
        ("ok: 0",),
        True,
    ),
    "an exit when deleted": (
        "import os\nclass E:\n def __del__(self): os._exit(0)\ndef f(x):\n E()\n return 0",
        ("incomplete*",),
        True,
    ),
    "an exit when compared": (
        "import os\nclass E:\n def __eq__(self, o): os._exit(0)\ndef f(x): return E()",
        ("ok*",),
        True,
    ),
    "an exit when hashed": (
        "import os\nclass E(int):\n def __hash__(self): os._exit(0)\ndef f(x): return {E(): 1} if 0 else E()",
        ("ok: 0",),
        False,
    ),
    "an exit when asked for its truth": (
        "import os\nclass E:\n def __bool__(self): os._exit(0)\ndef f(x): return E()",
        ("incomplete*",),
        False,
    ),
    "an exit when its class is asked for": (
        "import os\nclass E:\n @property\n def __class__(self): os._exit(0)\ndef f(x): return E()",
        ("ok*", "incomplete*"),
        False,
    ),
    "abort": ("import os\ndef f(x): os.abort()", ENDED, False),
    "a null pointer": ("import ctypes\ndef f(x): ctypes.string_at(0)", ENDED, False),
    "kills itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", ("ok*", *ENDED), False),
    "ends by the signal of a forbidden call": (
        "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSYS)",
        ("ok*", *ENDED),
        False,
    ),
    "ends by the signal of the time limit": (
        "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGXCPU)",
        ("ok*", *ENDED),
        False,
    ),
    "an alarm of its own": (
        "import os, signal\nsignal.signal(14, lambda *a: os._exit(0))\nsignal.setitimer(0, 0.01)\ndef f(x):\n"
        " while True: pass",
        ("incomplete*",),
        True,
    ),
    "only its first thread ends": (
        "import ctypes\ndef f(x): ctypes.CDLL(None).syscall(60, 0)",
        ("incomplete*", "timeout*", *ENDED),
        True,
    ),
    "a fault of its own making": (
        "import faulthandler\ndef f(x): faulthandler._sigsegv()",
        ("ok: None", *ENDED),
        False,
    ),
    "a fault that is timed": (
        "import faulthandler\nfaulthandler.dump_traceback_later(0.05, exit=True)\ndef f(x):\n while True: pass",
        ("incomplete*", "load_error*", *ENDED),
        False,
    ),
    "an exit of the interpreter": ("import ctypes\ndef f(x): ctypes.pythonapi.Py_Exit(0)", ENDED, True),
    "an exit without the C library": (
        "import ctypes\ndef f(x): ctypes.CDLL(None).syscall(231, 0)",
        ENDED,
        True,
    ),
    "an exit in the hook of imports": (
        "import sys\nclass F:\n def find_spec(self, *a): raise SystemExit(0)\nsys.meta_path.insert(0, F())\n"
        "def f(x): import antigravity",
        ("ok: raised SystemExit",),
        True,
    ),
    "an exit in a group": (
        "def f(x): raise BaseExceptionGroup('g', [SystemExit(0)])",
        ("ok: raised BaseExceptionGroup",),
        False,
    ),
    "an exit in the text of an exception": (
        "class E(Exception):\n def __str__(self): raise SystemExit(0)\ndef f(x): raise E",
        ("ok: raised *",),
        False,
    ),
    "ends with the status of a failed lock-down": ("import os\nos._exit(70)", ("incomplete*",), False),
    "ends with the status of a shell that was killed": ("import os\nos._exit(137)", ("incomplete*",), False),
    "ends while it is asked for the second time": (
        "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return 0",
        ("incomplete: 0",),
        False,
    ),
    "closes the socket of its replies": ("import os\nos.close(3)\ndef f(x): return 0", ("incomplete*",), False),
    "closes everything": ("import os\nos.closerange(0, 64)\ndef f(x): return 0", ("incomplete*",), False),
    "replaces exit and raises it": (
        "import builtins, sys\nbuiltins.BaseException = int\ndef f(x): sys.exit(0)",
        UNPAID,
        True,
    ),
}

PROGRAMS = (
    *(
        Program(name=name, source=source, expect=expect, forges=forges)
        for name, (source, expect, forges) in _LINES.items()
    ),
    Program(name="says nothing and ends well", source="", expect=("ok*",), mode="stdio"),
    Program(name="ends before it reads", source="import os\nos._exit(0)", expect=("ok*",), mode="stdio"),
    Program(
        name="prints part of it and ends badly",
        source="import os\nprint(int(input()) ** 2, flush=True)\nos._exit(3)",
        expect=("crash*",),
        mode="stdio",
    ),
)
