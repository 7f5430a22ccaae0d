"""Whole runs on a cluster of several hosts while hosts, cables and trainers fail: the same numbers, and what it costs.

    python benchmarks/hosts.py                # as root; writes docs/results/hosts.md and .json
    python benchmarks/hosts.py --lag 1        # lag 1 alone; what is there of lag 0 stays
    python benchmarks/hosts.py --only lost takeover --output /tmp/x   # some scenarios, and the run without faults

The hosts are namespaces of this machine with a network of their own (`netns.py`): Ray, its actors and the trainer are
real and started as on real hosts, and cables are pulled at the switch. Needs Linux, root, iproute2, util-linux and
procps. All of it is gone when this ends, also by Ctrl-C. Every scenario has a cluster of its own, and its fault waits
until it hits work that is under way.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from cloud import Cloud, Event, NotShown, Run
from faults import FAULT_STEP, NAME, NUM_STEPS, RECIPE, SCENARIOS, Scenario
from harness.report import ROOT, environment
from netns import Network, why_not

from coupled.rl.monitoring.metrics import DETERMINISTIC_EXCEPT
from coupled.rl.run_folder.folder import committed_checkpoints, read_rows

COUNTED = ("redispatched", "hedged", "duplicates", "lost_workers", "quarantined")
INTRODUCTION = f"""# Faults of hosts and networks

Made by `benchmarks/hosts.py`; all numbers are in [hosts.json](hosts.json). The hosts are namespaces of one
machine, each with a network card, processes, /dev/shm and Ray of its own: a head, three with a rollout worker
and a supervisor of the sandbox each, and where it says so one for the trainer. The trainer is `coupled train`
on the embedded model: {NUM_STEPS} steps of twelve completions in six batches, `cluster.health: fast`. A fault
comes when a batch of step {FAULT_STEP} is under way on the host that it hits.

