"""Gains from workers outside of the trainer, the cost of their failures, and the cost of the coordinator itself.

    python benchmarks/cluster.py                         # simulation and local processes; writes docs/results/cluster.*
    python benchmarks/cluster.py --only overlap calls    # some parts; the others are kept as they are in the json
    python benchmarks/cluster.py --only ray              # calls per second through Ray actors

All but `calls` and `ray` run the real coordinator (ledger, pools, admission, deadlines) over the simulator, whose clock
is virtual: nothing is rolled out or trained, a batch takes the time that is drawn for it. Those parts say what the
coordinator does with given times, not how fast a GPU is. `calls` and `ray` are measured in real time, with workers that
do nothing.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.report import RESULTS, ROOT, environment, loads, provenance, read_report, whole_help, write_report
from harness.tables import figure, span, table

from coupled.rl.cluster.admission import InOrder
from coupled.rl.cluster.coordinator import Coordinator, Weights
from coupled.rl.cluster.pool import PoolSpec
from coupled.rl.cluster.simulate import Faults, SimTransport
from coupled.rl.cluster.transport import Transport, WorkerSpec
from coupled.rl.cluster.types import PATIENT, GroupKey, Unit

SEEDS = range(5)
SPREADS = (0.03, 0.3, 0.8)
"""Standard deviation of a batch's time over its mean: a fixed canvas and fixed steps; decoding that stops by
confidence; lengths as autoregressive models have them (../shared/docs/cluster.md, section 5)."""
COMPLETION_SECONDS = {"full canvas, 256 steps": 3.99, "ten times as fast": 0.40}
"""GPU-seconds that a 7.6 B model takes to roll out a completion: 256 forwards of 6.93 TFLOP at 45 % of 989 TFLOP/s."""
TRAIN_SECONDS = 30 * 6.93 / (989 * 0.40)
"""GPU-seconds of training per completion: 30 forward-equivalents with LoRA (two updates on coupled pairs, the scores
of old and reference) at 40 %."""
SANDBOX_SECONDS = 10.0
"""In every batch a program runs into its limit; it is run as soon as its batch is there."""
START_SECONDS, LOAD_SECONDS = 30.0, 1.0
"""Seconds in which a worker starts with a model, and loads an adapter."""
BATCH = 16
"""Completions in a batch."""
NUM_BATCHES = 32
BATCH_SECONDS = BATCH * COMPLETION_SECONDS["full canvas, 256 steps"]
PARTS = ("overlap", "workers", "recovery", "scaling", "calls", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A simulated run. Times are virtual seconds."""

    seed: int = 0
    num_workers: int = 8
    num_batches: int = NUM_BATCHES
    batch_seconds: float = BATCH_SECONDS
    spread: float = 0.3
    train_seconds: float = NUM_BATCHES * BATCH_SECONDS / 8
    """The trainer's part of a step. Default: as long as eight workers need for the rollouts."""
    judge_seconds: float = 0.0
    """From the end of a batch until its programs have run; workers and trainer do other things meanwhile."""
    lag: int = 0
    num_steps: int = 20
    slow_share: float = 0.0
    """Share of the workers that take 1.4 times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A batch to roll out, and how long a worker of usual speed takes."""

    name: str
    seconds: float


class Roller:
    """A worker that does nothing; the simulator says how long that takes."""

    def hello(self) -> dict[str, Any]:
        return {}

    def load(self, version: int, handle: str) -> str:
        return handle

    def generate(self, work: Any) -> Any:
        return work


class Clock(SimTransport):
    """Workers whose place is how many times slower they are."""

    _slowness = 1.0

    def __init__(self, seed: int) -> None:
        super().__init__(seed, Faults(), self._take)

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        self._slowness = worker.place
        return super().call(worker, method, *arguments)

    def _take(self, method: str, arguments: tuple[Any, ...], rng: random.Random) -> float:
        if method == "generate":
            return self._slowness * arguments[0].seconds
        return START_SECONDS if method == "hello" else LOAD_SECONDS


