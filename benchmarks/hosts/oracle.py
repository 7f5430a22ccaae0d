"""The oracle: a run on failing hosts computes the same bits as one without faults, and counts all work once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from coupled.rl.monitoring.metrics import DETERMINISTIC_EXCEPT
from coupled.rl.run_folder.folder import committed_checkpoints, read_rows
from hosts.cloud import Event, Run
from hosts.faults import NUM_STEPS, Scenario

COUNTED = ("redispatched", "hedged", "duplicates", "lost_workers", "quarantined")


def outcome(run: Run) -> dict[str, Any]:
    """Digests of what a finished run computed, its counts, and its seconds from the first batch on."""
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
    """Differences from the run without faults, and effects that were expected and did not show."""
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
