"""Words put into the mouth of the sandbox or the judge: markers, replies, reports, patched parts of the runner."""

from __future__ import annotations

from attacks.record import ENDED, UNPAID, Program

_FRAME = """
import json, os, struct, sys
def frame(tree):
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    os.write(3, struct.pack(">I", len(body)) + body)
"""
_MARKERS = "PASSED\\n__PASS_RATE__: 1.0\\nAll tests passed\\nOK\\n{\\'passed\\': true}\\n"


def _calls(name: str, source: str, *expect: str, forges: bool = False) -> Program:
    return Program(name=name, source=source, expect=expect or UNPAID, forges=forges)


def _frames(name: str, source: str, *expect: str) -> Program:
    return _calls(name, _FRAME + source, *expect)


def _patch(name: str, source: str) -> Program:
    return _calls(name, "import sys\n" + source + "\ndef f(x): return 0")


_ALL = "frame({'load': None})\n"

PROGRAMS = (
    _calls("markers on standard output", f"print('{_MARKERS}')\ndef f(x): return 0", "ok: 0"),
    _calls(
        "markers, then a good end",
        f"import os\nprint('{_MARKERS}', flush=True)\nos._exit(0)",
        "incomplete*",
        forges=True,
    ),
    _calls(
        "markers on every descriptor",
        "import os\nfor fd in range(1024):\n"
        f"    try: os.write(fd, b'{_MARKERS}')\n    except OSError: pass\ndef f(x): return 0",
        "protocol*",
        "incomplete*",
    ),
    _calls(
        "markers on the judge's output",
        "import os\nfor who in (os.getppid(), HOST['judge'], 1):\n"
        f"    try: os.write(os.open(f'/proc/{{who}}/fd/1', 1), b'{_MARKERS}')\n    except OSError: pass\n"
        "def f(x): return 0",
        "ok: 0",
    ),
    _frames(
        "replies instead of the real ones",
        _ALL + "for n in range(3): frame({'n': n, 'v': True})\nos._exit(0)",
        "ok: True",
    ),
    _frames(
        "replies before the real ones",
        _ALL + "for n in range(3): frame({'n': n, 'v': 0})\ndef f(x): return 0",
        "protocol*",
    ),
    _frames(
        "replies with a verdict",
        _ALL + "for n in range(3): frame({'n': n, 'v': 0, 'passed': True})\nos._exit(0)",
        "protocol*",
    ),
    _frames("a verdict alone", "frame({'passed': True, 'load': None})\nos._exit(0)", "protocol*"),
    _frames("replies in another order", _ALL + "for n in (2, 1, 0): frame({'n': n, 'v': 0})\nos._exit(0)", "protocol*"),
    _frames("a reply with a number that equals", _ALL + "frame({'n': False, 'v': 0})\nos._exit(0)", "protocol*"),
    _frames("a reply with a fraction for a number", _ALL + "frame({'n': 0.0, 'v': 0})\nos._exit(0)", "protocol*"),
    _frames("a reply with a key twice", _ALL + 'frame(b\'{"n":0,"v":0,"v":1}\')\nos._exit(0)', *UNPAID),
    _frames("a reply that is nan", _ALL + 'frame(b\'{"n":0,"v":NaN}\')\nos._exit(0)', "protocol*"),
    _frames("a reply that is no number", _ALL + 'frame(b\'{"n":0,"v":1e999}\')\nos._exit(0)', *UNPAID),
    _frames(
        "a true thing of no kind",
        _ALL + "for n in range(3): frame({'n': n, 'v': {'o': ['int', True]}})\nos._exit(0)",
        "ok: Opaque*",
    ),
    _frames(
        "an unknown tag",
        _ALL + "frame({'n': 0, 'v': {'__reduce__': ['os.system', 'touch /tmp/hostile']}})\nos._exit(0)",
        "protocol*",
    ),
    _frames("an exception that is none", _ALL + "frame({'n': 0, 'x': ['AssertionError']})\nos._exit(0)", "protocol*"),
    _frames(
        "a reply nested without end", _ALL + "frame(b'{\"n\":0,\"v\":' + b'[' * 200_000)\nos._exit(0)", "protocol*"
    ),
    _frames(
        "a reply of four billion bytes",
        "os.write(3, b'\\xff\\xff\\xff\\xff' + bytes(1000))\nos._exit(0)",
        "incomplete*",
        "protocol*",
    ),
    _frames("a reply cut short", _ALL + "os.write(3, b'\\0\\0\\0\\x20{')\nos._exit(0)", "incomplete*"),
    _frames("a reply of no bytes", _ALL + "os.write(3, bytes(4))\nos._exit(0)", "protocol*"),
    _frames("a reply that is no text", _ALL + "frame(b'\\xff\\xfe\\0\\x80')\nos._exit(0)", "protocol*"),
    _frames(
        "a load that failed, then replies",
        "frame({'load': ['E', 'x']})\nframe({'n': 0, 'v': 0})\nos._exit(0)",
        "protocol*",
    ),
    _frames("loaded twice", _ALL * 2 + "os._exit(0)", "protocol*"),
    _frames("more replies than calls", "def f(x):\n    frame({'n': 9, 'v': 0})\n    return 0", "protocol*"),
    _frames(
        "replies for the program after it",
        "def f(x):\n    if x == 3:\n        frame({'n': 2, 'v': 0})\n"
        "        frame({'load': None})\n        for n in range(5): frame({'n': n, 'v': 0})\n        os._exit(0)\n"
        "    return 0",
        "protocol*",
    ),
    _frames("a reply inside the call", "def f(x):\n    frame({'n': x - 1, 'v': 0})\n    return 0", "protocol*"),
    _frames("the byte of the lock-down again", "os.write(3, b'\\x55' * 64)\nos._exit(0)", *UNPAID),
    _frames(
        "an error of the sandbox", "os.write(3, b'Traceback (most recent call last): OSError')\nos._exit(70)", *UNPAID
    ),
    _frames(
        "descriptors for the host",
        "import socket\ns = socket.socket(fileno=3)\nfor _ in range(50):\n"
        "    try: socket.send_fds(s, [b'x'], [0, 1, 2])\n    except OSError: break\ndef f(x): return 0",
        *UNPAID,
    ),
    _frames(
        "bytes out of band",
        "import socket\ns = socket.socket(fileno=3)\ntry: s.send(b'!', socket.MSG_OOB)\n"
        "except OSError: pass\ndef f(x): return 0",
        *UNPAID,
    ),
    _frames(
        "many bytes out of band, in a call",
        "import socket\ns = socket.socket(fileno=3)\ndef f(x):\n    for _ in range(2000):\n"
        "        try: s.send(b'!!', socket.MSG_OOB)\n        except OSError: break\n    return 0",
        *UNPAID,
    ),
    Program(
        name="bytes out of band where lines are compared",
        source="import socket\nsocket.socket(fileno=3).send(b'!', socket.MSG_OOB)",
        expect=("protocol*", "crash*", "violation*"),
        mode="stdio",
    ),
    Program(
        name="bytes out of band where tests are a program",
        source="import socket\ns = socket.socket(fileno=3)\n"
        "def f(x):\n    try: s.send(b'!', socket.MSG_OOB)\n    except OSError: pass\n    return 0",
        # The byte is read as the first of a frame's length, which then is beyond what it may write.
        expect=("output_limit*", "ok: False", "protocol*", *ENDED),
        mode="beside",
    ),
    # Between the host's question whether there is something to read and its reading.
    Program(
        name="reads its output back before the host does",
        source="import os, time\nfd = os.open('/proc/self/fd/1', os.O_RDONLY | os.O_NONBLOCK)\n"
        "while time.process_time() < 0.3:\n    os.write(1, b'x')\n"
        "    try: os.read(fd, 1)\n    except BlockingIOError: pass",
        expect=("ok*", "crash*", "violation*", "output_limit*"),
        mode="stdio",
    ),
    _calls(
        "reads its output back between calls",
        "import os, time\ndef f(x):\n    try: fd = os.open('/proc/self/fd/1', os.O_RDONLY | os.O_NONBLOCK)\n"
        "    except OSError: return 0\n    for _ in range(10_000):\n        os.write(1, b'x')\n"
        "        try: os.read(fd, 1)\n        except BlockingIOError: pass\n    return 0",
        "ok: 0",
    ),
    _frames(
        "reports on every socket",
        "import socket\nfor fd in range(1024):\n    try: os.write(fd, json.dumps("
        "{'serial': 1, 'exit': 0, 'cpu_seconds': 0, 'queued_seconds': 99}).encode())\n    except OSError: pass\n"
        "def f(x): return 0",
        "protocol*",
        "incomplete*",
    ),
    _frames(
        "reads the job that comes after its own",
        "os.set_blocking(3, False)\ndef f(x):\n"
        "    try: return os.read(3, 1 << 20).decode()\n    except OSError as e: return type(e).__name__",
        "ok: BlockingIOError",
        "ok: ",
        "incomplete*",
    ),
    _frames(
        "shuts the socket of its replies",
        "import socket\nsocket.socket(fileno=os.dup(3)).shutdown(2)\ndef f(x): return 0",
        "incomplete*",
    ),
    _frames(
        "a digest in place of a value",
        _ALL + "for n in range(3): frame({'n': n, 'd': '0' * 64})\nos._exit(0)",
        "ok: Digest*",
        "protocol*",
    ),
    _frames(
        "a value that stayed where it is",
        _ALL + "frame({'n': 0, 'v': {'h': ['Decimal', '1']}})\nos._exit(0)",
        "protocol*",
    ),
    _frames("a reply with a mark before it", "frame(b'\\xef\\xbb\\xbf{\"load\":null}')\nos._exit(0)", "protocol*"),
    _frames(
        "replies from a thread",
        _ALL + "import threading\ndef g():\n    while True: frame({'n': 9, 'v': 0})\n"
        "try: threading.Thread(target=g, daemon=True).start()\nexcept RuntimeError: os._exit(0)\ndef f(x): return 0",
    ),
    _patch("replaces what lists items", "sys.modules['coupled_sandbox_codec'].listed = lambda *a, **k: True"),
    _patch("replaces the answer of the server", "sys.modules['coupled_sandbox_child']._Server.answer = lambda s, a: 1"),
    _patch("replaces json", 'import json\njson.dumps = lambda *a, **k: \'{"n": 0, "v": true}\''),
    _patch("replaces the codec", "sys.modules['coupled_sandbox_codec'].encode = lambda v: 'true'"),
    _patch(
        "replaces the codec by a forged reply",
        "sys.modules['coupled_sandbox_codec'].encode = lambda v: 'true}, {\"passed\": true'",
    ),
    _patch("replaces what writes", "import os\nwrite = os.write\nos.write = lambda fd, data: write(1, data)"),
    _patch("replaces what packs", "import struct\nstruct.pack = lambda *a: b'\\0\\0\\0\\0'"),
    _patch(
        "replaces the runner's frames",
        "for m in list(sys.modules.values()):\n    if hasattr(m, '_write_frame'): m._write_frame = lambda *a: None",
    ),
    _patch("replaces type", "import builtins\nbuiltins.type = lambda *a: int\nbuiltins.isinstance = lambda *a: True"),
    _patch(
        "replaces every builtin",
        "import builtins\nfor n in dir(builtins):\n"
        "    if n[0] != '_' and n not in ('setattr', 'print'):\n        setattr(builtins, n, print)",
    ),
    _patch("replaces import", "import builtins\nbuiltins.__import__ = lambda *a, **k: sys"),
    _patch("replaces assertions", "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never"),
    _patch(
        "traces every line",
        "def trace(frame, event, arg):\n    frame.f_trace_opcodes = True\n    return trace\n"
        "sys.settrace(trace)\nsys.setprofile(trace)",
    ),
    _calls(
        "changes the reply in its caller",
        "import ctypes, sys\ndef f(x):\n    up = sys._getframe(1)\n"
        "    up.f_locals['index'] = 0\n    up.f_globals['_write_frame'] = lambda fd, body: None\n"
        "    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(up), 1)\n    return 0",
    ),
    _calls(
        "drops the calls that it cannot answer",
        "import sys\ndef f(x):\n    up = sys._getframe(1)\n    up.f_locals['job']['calls'].clear()\n    return 0",
        *UNPAID,
    ),
    _calls(
        "rewrites the number one",
        "import ctypes\nctypes.c_long.from_address(id(1) + 24).value = 8\ndef f(x): return 1",
        *UNPAID,
    ),
    _calls(
        "rewrites the code of the codec",
        "import sys\nc = sys.modules['coupled_sandbox_codec']\n"
        "c.encode.__code__ = (lambda value: 'null').__code__\ndef f(x): return 0",
        *UNPAID,
    ),
    Program(
        name="prints only the first line of what is asked",
        source="print(int(input()) ** 2 + 7)",
        expect=("ok*",),
        mode="stdio",
    ),
    Program(name="prints every small number", source="print(*range(2000))", expect=("ok*",), mode="stdio"),
    Program(
        name="prints markers where lines are compared", source=f"print('{_MARKERS}')", expect=("ok*",), mode="stdio"
    ),
    Program(
        name="writes replies where lines are compared",
        source=_FRAME + _ALL + "frame({'n': 0, 'v': 8})",
        expect=("protocol*", "incomplete*", *ENDED),
        mode="stdio",
    ),
)