@dataclass(slots=True, kw_only=True)
class Result:
    """Times of a simulated run."""

    ends: list[float]
    """Virtual time at the end of every step."""
    rollout_idle: float
    trainer_idle: float
    coordinator_ms: float
    """Real processor time of the coordinator per batch, in milliseconds."""

    @property
    def step_seconds(self) -> float:
        """Per step, without the first two: they start the workers and fill the pipeline."""
        return (self.ends[-1] - self.ends[1]) / (len(self.ends) - 2)


Fault = Callable[[Coordinator, Clock], None]


def simulate(plan: Plan, fault: Fault | None = None, at: float = math.inf) -> Result:
    """A run of the plan on the real coordinator. `fault` happens at time `at`, as soon as a worker has work."""
    transport = Clock(plan.seed)
    num_slow = round(plan.slow_share * plan.num_workers)
    pool = PoolSpec(
        stage="roll",
        spec=WorkerSpec(make=Roller),
        places=[1.4] * num_slow + [1.0] * (plan.num_workers - num_slow),
        method="generate",
        has_weights=True,
    )
    judged: dict[GroupKey, float] = {}

    def judge(unit: Unit, payload: Any) -> None:
        judged[unit.key] = transport.now() + plan.judge_seconds

    coordinator = Coordinator(transport, [pool], admission=InOrder(plan.lag), health=PATIENT, on_rolled=judge)
    spent = 0.0

    def pump(until: float = math.inf) -> None:
        nonlocal spent, fault
        if fault is not None and transport.now() >= at and any(w.attempts for w in coordinator.pools["roll"].workers):
            fault(coordinator, transport)
            fault = None
        started = time.process_time()
        timeout = min(coordinator.next_deadline(), until, at if fault else math.inf) - transport.now()
        spent += time.process_time() - started
        done = transport.wait(list(coordinator.calls), max(0.0, timeout))
        started = time.process_time()
        coordinator.handle(done)
        coordinator.tick()
        spent += time.process_time() - started

    def units_of(step: int, version: int) -> list[Unit]:
        return [
            Unit(key=GroupKey(step=step, slot=slot), version=version, work=work_of(plan, step, slot))
            for slot in range(plan.num_batches)
        ]

    def publish(version: int) -> None:
        coordinator.publish(Weights(version=version, handle=f"version {version}", digest=f"version {version}"))

    publish(0)
    coordinator.begin(0, {}, units_of, plan.num_steps)
    ends, waited = [], 0.0
    for step in range(1, plan.num_steps + 1):
        since = transport.now()
        keys = coordinator.ledger.keys_of(step)
        while not coordinator.ledger.is_done(keys):
            pump()
        coordinator.take(keys)
        until = max(judged.pop(key) for key in keys)
        while transport.now() < until:
            pump(until)
        if step > 2:
            waited += transport.now() - since
        until = transport.now() + plan.train_seconds
        while transport.now() < until:
            pump(until)
        publish(step)
        coordinator.trained(step)
        coordinator.issue(units_of, plan.num_steps)
        coordinator.dispatch()
        ends.append(transport.now())
        if step == 2:
            coordinator.take_counters()
    counters = coordinator.take_counters()
    num_batches = plan.num_batches * plan.num_steps
    assert len(transport.executions) >= num_batches, "every batch was rolled out"
    return Result(
        ends=ends,
        rollout_idle=1 - counters.busy_seconds["roll"] / counters.present_seconds["roll"],
        trainer_idle=waited / (ends[-1] - ends[1]),
        coordinator_ms=1000 * spent / num_batches,
    )


