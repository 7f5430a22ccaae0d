"""Hosts that are namespaces of this machine, on a network of their own. Linux and root; util-linux and iproute2.

A host has its own network, processes, name, /dev/shm and TEMPORARY, and shares all other files: the shared file system
of a cluster. Its first process holds it: when that ends, the kernel ends the others and takes the network card away. It
is ended when this process is, however that ends, so that nothing is left behind. The switch between the hosts is
also a bridge in a namespace: there is no way from the hosts to this machine's network, or to any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.77.0"
TEMPORARY = "/media"
"""A folder that every Linux has and nothing needs here: each host has its own."""
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "mount", "pgrep")
_HOLD = ("setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child", "--fork", "--pid", "--net", "--mount", "--uts")
_ENTER = ("--pid", "--net", "--mount", "--uts")
_SECONDS = 20.0
"""Anything here is done in a moment, or will not be."""


def why_not() -> str | None:
    """Why hosts cannot be made here, and the remedy; None when they can."""
    if sys.platform != "linux":
        return f"hosts are network namespaces of Linux; this is {sys.platform}: run it on Linux, as root"
    if os.geteuid() != 0:
        return f"hosts are network namespaces, which only root may make; this is user {os.geteuid()}: run it as root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not found: {', '.join(missing)}. Install iproute2, util-linux and procps"
    tried = subprocess.run([*_HOLD, "true"], capture_output=True, text=True, timeout=_SECONDS)
    if tried.returncode != 0:
        return f"this kernel, or this container, allows no namespaces ({tried.stderr.strip()}): use a machine that does"
    return None


@dataclass(slots=True, eq=False)
class Host:
    """A host. `cut` and `heal` are of its cable, `crash` ends what runs on it. Made by `Network.add`."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    init: int
    """Its first process, as this machine numbers it."""
    network: Network
    processes: str
    """Names the namespace of its processes."""

    def start(
        self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host. What it prints goes into `log`; the process that is returned ends with it."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [*self._enter(*_ENTER), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def ask(self, command: Sequence[str], environment: dict[str, str] | None = None, seconds: float = _SECONDS) -> str:
        """Run a command on the host, and return what it prints."""
        asked = subprocess.run(
            [*self._enter(*_ENTER), *command], env=environment, capture_output=True, text=True, timeout=seconds
        )
        if asked.returncode:
            raise RuntimeError(f"{shlex.join(command)} on {self.name} ended with {asked.returncode}: {asked.stderr}")
        return asked.stdout

    def cut(self) -> None:
        """Take its cable out at the switch: nothing is sent or received, and no process learns of it."""
        self.network.switch("ip", "link", "set", self.name, "nomaster")

    def heal(self) -> None:
        """Put the cable back."""
        self.network.switch("ip", "link", "set", self.name, "master", "bridge")

    def crash(self) -> None:
        """End every process on it but the first, at once."""
        # `kill -1` means every process that its sender sees: the sender must be on the host.
        script = 'test "$(readlink /proc/self/ns/pid)" = "$0" && kill -9 -1'
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*self._enter("--pid", "--mount"), "bash", "-c", script, self.processes], timeout=_SECONDS, check=False
            )

    def _enter(self, *kinds: str) -> list[str]:
        return ["nsenter", "--target", str(self.init), *kinds, "--"]


