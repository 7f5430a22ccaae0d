"""`coupled top`: who is there, who has what, and what is waited for longest. Read from a run's events.jsonl alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

COUNTED = {
    "failed": "tried again",
    "hedged": "hedged",
    "duplicate": "dropped as second",
    "quarantined": "quarantined",
    "lost": "workers lost",
}


@dataclass(slots=True)
class WorkerView:
    """A worker as the events leave it."""

    holder: str = ""
    state: str = "restarting"
    host: str = ""
    pid: int = 0
    num_done: int = 0
    num_lost: int = 0
    why: str = ""
    has: dict[str, float] = field(default_factory=dict)
    """Unit → when it was given to the worker, in seconds since the epoch."""


@dataclass(slots=True)
class RunView:
    """A run as its events leave it."""

    workers: dict[str, WorkerView] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    step: int = 0
    """The latest that has been begun."""
    version: int = -1
    """Of its weights."""

    def oldest(self) -> tuple[str, str, float] | None:
        """The unit that somebody has had longest, who has it, and since when; None when nobody has any."""
        held = [(since, unit, view.holder) for view in self.workers.values() for unit, since in view.has.items()]
        if not held:
            return None
        since, unit, holder = min(held)
        return unit, holder, since


def view_of(events: Iterable[Mapping[str, Any]]) -> RunView:
    """What the events add up to. One process of a run begins anew: its workers are not those of the one before."""
    run = RunView()
    for event in events:
        kind = event["event"]
        run.counts[kind] += 1
        if kind == "issue":
            run.step, run.version = event["step"], event["version"]
        if "worker" not in event:
            continue
        name, _, incarnation = str(event["worker"]).partition("#")
        if kind == "spawn" and incarnation == "1":
            run.workers[name] = WorkerView()
        worker = run.workers.setdefault(name, WorkerView())
        worker.holder = str(event["worker"])
        if kind == "spawn":
            worker.state = "restarting"
        elif kind == "ready":
            worker.state, worker.why = "ready", ""
            worker.host, worker.pid = event.get("host", ""), event.get("pid", 0)
        elif kind in ("suspect", "retired"):
            worker.state = kind
        elif kind == "lost":
            worker.state, worker.why = "lost", event.get("why", "")
            worker.num_lost += 1
            worker.has.clear()
        elif kind == "start":
            worker.has[_unit(event)] = event["time"]
        elif kind in ("rolled", "scored", "duplicate", "failed"):
            worker.has.pop(_unit(event), None)
            worker.num_done += kind in ("rolled", "scored")
            if worker.state == "suspect" and kind != "failed":
                worker.state = "ready"
    return run


def show(run: RunView, now: float) -> Group:
    """The view as tables; `now` in seconds since the epoch."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("worker", "state", "host", "pid", "done", "lost", "has", "for"):
        table.add_column(column, no_wrap=True)
    for name, worker in sorted(run.workers.items()):
        since = min(worker.has.values(), default=None)
        table.add_row(
            worker.holder or name,
            worker.state + (f": {worker.why[:60]}" if worker.why else ""),
            worker.host,
            str(worker.pid or ""),
            str(worker.num_done),
            str(worker.num_lost),
            ", ".join(sorted(worker.has)[:2]) + (" …" if len(worker.has) > 2 else ""),
            "" if since is None else f"{now - since:.0f} s",
        )
    oldest = run.oldest()
    told = "nobody has anything" if oldest is None else f"oldest: {oldest[0]}, {oldest[1]} for {now - oldest[2]:.0f} s"
    counts = ", ".join(f"{run.counts[kind]} {words}" for kind, words in COUNTED.items() if run.counts[kind])
    begun = f"step {run.step} begun with weights {run.version}; {told}"
    return Group(table, begun, counts or "nothing has gone wrong")


def _unit(event: Mapping[str, Any]) -> str:
    part = event.get("part") or []
    return str(event["key"]) + (f"[{part[0]}]" if len(part) == 1 else "")