def work_of(plan: Plan, step: int, slot: int) -> Work:
    """A batch whose time is log-normal, and depends on its name alone: a fault does not change the other times."""
    name = f"{plan.seed}/{step}/{slot}"
    sigma = math.sqrt(math.log(1 + plan.spread**2))
    drawn = random.Random(name).lognormvariate(math.log(plan.batch_seconds) - sigma**2 / 2, sigma)
    return Work(name=name, seconds=drawn)


# --- simulated ----------------------------------------------------------------------------------------------------


def overlap() -> list[dict[str, Any]]:
    """Steps per hour at lag 1 and 2 over those at lag 0, on the same batches."""
    rows = []
    for share, meaning in ((1.0, "as long as the rollouts"), (0.25, "a quarter of the rollouts")):
        for spread in SPREADS:
            found: dict[int, list[Result]] = {lag: [] for lag in range(3)}
            for lag, results in found.items():
                for seed in SEEDS:
                    train = share * NUM_BATCHES * BATCH_SECONDS / 8
                    results.append(simulate(Plan(seed=seed, spread=spread, lag=lag, train_seconds=train)))
            for lag, results in found.items():
                ratios = [base.step_seconds / one.step_seconds for base, one in zip(found[0], results, strict=True)]
                rows.append(
                    {
                        "training": meaning,
                        "spread": spread,
                        "lag": lag,
                        "speed": figure(ratios),
                        "rollout_idle": figure([one.rollout_idle for one in results]),
                        "trainer_idle": figure([one.trainer_idle for one in results]),
                    }
                )
    return rows


def workers() -> list[dict[str, Any]]:
    """Rollouts per second with 1, 2, 4 and 8 workers over those with 1: rollouts alone, and with a trainer."""
    rows = []
    settings = (("rollouts alone, lag 0", 0, 0.0), ("with a trainer, lag 0", 0, 1.0), ("with a trainer, lag 1", 1, 1.0))
    for meaning, lag, share in settings:
        for spread in SPREADS:
            base: list[float] = []
            for num_workers in (1, 2, 4, 8):
                seconds = [
                    simulate(
                        Plan(
                            seed=seed,
                            num_workers=num_workers,
                            spread=spread,
                            lag=lag,
                            train_seconds=share * NUM_BATCHES * BATCH_SECONDS / 8,
                        )
                    ).step_seconds
                    for seed in SEEDS
                ]
                base = base or seconds
                ratios = [one / many for one, many in zip(base, seconds, strict=True)]
                rows.append({"setting": meaning, "spread": spread, "workers": num_workers, "speed": figure(ratios)})
    return rows


def busy_worker(coordinator: Coordinator) -> Any:
    """The first that has work."""
    return next(worker for worker in coordinator.pools["roll"].workers if worker.attempts)


def kill(coordinator: Coordinator, transport: Clock) -> None:
    """A process ends; another starts in its place."""
    transport.kill(busy_worker(coordinator).handle)


def hang(coordinator: Coordinator, transport: Clock) -> None:
    """A process answers nothing any more: only deadlines detect it."""
    busy_worker(coordinator).handle.is_hung = True


def lose_host(coordinator: Coordinator, transport: Clock, *, silently: bool = False) -> None:
    """A host goes, said by the transport or not, and what is started in its place says no hello for 30 minutes."""
    (hang if silently else kill)(coordinator, transport)
    transport.faults = Faults(no_start=1.0)

    def back() -> None:
        transport.faults = Faults()

    transport._at(1800.0, back)


def cut_host(coordinator: Coordinator, transport: Clock) -> None:
    """A host falls silent."""
    lose_host(coordinator, transport, silently=True)


