"""The sandbox in Ray actors: one supervisor per node, which lives as long as the run and owns its node's workers.

A batch is cut where the problem changes, so that a group of completions travels together. The coordinator retries
batches whose supervisor dies or does not answer, program by program, and leaves out a program that kills three
supervisors. A final failure of the infrastructure is reported as such; it never becomes a reward of 0.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from coupled.rl.cluster.coordinator import Coordinator
from coupled.rl.cluster.pool import PoolSpec
from coupled.rl.cluster.ray import alive_nodes, close_ray, open_ray
from coupled.rl.cluster.ray_transport import RayTransport
from coupled.rl.cluster.runtime import Runtime
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import NO_EVENTS, ClusterError, EventSink, GroupKey, Health, Masked, Unit, WorkerLost
from coupled.rl.judging.local_sandbox import open_local_sandbox
from coupled.rl.recipe.judging import Sandbox
from coupled.rl.recipe.schema import Recipe
from coupled.sandbox import Execution, Isolation, Job, Outcome, SandboxUnavailable
from coupled.sandbox.pool import require_runnable

START_SECONDS = 120.0
"""Time that a supervisor may take to start and prove its tier."""
LATE_SECONDS = 30.0
"""Time after the first node's answer at which a run continues without nodes that have not answered."""
IN_FLIGHT = 2
"""Batches that one supervisor holds at a time: while one waits for its slowest program, the other keeps it busy."""
HEALTH = Health(start_seconds=START_SECONDS, restarts_per_hour=100)
_LEAST_SECONDS = 60.0
"""Time of a batch besides its programs' own limits: sending, queueing, restarts of workers."""


class Supervisor:
    """Sandbox of one node, inside an actor."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._executor = open_local_sandbox(sandbox)

    def hello(self) -> dict[str, Any]:
        """Return host, process id and the isolation of programs on this node."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "isolation": self._executor.isolation()}

    def run(self, jobs: list[Job]) -> list[Execution]:
        """Run a batch on this node's workers."""
        return self._executor.run(jobs)