class Network:
    """A switch and the hosts on it. A context manager: all of it is gone when it is left."""

    def __init__(self, folder: Path) -> None:
        self.hosts: dict[str, Host] = {}
        self._folder = folder
        self._switch: tuple[subprocess.Popen[bytes], int] | None = None
        self._relays: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Network:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._switch = _hold("switch", [], self._folder)
            self.switch("ip", "link", "add", "bridge", "type", "bridge")
            self.switch("ip", "link", "set", "bridge", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for relay in self._relays:
            _end(relay)
        for host in self.hosts.values():
            _release(host.holder, host.init)
        if self._switch is not None:
            _release(*self._switch)

    def add(self, name: str, *, shm_mb: int = 512, delay: float = 0.0, loss: float = 0.0) -> Host:
        """Add a host. `delay` (seconds) and `loss` (share of the frames) apply to its cable, each way."""
        number = 10 + len(self.hosts)
        names = self._folder / "hosts"
        with names.open("a") as file:
            if not self.hosts:
                file.write("127.0.0.1 localhost\n")
            file.write(f"{SUBNET}.{number} {name}\n")
        prepare = [
            f"echo {shlex.quote(name)} > /proc/sys/kernel/hostname",
            f"mount --bind {shlex.quote(str(names))} /etc/hosts",
            f"mount -t tmpfs -o mode=1777 tmpfs {TEMPORARY}",
            f"mount -t tmpfs -o mode=1777,size={shm_mb}m tmpfs /dev/shm",
            "ip link set lo up",
        ]
        holder, init = _hold(name, prepare, self._folder)
        address = f"{SUBNET}.{number}"
        processes = os.readlink(f"/proc/{init}/ns/pid")
        assert processes != os.readlink("/proc/self/ns/pid"), "the host's processes are apart from this machine's"
        host = Host(name, address, holder, init, self, processes)
        self.hosts[name] = host
        if delay or loss:
            assert self._switch is not None, "the network was entered"
            self._relays.append(_relay(self._switch[1], init, name, delay, loss))
        else:
            self.switch("ip", "link", "add", name, "type", "veth", "peer", "name", "card", "netns", str(init))
            self.switch("ip", "link", "set", name, "up")
        host.heal()
        host.ask(["ip", "address", "add", f"{address}/24", "dev", "card"])
        host.ask(["ip", "link", "set", "card", "up"])
        return host

    def switch(self, *command: str) -> None:
        """Run a command where the switch is."""
        assert self._switch is not None, "the network was entered"
        target = str(self._switch[1])
        subprocess.run(["nsenter", "--target", target, "--net", "--", *command], check=True, timeout=_SECONDS)


def _hold(name: str, prepare: Sequence[str], folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Make the namespaces of a host; returns the process that holds them, and the first process inside."""
    log = folder / f"{name}.log"
    # The first process of its namespace adopts what loses its parent there, hence a shell, which reaps.
    script = "; ".join(["set -e", *prepare, "echo ready", "set +e", "while :; do sleep 3600 & wait $!; done"])
    with log.open("ab") as errors:
        holder = subprocess.Popen(
            [*_HOLD, "--mount-proc", "--propagation", "private", "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert holder.stdout is not None
    if holder.stdout.readline() != b"ready\n":
        _end(holder)
        raise RuntimeError(f"host {name} could not be prepared: {log.read_text()}")
    holder.stdout.close()
    return holder, _child(holder.pid)


def _child(process: int) -> int:
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


def _release(holder: subprocess.Popen[bytes], init: int) -> None:
    """End a host; when the process that holds it ends, everything on it has ended."""
    if holder.poll() is None:  # else the number may be another process's by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)
    holder.wait(timeout=_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=_SECONDS)


# --- a slow cable -------------------------------------------------------------------------------------------------
# Done here and not by `tc netem`, which many kernels are built without.


def _relay(switch: int, host: int, name: str, delay: float, loss: float) -> subprocess.Popen[bytes]:
    """Start the process that is the cable between a host and the switch."""
    words = [sys.executable, __file__, str(switch), str(host), name, str(delay), str(loss)]
    relay = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *words],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert relay.stdout is not None
    if relay.stdout.readline() != b"ready\n":
        _end(relay)
        raise RuntimeError(f"the cable of {name} could not be made: is /dev/net/tun there?")
    relay.stdout.close()
    return relay


def _open_tap(process: int, name: str) -> int:
    """A network card in the namespace of a process, whose frames this process reads and writes."""
    new_network = 0x40000000
    with open(f"/proc/{process}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), new_network):
            raise OSError(ctypes.get_errno(), f"cannot enter the network of process {process}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    tun_set_iff, iff_tap, iff_no_pi = 0x400454CA, 0x0002, 0x1000
    fcntl.ioctl(tap, tun_set_iff, struct.pack("16sH22x", name.encode(), iff_tap | iff_no_pi))
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    return tap


def _carry(switch: int, host: int, name: str, delay: float, loss: float) -> None:
    """Carry frames between a host and the switch, each after `delay` seconds, and drop a share of them."""
    ends = (_open_tap(switch, name), _open_tap(host, "card"))
    print("ready", flush=True)
    other = dict(zip(ends, reversed(ends), strict=True))
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    draw = random.Random(0)
    under_way: deque[tuple[float, int, bytes]] = deque()  # in the order in which they are due: all take as long
    while True:
        wait = 1000 * (under_way[0][0] - time.monotonic()) if under_way else None
        for end, _ in poll.poll(wait if wait is None else max(0.0, wait)):
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = os.read(end, 65536)
                    if draw.random() >= loss:
                        under_way.append((time.monotonic() + delay, other[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            with contextlib.suppress(OSError):  # a card that is down, or full: the frame is lost, as on a cable
                os.write(end, frame)


if __name__ == "__main__":
    _carry(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), float(sys.argv[5]))