def recovery() -> list[dict[str, Any]]:
    """Seconds that a fault adds to a run of twenty steps, against the same run without."""
    faults: dict[str, Fault] = {
        "process killed": kill,
        "process hangs": hang,
        "host lost for 30 min": lose_host,
        "host silent, then lost for 30 min": cut_host,
    }
    rows = []
    for lag in (0, 1):
        for name, fault in faults.items():
            added, steps = [], []
            for seed in SEEDS:
                plan = Plan(seed=seed, lag=lag)
                plain = simulate(plan)
                # In the sixth step, at another moment of it for each seed.
                at = plain.ends[4] + (0.1 + 0.15 * seed) * plan.train_seconds
                hit = simulate(plan, fault, at)
                added.append(hit.ends[-1] - plain.ends[-1])
                steps.append(plain.step_seconds)
            rows.append(
                {"lag": lag, "fault": name, "added_seconds": figure(added), "step_seconds": statistics.mean(steps)}
            )
    return rows


def scaling(sizes: Sequence[int] = (8, 64, 256, 1024)) -> list[dict[str, Any]]:
    """The model of section 5 of the notes, run through the coordinator: 16 completions per GPU and step."""
    rows = []
    for engine, seconds in COMPLETION_SECONDS.items():
        for num_gpus in sizes:
            num_completions = 16 * num_gpus
            num_train = max(1, round(num_gpus * TRAIN_SECONDS / (TRAIN_SECONDS + seconds)))
            is_large = num_gpus > 64  # the coordinator takes a minute of real time for 20 000 batches of 905 workers
            for lag in (1,) if is_large else range(3):
                plan = Plan(
                    num_workers=num_gpus - num_train,
                    num_batches=num_completions // 4,
                    batch_seconds=4 * seconds,
                    spread=0.03,
                    train_seconds=num_completions * TRAIN_SECONDS / num_train,
                    judge_seconds=SANDBOX_SECONDS,
                    lag=lag,
                    num_steps=4 if is_large else 5,
                    slow_share=0.03,
                )
                result = simulate(plan)
                useful = num_completions * (seconds + TRAIN_SECONDS)
                rows.append(
                    {
                        "engine": engine,
                        "gpus": num_gpus,
                        "train": num_train,
                        "roll": plan.num_workers,
                        "lag": lag,
                        "step_seconds": result.step_seconds,
                        "utilisation": useful / (num_gpus * result.step_seconds),
                        "batches_per_second": plan.num_batches / result.step_seconds,
                        "coordinator_ms": result.coordinator_ms,
                    }
                )
                print(rows[-1], flush=True)
    return rows


# --- measured -----------------------------------------------------------------------------------------------------


class Answering:
    """A worker that answers at once, with as many bytes as it is asked for."""

    def hello(self) -> dict[str, Any]:
        return {}

    def answer(self, num_bytes: int) -> bytes:
        return bytes(num_bytes)


def calls(open_transport: Callable[[], Transport], make: Any, seconds: float = 3.0) -> list[dict[str, Any]]:
    """Calls per second from dispatch to result in the ledger, with as many in flight as there are workers."""
    rows = []
    for num_workers in (1, 4):
        transport = open_transport()
        pool = PoolSpec(
            stage="roll", spec=WorkerSpec(make=make, num_cpus=0.0), places=[None] * num_workers, method="answer"
        )
        coordinator = Coordinator(transport, [pool], health=PATIENT)
        with contextlib.closing(coordinator):
            while coordinator.pools["roll"].num_ready < num_workers:
                coordinator.handle(transport.wait(list(coordinator.calls), 0.2))
                coordinator.tick()
            for num_bytes in (0, 58_000):
                rates = []
                for number in range(3):
                    step, done, started = 1000 * num_bytes + number, 0, time.perf_counter()
                    while (passed := time.perf_counter() - started) < seconds:
                        keys = [GroupKey(stream=f"{step}", step=done, slot=slot) for slot in range(4 * num_workers)]
                        coordinator.submit(Unit(key=key, work=num_bytes) for key in keys)
                        while not coordinator.ledger.is_done(keys):
                            coordinator.handle(transport.wait(list(coordinator.calls), 0.2))
                            coordinator.tick()
                        assert all(len(entry.payload) == num_bytes for entry in coordinator.take(keys))
                        done += len(keys)
                    rates.append(done / passed)
                rows.append({"workers": num_workers, "bytes": num_bytes, "calls_per_second": figure(rates)})
                print(rows[-1], flush=True)
    return rows


