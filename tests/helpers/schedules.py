"""A run on simulated workers, and the invariants that must hold under all faults."""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass, field

from coupled.rl.cluster.admission import InOrder
from coupled.rl.cluster.coordinator import Coordinator, Weights
from coupled.rl.cluster.ledger import Entry
from coupled.rl.cluster.pool import PoolSpec, WorkerState
from coupled.rl.cluster.simulate import Faults, SimTransport
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import STRIKES, GroupKey, Health, Masked, State, Unit

HEALTH = Health(
    least_seconds=5.0, first_seconds=20.0, start_seconds=10.0, stall_seconds=5000.0, restarts_per_hour=10**6
)
NUM_SLOTS = 2
NUM_SAMPLES = 3
MAX_PUMPS = 5000
MAX_CLOCK = 1e6


@dataclass
class Roller:
    """Rolls out under the loaded weights, and returns their version."""

    version: int = -1

    def hello(self) -> str:
        return "roller"

    def load(self, version: int, handle: str) -> str:
        assert handle == f"weights of {version}"
        self.version = version
        return f"digest of {version}"

    def roll_out(self, work: str) -> tuple[str, int]:
        return work, self.version


class Scorer:
    def hello(self) -> str:
        return "scorer"

    def score(self, samples: list[str]) -> list[float]:
        return [score_of(sample) for sample in samples]


def score_of(sample: str) -> float:
    """A score that is never 0: a 0 would be invented."""
    return 1.0 + len(sample)


@dataclass
class Learner:
    """The weight versions and results of a trained step."""

    step: int
    versions: list[int]
    prompts: list[str]
    scores: list[list[object]]


@dataclass
class Run:
    """A trainer over simulated workers. `crash_after`: steps after which the driver dies and resumes."""

    seed: int
    faults: Faults
    lag: int = 0
    num_steps: int = 4
    num_rollers: int = 2
    num_scorers: int = 2
    crash_after: tuple[int, ...] = ()
    train_seconds: float = 2.0
    fall_back_at: int = 0
    trained: list[Learner] = field(default_factory=list)
    commits: Counter[tuple[str, str, tuple[int, ...]]] = field(default_factory=Counter)
    idle_clock: float = 0.0

    def __post_init__(self) -> None:
        self.open(num_trained=0, versions={}, lag=self.lag)

    def open(self, num_trained: int, versions: dict[int, int], lag: int) -> None:
        self.transport = SimTransport(self.seed * 1000 + num_trained, self.faults)
        rollers = PoolSpec(
            stage="roll",
            spec=WorkerSpec(make=Roller),
            places=[None] * self.num_rollers,
            method="roll_out",
            has_weights=True,
        )
        scorers = PoolSpec(
            stage="score", spec=WorkerSpec(make=Scorer), places=[None] * self.num_scorers, method="score", capacity=2
        )
        self.coordinator = Coordinator(
            self.transport,
            [rollers, scorers],
            admission=InOrder(lag),
            health=HEALTH,
            to_samples=lambda unit, payload: [f"{payload[0]}/{n}" for n in range(NUM_SAMPLES)],
            on_rolled=self.handed_over,
            emit=self.told,
        )
        # The checkpoint carries the weights of every step that is under way.
        for version in sorted({num_trained, *versions.values()}):
            self.publish(version)
        self.coordinator.begin(num_trained, versions, units_of, self.num_steps)

    def told(self, event: str, **facts: object) -> None:
        if event == "rolled":
            self.commits[str(facts["key"]), event, ()] += 1

    def handed_over(self, unit: Unit, payload: object) -> None:
        self.commits[str(unit.key), "handed over", ()] += 1

    def publish(self, version: int) -> None:
        weights = Weights(version=version, handle=f"weights of {version}", digest=f"digest of {version}")
        self.coordinator.publish(weights)

    def pump(self, until: float = float("inf")) -> None:
        coordinator = self.coordinator
        timeout = min(coordinator.next_deadline(), until) - self.transport.now()
        coordinator.handle(self.transport.wait(list(coordinator.calls), max(0.0, timeout)))
        coordinator.tick()
        assert self.transport.now() < MAX_CLOCK, f"nothing ever ends the wait: {coordinator.oldest()}"

    def go(self) -> Run:
        coordinator = self.coordinator
        for step in range(1, self.num_steps + 1):
            coordinator.issue(units_of, self.num_steps)
            keys = coordinator.ledger.keys_of(step)
            for _ in range(MAX_PUMPS):
                if coordinator.ledger.is_done(keys):
                    break
                self.pump()
            else:
                raise AssertionError(f"step {step} does not end: {coordinator.oldest()}")
            self.train(step, coordinator.take(keys))
            if step in self.crash_after:
                snapshot = coordinator.snapshot()
                self.open(snapshot["num_trained"], snapshot["versions"], snapshot["lag"])
                coordinator = self.coordinator
        return self

    def train(self, step: int, entries: list[Entry]) -> None:
        self.trained.append(
            Learner(
                step,
                [entry.unit.version for entry in entries],
                [str(entry.unit.work) for entry in entries],
                [list(entry.scores) for entry in entries],
            )
        )
        self.check_entries(entries)
        until = self.transport.now() + self.train_seconds
        while self.transport.now() < until:
            self.pump(until)
        if step == self.fall_back_at:
            self.coordinator.admission.fall_back()
        self.publish(step)
        self.coordinator.trained(step)

    def check_entries(self, entries: list[Entry]) -> None:
        for entry in entries:
            version, work = entry.unit.version, str(entry.unit.work)
            if entry.state is State.QUARANTINED:
                assert work in self.faults.poison or f"{STRIKES} workers" in entry.reason
                continue
            assert entry.payload == (work, version), "the payload is of this unit, under these weights"
            assert work not in self.faults.poison
            for n, score in enumerate(entry.scores):
                sample = f"{work}/{n}"
                if isinstance(score, Masked):
                    assert sample in self.faults.poison or f"{STRIKES} workers" in score.reason
                else:
                    assert sample not in self.faults.poison, "no worker could have scored it"
                    assert score == score_of(sample), "a score comes from a scorer and is never invented"