**Same bits**: SHA-256 of the last checkpoint's weights, of all metrics of all steps (without times and the
cluster's own), and of all rollouts with tokens, log-probabilities and verdicts are those of the run without
faults; every step is logged once; every batch and every program counted once, or where the run was resumed at
most once for each process. **Seconds**: from the first batch to the last step; **added**: over the run without
faults in the same sitting. **Again**: tried again after a loss; **hedged**: given to a second worker beside the
first; **dropped**: results that came second; **lost**: workers that were given up; **left out**: batches. These
are sums over the metrics of all steps. **Seen**: seconds between fault and reaction. With a load far above the
number of cores, seconds say more of the machine than of the fault.
"""

# --- the oracle ---------------------------------------------------------------------------------------------------


def outcome(run: Run) -> dict[str, Any]:
    """Of a finished run: digests of what it computed, what it counted, and its seconds from the first batch on."""
    rows = read_rows(run.folder / "metrics.jsonl")
    known = [{k: v for k, v in row.items() if not k.startswith(DETERMINISTIC_EXCEPT)} for row in rows]
    tables = [pq.read_table(path).to_pylist() for path in sorted((run.folder / "rollouts").glob("*.parquet"))]
    checkpoint = committed_checkpoints(run.folder / "checkpoints")[-1]
    first = next(event["time"] for event in run.events() if event["event"] == "issue")
    return {
        "weights": digest((checkpoint / "model.safetensors").read_bytes()),
        "metrics": digest(json.dumps(known).encode()),
        "rollouts": digest(repr(tables).encode()),
        "steps": [row["step"] for row in rows],
        "checkpoint": checkpoint.name,
        "counted": {name: sum(row.get(f"cluster/{name}", 0) for row in rows) for name in COUNTED},
        "seconds": (run.folder / "metrics.jsonl").stat().st_mtime - first,
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def miscounts(events: Sequence[Event], num_processes: int) -> list[str]:
    """Batches of training and samples to score that counted more often than the run had processes, or not at all.

    One that resumes makes what was under way again.
    """
    asked = {f"train/{e['step']}/{slot}" for e in events if e["event"] == "issue" for slot in range(e["units"])}
    made = Counter(e["key"] for e in events if e["event"] == "rolled" and e["key"] in asked)
    wrong = [f"{key} counted {made[key]} times" for key in sorted(asked) if not 1 <= made[key] <= num_processes]
    scores = Counter((e["key"], place) for e in events if e["event"] == "scored" for place in e["part"])
    again = Counter((e["key"], place) for e in events if e["event"] == "infra" for place in e["part"])
    wrong += [
        f"{key}[{n}] scored {times} times" for (key, n), times in (scores - again).items() if times > num_processes
    ]
    return wrong


def flaws(found: dict[str, Any], reference: dict[str, Any], scenario: Scenario, events: Sequence[Event]) -> list[str]:
    """What differs from the run without faults, and what was to be seen and was not."""
    wrong = [f"{name} differ" for name in ("weights", "metrics", "rollouts") if found[name] != reference[name]]
    if found["steps"] != list(range(1, NUM_STEPS + 1)):
        wrong.append(f"steps in the metrics: {found['steps']}")
    if found["checkpoint"] != f"step_{NUM_STEPS:06d}":
        wrong.append(f"the last checkpoint is {found['checkpoint']}")
    wrong += [
        f"{name}: {found['counted'][name]} counted, at least {least} expected"
        for name, least in scenario.fewest.items()
        if found["counted"][name] < least
    ]
    num_processes = sum(event["event"] == "spawn" and event["worker"] == "roll-0#1" for event in events)
    return wrong + miscounts(events, num_processes)


# --- the sitting --------------------------------------------------------------------------------------------------


def measure(name: str, lag: int, folder: Path, reference: dict[str, Any] | None) -> dict[str, Any]:
    """One scenario on a cluster of its own."""
    scenario = SCENARIOS[name]
    row: dict[str, Any] = {"scenario": name, "what": scenario.what, "lag": lag}
    with Network(folder / "network") as network:
        cloud = Cloud(network, folder, scenario.layout)
        host = "trainer" if scenario.layout.has_trainer_host else "head"
        run = cloud.train(NAME, (*scenario.arguments, *RECIPE, f"cluster.lag={lag}"), host=host)
        row["seen"] = scenario.fault(cloud, run)
        status = run.status()
        if status != 0:
            raise NotShown(f"the run ended with {status}: {run.tail()}")
    row |= outcome(run)
    if reference is not None:
        row["added_seconds"] = row["seconds"] - reference["seconds"]
        row["flaws"] = flaws(row, reference, scenario, run.events())
    else:
        row["flaws"] = flaws(row, row, scenario, run.events())
    return row


def sitting(names: Sequence[str], lag: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Scenarios one after the other, beside the run without faults of the same lag; what there is after each."""
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(("none", *names)):
        if lag not in SCENARIOS[name].lags:
            continue
        place = folder / f"{name}-{lag}"
        place.mkdir(parents=True)
        try:
            row = measure(name, lag, place, rows[0] if rows else None)
        except (NotShown, RuntimeError, subprocess.SubprocessError) as error:
            row = {"scenario": name, "what": SCENARIOS[name].what, "lag": lag, "flaws": [str(error)]}
            if not rows:
                sys.exit(f"the run without faults failed: {error}")
        rows.append(row)
        print("\n".join(table([row])[2:]), flush=True)
        about = {"ray": version("ray"), "load": " ".join(f"{load:.1f}" for load in os.getloadavg())}
        yield {"environment": environment() | about, "seconds": time.monotonic() - started, "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| what happens | same bits | seconds | added | again | hedged | dropped | lost | left out | seen |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        cells = [
            row["what"],
            "no: " + "; ".join(flaw.partition("\n")[0] for flaw in row["flaws"]) if row["flaws"] else "yes",
        ]
        if "counted" in row:
            cells += [f"{row['seconds']:.0f}", f"{row['added_seconds']:+.0f}" if "added_seconds" in row else ""]
            cells += [f"{row['counted'][name]:.0f}" for name in COUNTED]
            cells.append("; ".join(f"{name}: {value:.1f}" for name, value in row["seen"].items()))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(report: dict[str, Any]) -> str:
    """docs/results/hosts.md."""
    lines = [INTRODUCTION]
    for lag, part in sorted(report.items()):
        about = part["environment"]
        lines += [
            f"## Lag {lag}",
            "",
            *table(part["rows"]),
            "",
            f"`{about['command']}`, commit {about['commit']}, {about['cores']} cores of an {about['processor']} "
            f"(load {about['load']}), Python {about['python']}, Ray {about['ray']}, {part['seconds']:.0f} s.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), help="scenarios")
    parser.add_argument("--lag", type=int, nargs="+", default=[0, 1], help="steps that rollouts run ahead")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs; default: one that is thrown away")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results", help="where the results go")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"benchmarks/hosts.py cannot run here: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open is closed
    file = options.output / "hosts.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    with contextlib.ExitStack() as opened:
        folder = options.keep or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        for lag in options.lag:
            for part in sitting(options.only, lag, folder):
                report[str(lag)] = part
                options.output.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(report, indent=1) + "\n")
                (options.output / "hosts.md").write_text(page(report))
    sys.exit(any(row["flaws"] for lag in options.lag for row in report[str(lag)]["rows"]))


if __name__ == "__main__":
    main()