def local_calls() -> list[dict[str, Any]]:
    """Through processes of this machine."""
    import cluster  # a worker can import this file by its name, and not as __main__

    from coupled.rl.cluster.processes import LocalTransport

    return calls(LocalTransport, cluster.Answering)


def ray_calls() -> list[dict[str, Any]]:
    """Through Ray actors of this machine."""
    import cluster

    from coupled.rl.cluster.ray import close_ray, open_ray
    from coupled.rl.cluster.ray_transport import RayTransport
    from coupled.rl.recipe.read import load_recipe

    ray = open_ray(load_recipe(str(ROOT / "recipes" / "quickstart-ray.yaml")))
    try:
        return calls(lambda: RayTransport(ray), cluster.Answering)
    finally:
        close_ray()


# --- the page -----------------------------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> str:
    """docs/results/cluster.md."""
    lines = [
        "# Workers outside of the trainer",
        "",
        "Made by `benchmarks/cluster.py`; all numbers are in [cluster.json](cluster.json). **Simulated** parts run",
        "the real coordinator in virtual time on durations that are drawn: they say what it does with given durations,",
        "not how fast hardware is. **Measured** parts are in real time. Mean (smallest–largest) over five seeds.",
        "",
    ]
    for part in PARTS:
        if part in report:
            about = report[part]["environment"]
            lines += [
                *WRITERS[part](report[part]["rows"]),
                "",
                f"{provenance(about)}, {report[part]['seconds']:.0f} s.",
                "",
            ]
    return "\n".join(lines)


def write_overlap(rows: list[dict[str, Any]]) -> list[str]:
    cells = [
        (
            row["training"],
            row["spread"],
            row["lag"],
            span(row["speed"]),
            f"{row['rollout_idle']['mean']:.0%}",
            f"{row['trainer_idle']['mean']:.0%}",
        )
        for row in rows
    ]
    return [
        "## Rolling out ahead (simulated)",
        "",
        f"Eight workers, {NUM_BATCHES} batches of {BATCH_SECONDS:.0f} s on average in a step. With batches of equal",
        "length, overlap gives 2 at most where training takes as long as the rollouts, and 1.25 where it takes a",
        "quarter; it gives more with unequal ones, because workers need not wait for the last batch of a step. `CV` is",
        "the standard deviation of a batch's time over its mean.",
        "",
        *table(("training takes", "CV", "lag", "speed over lag 0", "workers idle", "trainer waits"), cells),
    ]