class RayExecutor:
    """An executor whose workers are on all nodes of a Ray instance. A context manager.

    `nodes`: ids of the nodes, one supervisor each; None: all nodes that are alive. All must have the same tier,
    because otherwise a reward would depend on the node. Raises SandboxUnavailable when a node cannot provide the
    recipe's tier, or `auto` finds different ones. `emit` receives the events of batches.
    """

    def __init__(
        self,
        recipe: Recipe,
        nodes: Sequence[str] | None = None,
        emit: EventSink = NO_EVENTS,
    ) -> None:
        self._ray = open_ray(recipe)
        self._num_workers = recipe.sandbox.num_workers
        self._numbers = itertools.count(1)
        self._isolation: Isolation | None = None
        with ExitStack() as opened:
            opened.callback(close_ray)
            pool = PoolSpec(
                stage="score",
                # No CPU is reserved: programs run on CPUs that rollouts leave idle, and the recipe limits their number.
                spec=WorkerSpec(make=Supervisor, arguments=(recipe.sandbox,), num_cpus=0.0, concurrency=IN_FLIGHT),
                places=list(nodes if nodes is not None else alive_nodes(self._ray)),
                method="run",
                capacity=IN_FLIGHT,
                infra_errors=(SandboxUnavailable,),
                check=self._check,
            )
            self._coordinator = Coordinator(
                RayTransport(self._ray),
                [pool],
                health=HEALTH,
                is_infra=lambda e: e.outcome.is_infrastructure,
                emit=emit,
            )
            runtime = Runtime(self._coordinator)
            opened.callback(runtime.close)
            self._greet_all(runtime)
            opened.pop_all()
        self._runtime: Runtime | None = runtime

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        """Return one execution per job, in order, also when supervisors or nodes are lost meanwhile.

        Raises RuntimeError when closed; SandboxUnavailable, before any job runs, for a job that the tier cannot run.
        """
        runtime = self._runtime
        if runtime is None:
            raise RuntimeError("an executor runs nothing after close(): open another")
        tier = self.isolation().tier
        for job in jobs:
            require_runnable(job, tier)
        number = next(self._numbers)
        units = [
            Unit(
                key=GroupKey(stream="programs", step=number, slot=slot),
                samples=tuple(batch),
                is_scored=True,
                patience=_patience(batch),
            )
            for slot, batch in enumerate(_batches(jobs, self._num_workers))
        ]
        found = [score for entry in runtime.finish(units) for score in entry.scores]
        return [
            Execution(uid=job.uid, outcome=Outcome.SANDBOX_ERROR, tier=tier, detail=score.reason[:500])
            if isinstance(score, Masked)
            else score
            for job, score in zip(jobs, found, strict=True)
        ]

    def isolation(self) -> Isolation:
        """Return the isolation of programs on the first node; all nodes have its tier."""
        assert self._isolation is not None, "supervisors were greeted"
        return self._isolation

    def close(self) -> None:
        """Stop the supervisors, and the Ray instance when it has no other user. Harmless when repeated."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
            close_ray()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _greet_all(self, runtime: Runtime) -> None:
        """Wait until every node has reported its isolation, and require the same tier of later supervisors.

        The supervisor of a node that is lost meanwhile, or late, is restarted as at any other time.
        """
        workers = self._coordinator.pools["score"].workers

        def have_answered(coordinator: Coordinator) -> bool:
            return all(worker.hello is not None or worker.error is not None for worker in workers)

        runtime.wait_for(lambda c: have_answered(c) or any(worker.hello is not None for worker in workers))
        runtime.wait_for(have_answered, LATE_SECONDS)
        greeted = [worker for worker in workers if worker.hello is not None]
        for worker in workers:
            if isinstance(worker.error, SandboxUnavailable):
                raise SandboxUnavailable(
                    f"every node must provide the recipe's sandbox tier; one could not: {worker.error}\n"
                    "remedy: run `coupled doctor` on that node, or take it out of the cluster"
                ) from worker.error
            if worker.error is not None and worker.hello is None and not isinstance(worker.error, WorkerLost):
                raise worker.error
        if not greeted:
            raise ClusterError(
                f"no supervisor of the sandbox could be started on any of {len(workers)} nodes: {workers[0].why}. "
                "Check the cluster, then resume with resume=auto"
            )
        self._isolation = _common([(str(worker.place), worker.hello["isolation"]) for worker in greeted])

    def _check(self, hello: Any) -> None:
        """Reject a replacement whose tier differs from the run's, even where `auto` would now choose another one."""
        isolation: Isolation = hello["isolation"]
        if self._isolation is not None and isolation.tier != self._isolation.tier:
            raise SandboxUnavailable(f"this node now provides tier {isolation.tier!r}, not {self._isolation.tier!r}")


def _common(found: Sequence[tuple[str, Isolation]]) -> Isolation:
    tiers = {isolation.tier for _, isolation in found}
    if len(tiers) > 1:
        told = ", ".join(f"{node}: {isolation.tier}" for node, isolation in found)
        raise SandboxUnavailable(
            f"every node must provide the same tier; the nodes provide {told}\n"
            f"remedy: run `coupled doctor` on the nodes without tier 'namespaces', or set sandbox.tier=landlock"
        )
    return found[0][1]


def _batches(jobs: Sequence[Job], num_workers: int) -> list[list[Job]]:
    """Cut where the problem changes, but into batches large enough to keep a supervisor's workers busy."""
    batches: list[list[Job]] = []
    for _, group in itertools.groupby(jobs, key=lambda job: job.uid):
        if batches and len(batches[-1]) < 2 * num_workers:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches


def _patience(jobs: Sequence[Job]) -> float:
    """Deadline of a batch in seconds: twice what three attempts take when every program uses up its wall time."""
    return _LEAST_SECONDS + 6 * sum(job.limits.wall_seconds * max(1, len(job.stdin_cases)) for job in jobs)
