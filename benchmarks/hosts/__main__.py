"""Whole runs on a cluster of several hosts while hosts, cables and trainers fail: the same numbers, and what it costs.

    python benchmarks/hosts                # as root; writes docs/results/hosts.md and .json
    python benchmarks/hosts --lag 1        # lag 1 alone; what is there of lag 0 stays
    python benchmarks/hosts --only lost takeover --output /tmp/x   # some scenarios, and the run without faults

The hosts are namespaces of this machine with a network of their own (`netns.py`): Ray, its actors and the trainer are
real and started as on real hosts, and cables are pulled at the switch. Needs Linux, root, iproute2, util-linux and
procps. All of it is gone when this ends, also by Ctrl-C. Every scenario has a cluster of its own, and its fault waits
until it hits work that is under way.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python itself looks only into the folder that it is started with

from harness.report import RESULTS, environment, loads, provenance, read_report, whole_help, write_report
from harness.tables import line, table

from hosts.cloud import Cloud, NotShown
from hosts.faults import FAULT_STEP, NAME, NUM_STEPS, RECIPE, SCENARIOS
from hosts.netns import Network, why_not
from hosts.oracle import COUNTED, flaws, outcome

INTRODUCTION = f"""# Faults of hosts and networks

Made by `benchmarks/hosts`; all numbers are in [hosts.json](hosts.json). The hosts are namespaces of one
machine, each with a network card, processes, /dev/shm and Ray of its own: a head, three with a rollout worker
and a supervisor of the sandbox each, and where it says so one for the trainer. The trainer is `coupled train`
on the embedded model: {NUM_STEPS} steps of twelve completions in six batches, `cluster.health: fast`. A fault
comes when a batch of step {FAULT_STEP} is under way on the host that it hits.

**Same bits**: SHA-256 of the last checkpoint's weights, of all metrics of all steps (without times and the
cluster's own), and of all rollouts with tokens, log-probabilities and verdicts match the run without
faults; every step is logged once; every batch and every program counted once, or where the run was resumed at
most once for each process. **Seconds**: from the first batch to the last step; **added**: over the run without
faults in the same sitting. **Again**: tried again after a loss; **hedged**: given to a second worker beside the
first; **dropped**: results that came second; **lost**: workers that were given up; **left out**: batches. These
are sums over the metrics of all steps. **Seen**: seconds between fault and reaction. With a load far above the
number of cores, seconds say more of the machine than of the fault.
"""

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
        print(line(cells_of(row)), flush=True)
        about = {"ray": version("ray"), "load": loads()}
        yield {"environment": environment() | about, "seconds": time.monotonic() - started, "rows": rows}


HEAD = ("what happens", "same bits", "seconds", "added", "again", "hedged", "dropped", "lost", "left out", "seen")


def cells_of(row: dict[str, Any]) -> list[str]:
    """A scenario's row in the table; only the first two cells where it failed."""
    wrong = "; ".join(flaw.partition("\n")[0] for flaw in row["flaws"])
    cells = [row["what"], f"no: {wrong}" if wrong else "yes"]
    if "counted" in row:
        cells += [f"{row['seconds']:.0f}", f"{row['added_seconds']:+.0f}" if "added_seconds" in row else ""]
        cells += [f"{row['counted'][name]:.0f}" for name in COUNTED]
        cells.append("; ".join(f"{name}: {value:.1f}" for name, value in row["seen"].items()))
    return cells


def page(report: dict[str, Any]) -> str:
    """docs/results/hosts.md."""
    lines = [INTRODUCTION]
    for lag, part in sorted(report.items()):
        about = part["environment"]
        lines += [
            f"## Lag {lag}",
            "",
            *table(HEAD, [cells_of(row) for row in part["rows"]]),
            "",
            f"{provenance(about)}, Ray {about['ray']}, {part['seconds']:.0f} s.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = whole_help(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), help="scenarios")
    parser.add_argument("--lag", type=int, nargs="+", default=[0, 1], help="steps that rollouts run ahead")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs; default: one that is thrown away")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"benchmarks/hosts cannot run here: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open is closed
    file = options.output / "hosts.json"
    report = read_report(file)
    with contextlib.ExitStack() as opened:
        folder = options.keep or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        for lag in options.lag:
            for part in sitting(options.only, lag, folder):
                report[str(lag)] = part
                write_report(report, file, page)
    sys.exit(any(row["flaws"] for lag in options.lag for row in report[str(lag)]["rows"]))


if __name__ == "__main__":
    main()