def write_workers(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for spread in SPREADS:
            mine = [row for row in rows if row["setting"] == setting and row["spread"] == spread]
            cells.append((setting, spread, *(span(row["speed"]) for row in mine if row["workers"] > 1)))
    return [
        "## More workers (simulated)",
        "",
        "Steps per hour over those with one worker, on the same batches. The trainer takes as long as eight workers",
        "take for their rollouts. With batches of equal length, eight workers bring 8 times alone, 4.5 times with a",
        "trainer at lag 0, and 8 times with one at lag 1.",
        "",
        *table(("", "CV", "2 workers", "4 workers", "8 workers"), cells),
    ]


def write_recovery(rows: list[dict[str, Any]]) -> list[str]:
    cells = [
        (row["fault"], row["lag"], span(row["added_seconds"], ".0f"), f"{row['step_seconds']:.0f}") for row in rows
    ]
    return [
        "## What a failure costs (simulated)",
        "",
        "One fault in the sixth of twenty steps, at another moment of it for each seed: seconds that the run takes",
        "longer. Eight workers, training takes as long as the rollouts, CV 0.3, `cluster.health: patient`; a worker",
        f"starts in {START_SECONDS:.0f} s. Batches keep their durations, so the difference is the fault's alone;",
        "another order of the same batches may also end earlier.",
        "",
        *table(("fault", "lag", "seconds added", "a step takes"), cells),
    ]


def write_scaling(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for first in [row for row in rows if row["lag"] == 1]:
        mine = [row for row in rows if (row["engine"], row["gpus"]) == (first["engine"], first["gpus"])]
        busiest = max(mine, key=lambda row: row["batches_per_second"] * row["coordinator_ms"])
        cells.append(
            (
                first["engine"],
                f"{first['train']} + {first['roll']}",
                *(
                    next((f"{r['step_seconds']:.1f} s, {r['utilisation']:.0%}" for r in mine if r["lag"] == lag), "")
                    for lag in range(3)
                ),
                f"{busiest['batches_per_second']:.1f}",
                f"{busiest['coordinator_ms']:.2f} ms",
                f"{busiest['batches_per_second'] * busiest['coordinator_ms'] / 1000:.0%}",
            )
        )
    slow = COMPLETION_SECONDS["full canvas, 256 steps"]
    return [
        "## To 1024 GPUs (a model; the coordinator's own time is measured)",
        "",
        "LoRA on 7.6 B parameters, prompts of 200 and a canvas of 256 tokens, 16 completions per GPU and step in",
        f"batches of four. Assumed: an H100 at 45 % of 989 TFLOP/s in rollouts ({slow} s a completion, or a",
        f"tenth) and at 40 % in training ({TRAIN_SECONDS:.2f} s a completion), perfectly parallel training, CV 0.03,",
        f"3 % of the workers 1.4 times slower, {SANDBOX_SECONDS:.0f} s of sandbox after each batch,",
        f"{LOAD_SECONDS:.0f} s to load an adapter. One seed, five steps, beyond 64 GPUs four, with lag 1 only.",
        "None of this has been run on GPUs. Beside each step time stands the share of the GPUs' time that is useful.",
        "Programs of a batch are run while others are rolled out or trained on. The last columns: for the busiest of",
        "the lags, the processor time that the coordinator really took per batch here, the whole of ledger, pools and",
        "deadlines without the transport. It does not slow the virtual clock down; above 100 % of a core, one",
        "coordinator would.",
        "",
        *table(
            (
                "engine",
                "train + roll",
                "lag 0",
                "lag 1",
                "lag 2",
                "batches/s",
                "coordinator per batch",
                "of one core",
            ),
            cells,
        ),
    ]


def write_calls(rows: list[dict[str, Any]], what: str = "processes of this machine") -> list[str]:
    cells = [(row["workers"], row["bytes"], span(row["calls_per_second"], ".0f")) for row in rows]
    return [
        f"## Calls per second (measured): {what}",
        "",
        "Workers that answer at once; from dispatch to the ledger and back, three times three seconds.",
        "",
        *table(("workers", "bytes in an answer", "calls per second"), cells),
    ]


WRITERS: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "overlap": write_overlap,
    "workers": write_workers,
    "recovery": write_recovery,
    "scaling": write_scaling,
    "calls": write_calls,
    "ray": lambda rows: write_calls(rows, "Ray actors of this machine"),
}
MEASURE: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "overlap": overlap,
    "workers": workers,
    "recovery": recovery,
    "scaling": scaling,
    "calls": local_calls,
    "ray": ray_calls,
}


def main() -> None:
    parser = whole_help(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure now")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    file = options.output / "cluster.json"
    report = read_report(file)
    for part in options.only:
        started = time.perf_counter()
        rows = MEASURE[part]()
        about = environment() | {"load": loads()}
        report[part] = {"environment": about, "seconds": time.perf_counter() - started, "rows": rows}
        write_report(report, file, page)
        print("\n".join(WRITERS[part](rows)), flush=True)


if __name__ == "__main__":
    main()
