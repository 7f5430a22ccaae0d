"""Things of the host that a contained program can neither see nor touch, and the signs that it did."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_SLEEPER = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
print(flush=True)
while True: time.sleep(600)
"""
_WHERE_TRACES_ARE_LEFT = ("/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/dev/mqueue", os.path.dirname(os.__file__))


class Canaries:
    """Processes, files and sockets open to everybody, so that isolation alone protects them. A context manager."""

    def __init__(self, uid: int, worker: int) -> None:
        """`uid`: the user programs run as; `worker`: pid of the zygote, whose descendants are none of a program's."""
        self.uid, self._worker = uid, worker
        self.secret = f"secret {secrets.token_hex(16)}"
        self._folder = Path(tempfile.mkdtemp(prefix="canaries-"))
        self._sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        self._folder.chmod(0o777)
        self._file, self._owned = self._folder / "file", self._folder / "owned"
        for path in (self._file, self._owned):
            path.write_text(self.secret)
            path.chmod(0o666)
        if os.getuid() == 0:
            os.chown(self._owned, self.uid, self.uid)
        tcp = socket.create_server(("127.0.0.1", 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        abstract, path, datagram = (socket.socket(socket.AF_UNIX, kind) for kind in (1, 1, 2))
        self._abstract = f"canary-{secrets.token_hex(4)}"
        abstract.bind(f"\0{self._abstract}")
        path.bind(str(self._folder / "socket"))
        datagram.bind(str(self._folder / "datagram"))
        for name in ("socket", "datagram"):
            (self._folder / name).chmod(0o777)
        for listener in (abstract, path):
            listener.listen()
        self._sockets = [tcp, udp, abstract, path, datagram]
        for sock in self._sockets:
            sock.setblocking(False)
        users: list[dict[str, Any]] = [{}, {"user": self.uid, "extra_groups": []} if os.getuid() == 0 else {}]
        for user in users:
            # One of the host's user, and one of the programs' user, whom no file mode and no uid protects.
            process = subprocess.Popen(
                [_python(), "-I", "-S", "-c", _SLEEPER],
                stdout=subprocess.PIPE,
                cwd="/",
                env={"CANARY": self.secret},
                **user,
            )
            self._processes.append(process)
            assert process.stdout is not None
            process.stdout.readline()
        self.about = {
            "file": str(self._file),
            "owned": str(self._owned),
            "directory": str(self._folder),
            "repository": str(REPOSITORY),
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "abstract": self._abstract,
            "socket": str(self._folder / "socket"),
            "datagram": str(self._folder / "datagram"),
            "process": self._processes[0].pid,
            "twin": self._processes[1].pid,
            "judge": os.getpid(),
        }
        self._before = self._state()
        self._num_processes = len(self._processes_of_the_user())

    def damage(self) -> list[str]:
        """Return what is no longer as it was, one line each."""
        now = self._state()
        found = [f"{name}: {self._before[name]} became {now[name]}" for name in now if now[name] != self._before[name]]
        for name, sock in zip(("tcp", "udp", "abstract", "path", "datagram"), self._sockets, strict=True):
            with contextlib.suppress(BlockingIOError):
                came: Any = sock.recv(100) if sock.type == socket.SOCK_DGRAM else sock.accept()[0].close()
                found.append(f"{name}: a visitor came {came or ''}")
        found += [f"left: {path}" for path in _traces()]
        found += [f"left: {kind} {key}" for kind, key, _ in self._system_ipc()]
        if "@hostile" in Path("/proc/net/unix").read_text():
            found.append("left: a listener")
        # The kernel may take a moment to end what it was told to.
        deadline = time.monotonic() + 3.0
        while len(left := self._processes_of_the_user()) > self._num_processes and time.monotonic() < deadline:
            time.sleep(0.01)
        if len(left) > self._num_processes:
            found.append(f"left: processes {left}, {self._num_processes} were here before")
        return found

    def _state(self) -> dict[str, object]:
        state: dict[str, object] = {"folder": _names(self._folder)}
        for path in (self._file, self._owned):
            try:
                about = path.stat()
                state[path.name] = (path.read_text(), about.st_mtime_ns, about.st_mode, about.st_uid, about.st_nlink)
            except OSError as error:
                state[path.name] = str(error)
        for name, process in zip(("process", "twin"), self._processes, strict=True):
            if process.poll() is not None:
                state[name] = f"ended with {process.returncode}"
                continue
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                if ":\t" in line
            )
            state[name] = (
                "stopped" if status["State"][0] in "TtZX" else "alive",
                [status[key] for key in ("SigPnd", "ShdPnd", "TracerPid")],
                os.getpriority(os.PRIO_PROCESS, process.pid),
                os.sched_getaffinity(process.pid),
                Path(f"/proc/{process.pid}/limits").read_text(),
            )
        return state

    def _processes_of_the_user(self) -> list[int]:
        """Pids of the programs' user, or, when that is the host's user too, of the zygote's descendants."""
        if self.uid == os.getuid():
            return _descendants(self._worker)
        found = []
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == self.uid:
                    found.append(int(entry.name))
        return found

    def _system_ipc(self) -> list[tuple[str, int, int]]:
        """(kind, key, number) of what the suite's programs made."""
        found = []
        for kind in ("shm", "sem", "msg"):
            with contextlib.suppress(FileNotFoundError):
                for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
                    key, number = map(int, line.split()[:2])
                    if key in (4711, 0x600D):
                        found.append((kind, key, number))
        return found

    def close(self) -> None:
        """Remove everything, and what programs left where nothing contained them."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        for sock in self._sockets:
            sock.close()
        for folder in self._folder.parent.glob(f"{self._folder.name}*"):  # also where a program renamed it
            shutil.rmtree(folder, ignore_errors=True)
        for path in _traces():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        libc = ctypes.CDLL(None)
        for kind, _, number in self._system_ipc():
            remove = {"shm": libc.shmctl, "sem": libc.semctl, "msg": libc.msgctl}[kind]
            remove(number, 0, None) if kind != "sem" else remove(number, 0, 0, None)

    def __enter__(self) -> Canaries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _python() -> str:
    """An interpreter that every user may run."""
    return "/usr/bin/python3" if os.getuid() == 0 and os.access("/usr/bin/python3", os.X_OK) else sys.executable


def _names(folder: Path) -> list[str] | str:
    """The names in a folder, or why it cannot be read: a program of the host's user may have moved it."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        return str(error)


def _traces() -> list[Path]:
    return [
        path
        for folder in _WHERE_TRACES_ARE_LEFT
        if os.path.isdir(folder)
        for path in map(Path, [entry.path for entry in os.scandir(folder) if entry.name.startswith("hostile")])
    ]


def _descendants(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [int(child) for child in text.split()]
    return children + [below for child in children for below in _descendants(child)]
