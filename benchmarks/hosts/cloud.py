"""Ray on hosts that are namespaces (`netns.py`), and `coupled train` on one of them, watched by what it writes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.report import ROOT

from coupled.rl.run_folder.folder import committed_checkpoints, read_rows
from hosts.netns import TEMPORARY, Host, Network

PORT = 6379
SECONDS = 600.0
"""Whatever is waited for comes within this time, or the scenario has failed."""

Event = dict[str, Any]


class NotShown(Exception):
    """A scenario did not come to what it is there to show."""


@dataclass(slots=True, kw_only=True)
class Run:
    """A `coupled train` on a host."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    def events(self) -> list[Event]:
        """Everything that happened to every batch so far."""
        path = self.folder / "events.jsonl"
        return read_rows(path) if path.is_file() else []

    def wait(self, happened: Callable[[Event], bool], *, after: float = 0.0) -> Event:
        """The first event, of those after a time, that is of a kind."""
        for _ in self.until_it_ends():
            for event in self.events():
                if event["time"] >= after and happened(event):
                    return event
        raise AssertionError("unreachable")

    def wait_committed(self, step: int, generation: int = 1) -> None:
        """Wait for a checkpoint of at least this step, by the run's process of this number."""
        for _ in self.until_it_ends():
            for folder in committed_checkpoints(self.folder / "checkpoints"):
                with contextlib.suppress(OSError):
                    about = json.loads((folder / "MANIFEST.json").read_text())
                    if about["step"] >= step and about["generation"] >= generation:
                        return

    def until_it_ends(self) -> Iterator[None]:
        """For loops that look at the run again and again, as long as there is something to see."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            has_ended = self.process.poll() is not None  # asked first: what it did last is also seen
            yield
            if has_ended:
                raise NotShown(f"the run ended ({self.process.returncode}) before it was seen\n{self.tail()}")
            time.sleep(0.02)
        raise NotShown(f"nothing of it within {SECONDS:.0f} s")

    def status(self) -> int:
        """Wait for its end."""
        return self.process.wait(timeout=SECONDS)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]

    def host_of(self, worker: str) -> str:
        """Where an incarnation of a worker is."""
        return next(str(e["host"]) for e in reversed(self.events()) if e["event"] == "ready" and e["worker"] == worker)

    def busy_host(self, step: int) -> str:
        """Wait until a worker has its second batch of a step, so that it has the weights, and return where it is."""
        for _ in self.until_it_ends():
            started = [str(event["worker"]) for event in self.events() if is_start(f"train/{step}/")(event)]
            for worker in started:
                if started.count(worker) > 1:
                    return self.host_of(worker)
        raise AssertionError("unreachable")


def is_start(key: str) -> Callable[[Event], bool]:
    """Whether a worker was given a batch whose name begins so."""
    return lambda event: event["event"] == "start" and str(event["key"]).startswith(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The parts of a cluster: a head, hosts for workers, and if wanted one for the trainer."""

    num_hosts: int = 3
    cpus_per_host: int = 1
    shm_mb: int = 512
    delay: float = 0.0
    """Seconds that a frame takes between a worker's host and the switch."""
    loss: float = 0.0
    """Share of these frames that is lost."""
    has_trainer_host: bool = False
    silent_seconds: int = 65
    """After which the head gives a silent node up; the default is Ray's."""

    @property
    def checks(self) -> dict[str, str]:
        """Variables that make the head give a node up when it should."""
        if self.silent_seconds == Layout.silent_seconds:
            return {}
        milliseconds = {"initial_delay": 1000, "period": 1000, "timeout": 2000}
        settings = {f"RAY_health_check_{name}_ms": str(value) for name, value in milliseconds.items()}
        return settings | {"RAY_health_check_failure_threshold": str(self.silent_seconds // 3)}


class Cloud:
    """Hosts with Ray on them: `head`, `worker-1` and so on, and if wanted `trainer`."""

    def __init__(self, network: Network, folder: Path, layout: Layout) -> None:
        self.network = network
        self.folder = folder
        self.layout = layout
        self.rays: dict[str, subprocess.Popen[bytes]] = {}
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        workers = [f"worker-{number}" for number in range(1, layout.num_hosts + 1)]
        network.add("head", shm_mb=layout.shm_mb)
        for name in workers:
            network.add(name, shm_mb=layout.shm_mb, delay=layout.delay, loss=layout.loss)
        if layout.has_trainer_host:
            network.add("trainer")
        for name in network.hosts:
            self.start_ray(name)
            if name == "head":
                self.wait_alive(1)
        self.wait_alive(len(network.hosts))

    def __getitem__(self, name: str) -> Host:
        return self.network.hosts[name]

    def start_ray(self, name: str) -> None:
        """Start a node, as an administrator does on a real host."""
        host = self[name]
        role = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={TEMPORARY}"]
        if name != "head":
            role = [f"--address={self['head'].address}:{PORT}"]
        num_cpus = self.layout.cpus_per_host if name.startswith("worker") else 0
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={host.address}"]
        command += [f"--num-cpus={num_cpus}", "--object-store-memory=104857600", "--disable-usage-stats", "--block"]
        checks = self.layout.checks if name == "head" else {}
        self.rays[name] = host.start(command, self.folder / f"{name}.log", self.environment() | checks)

    def alive(self) -> list[str]:
        """Addresses of the nodes that the head counts as alive."""
        asks = (
            "from ray._raylet import GcsClient; nodes = GcsClient(address="
            f"'{self['head'].address}:{PORT}').get_all_node_info(timeout=20); "
            "print(*(n.node_manager_address for n in nodes.values() if n.state == 0))"
        )
        return self["head"].ask([sys.executable, "-c", asks], self.environment(), seconds=60.0).split()

    def wait_alive(self, number: int) -> None:
        """Wait until the head counts so many nodes."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # the head is not there yet
                if len(self.alive()) == number:
                    return
            for name, process in self.rays.items():
                if process.poll() is not None:
                    log = (self.folder / f"{name}.log").read_text(errors="replace")[-1500:]
                    raise NotShown(f"Ray on {name} ended with {process.returncode}: {log}")
            time.sleep(0.5)
        raise NotShown(f"the head does not count {number} nodes: {self.alive()}")

    def wait_given_up(self, host: Host) -> None:
        """Wait until the head counts a host as dead."""
        deadline = time.monotonic() + SECONDS
        while host.address in self.alive():
            if time.monotonic() > deadline:
                raise NotShown(f"the head still counts {host.name} after {SECONDS:.0f} s")
            time.sleep(0.5)

    def environment(self) -> dict[str, str]:
        """Of everything that runs on a host."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return plain | self.token | {"PYTHONUNBUFFERED": "1"}

    def train(
        self, recipe: str, overrides: Sequence[str], *, host: str = "head", environment: dict[str, str] | None = None
    ) -> Run:
        """Start `coupled train` on a host."""
        number = len(list(self.folder.glob("train-*.log")))
        log = self.folder / f"train-{number}.log"
        runs = self.folder / "runs"
        command = [sys.executable, "-m", "coupled.rl.cli", "train", str(ROOT / "recipes" / f"{recipe}.yaml")]
        command += [*overrides, f"cluster.address={self['head'].address}:{PORT}", f"output_dir={runs}"]
        process = self[host].start(command, log, environment or self.environment())
        return Run(process=process, folder=runs / f"{recipe}-001", log=log)
