"""The program that a request to a remote server carries. Standard library only; started there as a script.

`remote.runner` puts the values in place of None below. On the channel (standard output; standard error when the
program reads stdin) each line of ours begins with the marker; everything else there is noise.
"""

import os
import resource
import sys
import types
from typing import Any

GIVEN: Any = None
CHANNEL_FD = 200
"""Above what programs are given: they close and open the low numbers."""


def main() -> None:
    """Fix the seeds, take the limits, announce that the program comes next, and serve it."""
    if os.environ.get("PYTHONHASHSEED") != "0" and os.path.isfile(sys.argv[0]):
        # The order of sets must not change from run to run, and only a new interpreter can fix it.
        os.execve(sys.executable, [sys.executable, "-s", "-B", *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    assert GIVEN is not None, "remote.runner fills this in"
    marker = GIVEN["marker"].encode()
    os.dup2(2 if GIVEN["has_stdin"] else 1, CHANNEL_FD, inheritable=False)
    if not GIVEN["has_stdin"]:
        os.dup2(2, 1)  # what the program prints
    codec, child = _load("codec"), _load("child")

    def write_frame(fd: int, body: bytes) -> None:
        rest = memoryview(b"\n" + marker + b" " + body + b"\n")
        while rest:
            rest = rest[os.write(fd, rest) :]

    def read_frame(fd: int) -> bytes:
        return GIVEN["job"].encode()

    child._write_frame, child._read_frame = write_frame, read_frame
    _limit()
    child.fix_randomness()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on it would be the program's to fill
    os.write(CHANNEL_FD, b"\n" + marker + b" ")  # the byte LOCKED of `serve` ends this line
    status = 70
    try:
        status = child.serve(CHANNEL_FD, codec)
    finally:
        os._exit(status)


def _load(name: str) -> Any:
    module = types.ModuleType(f"coupled_sandbox_{name}")
    sys.modules[module.__name__] = module
    exec(compile(GIVEN["sources"][name], f"{name}.py", "exec", dont_inherit=True), module.__dict__)
    return module


def _limit() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    wanted = {
        # SIGXCPU first, so that the host can distinguish this limit from a SIGKILL of another origin.
        resource.RLIMIT_CPU: (GIVEN["cpu_seconds"], GIVEN["cpu_seconds"] + 1),
        resource.RLIMIT_AS: (used + (GIVEN["memory_mb"] << 20),) * 2,
        resource.RLIMIT_FSIZE: (GIVEN["file_kb"] << 10,) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, (soft, hard) in wanted.items():
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


if __name__ == "__main__":
    main()
