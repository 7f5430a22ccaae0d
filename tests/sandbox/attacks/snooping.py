"""Looking for the expected values, for secrets, and for the inputs of later calls."""

from __future__ import annotations

from attacks.record import UNPAID, Program

# Every expected value lies in this range, so a program that meets one knows it.
_FIND = """
import sys
from types import CellType as Cell
LOW, HIGH = 900_000_000, 1_000_000_000
def contents(cell):
    try: return cell.cell_contents
    except ValueError: return None  # empty
def find(things, seen, depth=0):
    for thing in things:
        if type(thing) is int and LOW < thing < HIGH and thing not in (LOW, HIGH): return thing
        if depth > 6 or id(thing) in seen: continue
        seen.add(id(thing))
        inner = ()
        if isinstance(thing, dict): inner = [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)): inner = list(thing)
        elif isinstance(thing, type(find)): inner = [thing.__closure__, thing.__code__, thing.__defaults__]
        elif isinstance(thing, type(find.__code__)): inner = thing.co_consts
        elif isinstance(thing, Cell): inner = [contents(thing)]
        elif hasattr(thing, '__dict__'): inner = [dict(vars(thing))]
        found = find(inner, seen, depth + 1)
        if found: return found
    return 0
"""
_MEMORY = r"""
import os, re
def f(x):
    found = []
    try:
        maps = open('/proc/self/maps').read()
        mem = os.open('/proc/self/mem', 0)
    except OSError: return 'refused'
    for line in maps.splitlines():
        span, flags = line.split()[:2]
        a, b = (int(p, 16) for p in span.split('-'))
        if 'r' in flags and b - a < 1 << 26 and 'vvar' not in line:
            try: found += re.findall(rb'(?<![0-9])9[0-9]{8}(?![0-9])', os.pread(mem, b - a, a))
            except OSError: pass
    return int(found[0]) if found else 0
"""


def _snoop(name: str, body: str, *expect: str, forges: bool = False) -> Program:
    return Program(name=name, source=_FIND + body, expect=expect or ("ok: 0",), forges=forges)


PROGRAMS = (
    _snoop(
        "walks the frames",
        "def f(x):\n    things, up = [], sys._getframe(1)\n    while up:\n"
        "        things += [up.f_locals, up.f_code]\n        up = up.f_back\n    return find(things, set())",
        forges=True,
    ),
    _snoop(
        "walks the frames of an exception",
        "def f(x):\n    try: raise ValueError\n    except ValueError as e:\n"
        "        up, things = e.__traceback__.tb_frame.f_back, []\n        while up:\n"
        "            things += [up.f_code, up.f_locals]\n            up = up.f_back\n    return find(things, set())",
        forges=True,
    ),
    _snoop(
        "walks the globals of its caller",
        "def f(x):\n    return find([sys._getframe(1).f_globals, sys._getframe(1).f_code], set())",
    ),
    _snoop(
        "asks the collector for everything",
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
        "        if isinstance(o, (list, tuple, dict)) and o is not f.__globals__:\n"
        "            for v in (o.values() if isinstance(o, dict) else o):\n"
        "                if type(v) is int and LOW < v < HIGH: return v\n    return 0",
        forges=True,
    ),
    _snoop(
        "asks the collector for functions",
        "import gc, types\ndef f(x):\n"
        "    return find([o for o in gc.get_objects() if isinstance(o, types.FunctionType)], set())",
    ),
    _snoop("looks through the modules", "def f(x): return find([dict(sys.modules)], set())"),
    _snoop("looks through the arguments", "def f(x): return find([sys.argv, sys.orig_argv, sys.flags], set())"),
    _snoop(
        "looks at the frames of all threads",
        "def f(x):\n    things = []\n"
        "    for up in sys._current_frames().values():\n        while up:\n"
        "            things += [up.f_locals, up.f_code]\n            up = up.f_back\n    return find(things, set())",
        forges=True,
    ),
    _snoop(
        "traces its caller",
        "found = []\ndef trace(frame, event, arg):\n    sys.settrace(None)\n    while frame:\n"
        "        found.append(find([frame.f_locals, frame.f_code], set()))\n        frame = frame.f_back\n"
        "def called(): pass\ndef f(x):\n    sys.settrace(trace)\n    called()\n    return max(found, default=0)",
        forges=True,
    ),
    _snoop(
        "reads the source lines of its caller",
        "import linecache, re\ndef f(x):\n    up, text = sys._getframe(1), ''\n"
        "    while up:\n        text += ''.join(linecache.getlines(up.f_code.co_filename))\n        up = up.f_back\n"
        "    hits = [int(n) for n in re.findall(r'(?<![0-9_])9[0-9]{8}(?![0-9])', text)]\n"
        "    return hits[0] if hits else 0",
    ),
    Program(name="reads its own memory", source=_MEMORY, expect=("ok: 0", "ok: refused", "violation*")),
    Program(
        name="reads its environment",
        source="import os\ndef f(x): return 'SECRET' if any('CANARY' in k for k in os.environ) else sorted(os.environ)",
        expect=("ok: [[]*",),
    ),
    Program(
        name="reads what the interpreter was started with",
        source="import os\ndef f(x):\n    try: return str(os.read(os.open('/proc/self/environ', 0), 1 << 16))\n"
        "    except OSError: return 'refused'",
        expect=("ok: refused", "ok: b'PYTHON*", "ok: b'*"),
    ),
    Program(
        name="peeks at the socket for what comes later",
        source="import socket\ns = socket.socket(fileno=3)\ns.setblocking(False)\ndef f(x):\n"
        "    try: return str(s.recv(1 << 16, socket.MSG_PEEK))\n    except OSError as e: return type(e).__name__",
        expect=("ok: BlockingIOError", "ok: PermissionError", "ok: b''", *UNPAID),
    ),
    Program(
        name="asks who holds the other end",
        source="import socket, struct\ns = socket.socket(fileno=3)\ndef f(x):\n"
        "    try: return struct.unpack('3i', s.getsockopt(1, 17, 12))[0]\n    except OSError: return 'refused'",
        expect=("ok: *",),
    ),
)
