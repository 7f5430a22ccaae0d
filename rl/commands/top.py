"""`coupled top`: workers and their jobs, queues, and idle times of both sides, from a run's files."""

from __future__ import annotations

import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from coupled.rl.commands.run_view import Balance, EventReader, RunView, balance_of
from coupled.rl.monitoring.events import FILE
from coupled.rl.recipe.schema import Recipe, RunRecipe
from coupled.rl.run_folder.folder import RunFolder, read_run_recipe

REFRESH_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""Report the silence of an unfinished run after this long without an event: it may have ended."""
COUNTED = {
    "failed": "retried",
    "hedged": "hedged",
    "duplicate": "dropped as duplicates",
    "quarantined": "quarantined",
    "lost": "workers lost",
    "save_failed": "checkpoints not written",
    "fall_back": "fallen back to lag 0",
}


def top(folder: Path, console: Console, *, is_live: bool) -> None:
    """Print the state of a run; live: refreshed until the run is finished or Ctrl-C.

    The folder must hold events.jsonl.
    """
    reader, files = EventReader(folder), RunFolder(folder, keep=1)
    recipe = read_run_recipe(folder) if (folder / "recipe.yaml").is_file() else None

    def frame() -> tuple[Group, bool]:
        run, rows = reader.read(), files.rows()
        done = int(rows[-1]["step"]) if rows else 0
        is_finished = recipe is not None and done >= recipe.num_steps
        now = run.last if is_finished else time.time()
        return Group(head(folder, recipe, run, done, now), show(run, now, balance_of(run, rows), recipe)), is_finished

    shown, is_finished = frame()
    if not is_live or is_finished:
        console.print(shown, highlight=False)
        return
    with Live(shown, console=console, auto_refresh=False) as live:
        while not is_finished:
            time.sleep(REFRESH_SECONDS)
            shown, is_finished = frame()
            live.update(shown, refresh=True)


def head(folder: Path, recipe: RunRecipe | None, run: RunView, done: int, now: float) -> str:
    """One line: the run, its progress, and a second line when it has no workers."""
    if recipe is None:
        return f"{folder}: {done} steps trained"
    told = f"{folder}: {done} of {recipe.num_steps} steps trained"
    if done >= recipe.num_steps:
        told += ", finished"
    elif now - run.last > SILENT_SECONDS:
        told += f", no event for {now - run.last:.0f} s"
    if not isinstance(recipe, Recipe):
        return told
    if recipe.rollout.workers == "inline" and recipe.sandbox.workers == "inline":
        told += "\nno cluster: rollout.workers and sandbox.workers are inline, so the run is one process"
    return told


def show(run: RunView, now: float, balance: Balance | None = None, recipe: RunRecipe | None = None) -> Group:
    """The view as a table and lines; `now` in seconds since the epoch."""
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
    told = "no worker has a job" if oldest is None else f"oldest: {oldest[0]}, {oldest[1]} for {now - oldest[2]:.0f} s"
    queues = [f"{len(units)} to {stage} (first {units[0]})" for stage in run.pending if (units := run.waiting(stage))]
    counts = ", ".join(f"{run.counts[kind]} {words}" for kind, words in COUNTED.items() if run.counts[kind])
    lines = [
        f"step {run.step} started with weights {run.version}; {told}",
        "waiting: " + (", ".join(queues) or "nothing"),
        counts or "no failures",
    ]
    if balance is not None:
        lines += split(balance, recipe)
    return Group(table, *lines)


def split(balance: Balance, recipe: RunRecipe | None) -> list[str]:
    """Cost of both sides of a step, and the number of rollout workers that keeps both busy."""
    lines = [
        f"idle: rollout workers {balance.rollout_idle:.0%}, trainer {balance.trainer_idle:.0%}",
        f"a step takes {balance.rollout_seconds:.1f} worker-seconds of rollouts and {balance.trainer_seconds:.1f} s of "
        f"the trainer: {balance.suggested_workers} rollout workers per trainer keep both busy, if rollouts run ahead; "
        f"there are {balance.num_workers}",
    ]
    if recipe is not None and recipe.cluster.lag == 0:
        lines.append("at cluster.lag=0 the two take turns, and one of them is always idle; cluster.lag=1 overlaps them")
    return lines


def has_events(folder: Path) -> bool:
    """True if the run folder contains `events.jsonl`."""
    return (folder / FILE).is_file()
