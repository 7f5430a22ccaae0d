"""What `benchmarks/hosts` is made of: its oracle, its refusals, and hosts that are namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def hosts(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("hosts")


@pytest.fixture(scope="module")
def oracle(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("hosts/oracle")


@pytest.fixture(scope="module")
def netns(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("hosts/netns")


def event(kind: str, **facts: Any) -> dict[str, Any]:
    return {"event": kind, **facts}


def of_a_step() -> list[dict[str, Any]]:
    """Two batches, one of which is scored in two parts, because its first try was no fault of the program's."""
    return [
        event("spawn", worker="roll-0#1"),
        event("issue", step=1, units=2),
        event("rolled", key="train/1/0"),
        event("rolled", key="train/1/1"),
        event("scored", key="programs/1/0", part=[0, 1]),
        event("infra", key="programs/1/0", part=[1]),
        event("scored", key="programs/1/0", part=[1]),
    ]


def test_a_batch_that_counted_twice_or_never_is_found(oracle: ModuleType) -> None:
    good = of_a_step()
    assert oracle.miscounts(good, 1) == []
    assert oracle.miscounts([*good, event("rolled", key="train/1/0")], 1) == ["train/1/0 counted 2 times"]
    assert oracle.miscounts([*good, event("rolled", key="train/1/0")], 2) == [], "a process that resumed made it again"
    assert oracle.miscounts([e for e in good if e.get("key") != "train/1/1"], 1) == ["train/1/1 counted 0 times"]
    again = event("scored", key="programs/1/0", part=[0])
    assert oracle.miscounts([*good, again], 1) == ["programs/1/0[0] scored 2 times"]


def test_a_run_that_differs_in_a_bit_or_was_never_hit_is_not_the_same(hosts: ModuleType) -> None:
    last = hosts.NUM_STEPS
    found = {
        "weights": "a",
        "metrics": "b",
        "rollouts": "c",
        "steps": list(range(1, last + 1)),
        "checkpoint": f"step_{last:06d}",
        "counted": dict.fromkeys(hosts.COUNTED, 0.0),
    }
    scenario = hosts.SCENARIOS["none"]
    assert hosts.flaws(found, found, scenario, of_a_step()) == []
    assert hosts.flaws(found | {"weights": "z"}, found, scenario, of_a_step()) == ["weights differ"]
    twice = found | {"steps": [1, *found["steps"]]}
    assert "steps in the metrics: [1, 1, 2" in hosts.flaws(twice, found, scenario, of_a_step())[0]
    assert hosts.flaws(found, found, hosts.SCENARIOS["crash"], of_a_step()) == [
        "redispatched: 0.0 counted, at least 1 expected",
        "lost_workers: 0.0 counted, at least 1 expected",
    ]


def test_a_scenario_that_failed_has_its_row_in_the_table(hosts: ModuleType) -> None:
    failed = {"scenario": "lost", "what": "cable out", "lag": 1, "flaws": ["the run ended with 75"]}
    assert hosts.table(hosts.HEAD, [hosts.cells_of(failed)])[-1].startswith("| cable out | no: the run ended with 75 |")


def test_it_says_why_it_cannot_run(
    hosts: ModuleType, netns: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["hosts", "--output", str(tmp_path)])
    with monkeypatch.context() as context:
        context.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(SystemExit, match="only root may make; this is user 1000: run it as root"):
            hosts.main()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ip" else which(name))
    assert netns.why_not() == "not found: ip. Install iproute2, util-linux and procps"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def network(netns: ModuleType, tmp_path: Path) -> Any:
    reason = netns.why_not()
    if reason is not None:
        pytest.skip(reason)
    return netns.Network(tmp_path / "network")


ANSWER = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    while True:
        connection, _ = server.accept()
        connection.sendall(socket.gethostname().encode())
        connection.close()
"""
ASK = """
import socket, sys, time
started = time.monotonic()
try:
    with socket.create_connection((sys.argv[1], 5000), timeout=1) as connection:
        print(connection.recv(100).decode(), time.monotonic() - started)
except OSError:
    print("nobody", time.monotonic() - started)
"""


def ask(host: Any, address: str) -> tuple[str, float]:
    """Who answers at an address, and after how many seconds."""
    for _ in range(100):
        who, seconds = host.ask([sys.executable, "-c", ASK, address]).split()
        if who != "nobody" or float(seconds) > 0.5:  # it was not refused: the server is there, or the cable is out
            break
        time.sleep(0.1)
    return who, float(seconds)


@pytest.mark.slow
def test_hosts_hear_each_other_until_a_cable_is_out_and_are_gone_in_the_end(network: Any, tmp_path: Path) -> None:
    with network:
        one, two = network.add("one"), network.add("two")
        far = network.add("far", delay=0.1)
        server = one.start([sys.executable, "-c", ANSWER], tmp_path / "log")
        assert ask(two, one.address)[0] == "one"
        who, seconds = ask(far, one.address)
        assert who == "one"
        assert seconds >= 0.4, "two ways there and two back"
        one.cut()
        assert ask(two, one.address)[0] == "nobody"
        one.heal()
        assert ask(two, one.address)[0] == "one"
        (tmp_path / "seen").write_text("by all")
        assert two.ask(["cat", str(tmp_path / "seen")]) == "by all"
        one.ask(["touch", "/dev/shm/mine"])
        assert two.ask(["ls", "/dev/shm"]) == ""
        one.crash()
        server.wait(timeout=10)
        assert one.ask(["hostname"]) == "one\n", "the host itself is still there"
        inits = [host.init for host in network.hosts.values()]
        assert all(Path(f"/proc/{init}").exists() for init in inits)
    assert not any(Path(f"/proc/{init}").exists() for init in inits)


@pytest.mark.slow
def test_hosts_end_with_whoever_made_them_even_if_that_is_killed(network: Any, tmp_path: Path) -> None:
    program = (
        f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from pathlib import Path; from hosts.netns import Network\n"
        f"with Network(Path({str(tmp_path)!r}) / 'other') as network:\n"
        "    print(network.add('one').init, network.add('far', delay=0.1).init, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        inits = maker.stdout.readline().split()
        assert len(inits) == 2
        maker.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{init}").exists() for init in inits):
        assert time.monotonic() < deadline
        time.sleep(0.05)