def units_of(step: int, version: int) -> list[Unit]:
    """The units of a step: which prompts they hold depends on the step alone."""
    return [
        Unit(key=GroupKey(step=step, slot=slot), version=version, work=f"prompt-{step}-{slot}", is_scored=True)
        for slot in range(NUM_SLOTS)
    ]


def check(run: Run) -> None:
    """Run the schedule, and check the invariants of every run."""
    run.go()
    assert [each.step for each in run.trained] == list(range(1, run.num_steps + 1)), "no step is skipped or repeated"
    wanted = [f"prompt-{step}-{slot}" for step in range(1, run.num_steps + 1) for slot in range(NUM_SLOTS)]
    assert [prompt for each in run.trained for prompt in each.prompts] == wanted, "no prompt is skipped or repeated"
    for each in run.trained:
        for version in each.versions:
            assert 0 <= each.step - 1 - version <= run.lag, f"step {each.step} on version {version} at lag {run.lag}"
    most = 1 + len(run.crash_after)
    assert all(count <= most for count in run.commits.values()), "one result per unit (and driver)"
    rolled, handed = (
        {key: count for (key, event, _), count in run.commits.items() if event == name}
        for name in ("rolled", "handed over")
    )
    assert rolled == handed, "each rollout is handed over once"
    check_capacity(run)


def check_capacity(run: Run) -> None:
    """After the last step every worker is free again, and every process that was started is known or gone."""
    coordinator = run.coordinator
    assert not any(coordinator.ledger.waiting.values())
    workers = [worker for pool in coordinator.pools.values() for worker in pool.workers]
    for _ in range(MAX_PUMPS):
        if all(worker.state is WorkerState.READY and not worker.attempts for worker in workers):
            break
        run.pump()
    else:
        raise AssertionError(f"capacity is not returned: {coordinator.oldest()}")
    assert coordinator.calls == {}
    assert coordinator.ledger.entries == {}
    assert run.transport.num_alive <= len(workers)
    executed = Counter(call for call, _ in run.transport.executions)
    assert max(executed.values(), default=1) == 1, "a call runs at most once"


def random_run(seed: int) -> Run:
    """A schedule of faults, decided by the seed."""
    rng = random.Random(seed)

    def chance(most: float) -> float:
        return rng.choice((0.0, rng.uniform(0, most)))

    num_steps = rng.randint(2, 4)
    units = [f"prompt-{step}-{slot}" for step in range(1, num_steps + 1) for slot in range(NUM_SLOTS)]
    poison = {rng.choice(units)} if rng.random() < 0.15 else set()
    if rng.random() < 0.2:
        poison.add(f"{rng.choice(units)}/{rng.randrange(NUM_SAMPLES)}")
    faults = Faults(
        kill=chance(0.12),
        idle_kill=chance(0.1),
        hang=chance(0.08),
        slow=chance(0.1),
        lose=chance(0.08),
        duplicate=chance(0.2),
        no_start=chance(0.3),
        poison=frozenset(poison),
    )
    lag = rng.randint(0, 2)
    return Run(
        seed,
        faults,
        lag=lag,
        num_steps=num_steps,
        num_rollers=rng.randint(1, 3),
        num_scorers=rng.randint(1, 3),
        crash_after=tuple(step for step in range(1, num_steps) if rng.random() < 0.15),
        train_seconds=rng.choice((0.0, 2.0, 30.0)),
        fall_back_at=rng.choice((0, 0, 1, 2)),
    )


def check_all(seeds: range) -> Counter[str]:
    """Check many schedules; returns the number of schedules in which each event happened."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        run = random_run(seed)
        try:
            check(run)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        counters = run.coordinator.take_counters()
        for name in ("num_lost_workers", "num_hedged", "num_duplicates", "num_quarantined", "num_masked"):
            seen[name] += getattr(counters, name) > 0
    return seen


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    what = check_all(range(wanted))
    assert all(what.values()), f"faults that never happened: {what}"
    print(f"{wanted} schedules; with {', '.join(f'{name}: {number}' for name, number in what.items())}")
