"""The sandbox in Ray actors: one supervisor per node, which lives as long as the run and owns its node's workers.

A batch is cut where the problem changes, so that a group of completions travels together. A supervisor that dies,
or does not answer in time, is replaced, and what it had is run again elsewhere, program by program: nothing is lost
and nothing counts twice, because only answers that arrived whole are taken. What is still infrastructure after
`MAX_ATTEMPTS` stays infrastructure; it never becomes a reward of 0.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from coupled.rl.grading import open_local_sandbox
from coupled.rl.ray_cluster import alive_nodes, close_ray, on_node, open_ray
from coupled.rl.recipe import Recipe
from coupled.sandbox import Execution, Isolation, Job, Outcome, SandboxUnavailable
from coupled.sandbox.pool import require_runnable

MAX_ATTEMPTS = 3
"""A program that could not be run is tried so often, on another supervisor if there is one."""
START_SECONDS = 120.0
"""How long a supervisor may take to start and prove its tier."""
IN_FLIGHT = 2
"""Batches that one supervisor has at a time: while one waits for its slowest program, the other keeps it busy."""
_LEAST_SECONDS = 60.0
"""What a batch may take besides its programs' own limits: sending, queueing, restarts of workers."""


class Supervisor:
    """What runs inside an actor."""

    def __init__(self, recipe: Recipe) -> None:
        self._executor = open_local_sandbox(recipe.sandbox)

    def run(self, jobs: list[Job]) -> list[Execution]:
        """Run a batch on this node's workers."""
        return self._executor.run(jobs)

    def isolation(self) -> Isolation:
        """What holds programs on this node."""
        return self._executor.isolation()


@dataclass(slots=True)
class _Batch:
    """Jobs that travel together, by their place in the caller's list."""

    places: list[int]
    attempt: int = 1
    avoid: int | None = None
    """The supervisor that failed them last."""
    is_suspect: bool = False
    """True: a supervisor ended while it had them. They get one to themselves, to take no others along."""


@dataclass(slots=True)
class _Sent:
    """A batch under way."""

    batch: _Batch
    place: int
    actor: Any
    deadline: float
    """On the monotonic clock."""


class RayExecutor:
    """An executor whose workers are on all nodes of a Ray instance. A context manager.

    `nodes` names the nodes, one supervisor each; none takes all that are alive. All have the same tier: what one node
    refuses and another allows would make a reward depend on where it was earned. Raises SandboxUnavailable when a
    node cannot give the recipe's tier, or `auto` finds different ones.
    """

    def __init__(self, recipe: Recipe, nodes: Sequence[str] | None = None) -> None:
        self._recipe = recipe
        self._ray = open_ray(recipe)
        # No CPU is asked of Ray: programs run on what rollouts leave, and the recipe says how many at a time.
        self._class = self._ray.remote(num_cpus=0, max_restarts=0, max_concurrency=IN_FLIGHT)(Supervisor)
        try:
            self._nodes = list(nodes if nodes is not None else alive_nodes(self._ray))
            self._actors = [self._start(node) for node in self._nodes]
            self._isolation = self._common([self._greet(actor) for actor in self._actors])
            # A replacement is held to the tier that was found, even where `auto` would now find a better one.
            fixed = recipe.sandbox.model_copy(update={"tier": self._isolation.tier})
            self._recipe = recipe.model_copy(update={"sandbox": fixed})
        except BaseException:
            close_ray()
            raise

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        """Return one execution per job, in order, whatever becomes of supervisors and nodes meanwhile.

        RuntimeError when closed. SandboxUnavailable, before anything runs, for a job that the tier cannot run.
        """
        if not self._actors:
            raise RuntimeError("an executor runs nothing after close(): open another")
        for job in jobs:
            require_runnable(job, self._isolation.tier)
        ray = self._ray
        done: dict[int, Execution] = {}
        waiting = _batches(jobs, self._recipe.sandbox.num_workers)
        running: dict[Any, _Sent] = {}
        while waiting or running:
            while waiting and (place := self._free_place(running, waiting[0])) is not None:
                batch = waiting.pop(0)
                chosen = [jobs[index] for index in batch.places]
                actor = self._actors[place]
                deadline = time.monotonic() + _patience(chosen)
                running[actor.run.remote(chosen)] = _Sent(batch, place, actor, deadline)
            ended, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for ref in ended or [ref for ref, sent in running.items() if time.monotonic() > sent.deadline][:1]:
                sent = running.pop(ref)
                try:
                    found = ray.get(ref, timeout=_LEAST_SECONDS if ended else 0)
                except (ray.exceptions.RayError, SandboxUnavailable) as error:
                    if not self._is_loss(error):
                        raise
                    self._replace(sent)
                    waiting += self._again(sent, jobs, done, f"{type(error).__name__}: {error}")
                    continue
                batch = sent.batch
                done |= zip(batch.places, found, strict=True)
                failed = [index for index in batch.places if done[index].outcome.is_infrastructure]
                if failed and batch.attempt < MAX_ATTEMPTS:
                    waiting.append(_Batch(failed, batch.attempt + 1, sent.place))
        return [done[index] for index in range(len(jobs))]

    def isolation(self) -> Isolation:
        """Return what holds programs on the first node; all nodes have its tier."""
        return self._isolation

    def close(self) -> None:
        """Stop the supervisors, and the Ray instance when nobody else uses it. Harmless when repeated."""
        if self._actors:
            for actor in self._actors:
                self._ray.kill(actor)
            self._actors = []
            close_ray()

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _free_place(self, running: dict[Any, _Sent], batch: _Batch) -> int | None:
        """Return the supervisor with the least to do, another than the one that failed the batch if possible."""
        load = [0] * len(self._actors)
        for sent in running.values():
            load[sent.place] += IN_FLIGHT if sent.batch.is_suspect else 1
        most = 0 if batch.is_suspect else IN_FLIGHT - 1
        free = [place for place in range(len(load)) if load[place] <= most]
        return min(free, key=lambda place: (place == batch.avoid, load[place])) if free else None

    def _again(self, sent: _Sent, jobs: Sequence[Job], done: dict[int, Execution], why: str) -> list[_Batch]:
        """Return what to run again: each program alone, so that one that ends supervisors takes no other along."""
        batch = sent.batch
        if batch.attempt < MAX_ATTEMPTS:
            return [_Batch([index], batch.attempt + 1, sent.place, is_suspect=True) for index in batch.places]
        for index in batch.places:
            done[index] = Execution(
                uid=jobs[index].uid,
                outcome=Outcome.SANDBOX_ERROR,
                tier=self._isolation.tier,
                detail=f"its supervisor ended {batch.attempt} times: {why}"[:500],
            )
        return []

    def _start(self, node: str) -> Any:
        return self._class.options(scheduling_strategy=on_node(node)).remote(self._recipe)

    def _greet(self, actor: Any) -> Isolation:
        ray = self._ray
        try:
            isolation: Isolation = ray.get(actor.isolation.remote(), timeout=START_SECONDS)
        except (ray.exceptions.RayError, SandboxUnavailable) as error:
            if not self._is_loss(error):
                raise
            raise SandboxUnavailable(
                f"every node must give the sandbox that the recipe asks for; one could not: {error}\n"
                "remedy: run `coupled doctor` on that node, or take it out of the cluster"
            ) from error
        return isolation

    def _common(self, found: Sequence[Isolation]) -> Isolation:
        tiers = {isolation.tier for isolation in found}
        if len(tiers) > 1:
            told = ", ".join(f"{node}: {isolation.tier}" for node, isolation in zip(self._nodes, found, strict=True))
            raise SandboxUnavailable(
                f"every node must give the same tier; they give {told}\n"
                f"remedy: run `coupled doctor` on the nodes without tier 'namespaces', or set sandbox.tier=landlock"
            )
        return found[0]

    def _is_loss(self, error: Exception) -> bool:
        """True when a supervisor, a node or an answer was lost; False for a mistake in what the supervisor ran."""
        return isinstance(error, SandboxUnavailable) or not isinstance(error, self._ray.exceptions.RayTaskError)

    def _replace(self, sent: _Sent) -> None:
        """Start another supervisor. A second batch of the old one fails by itself: the new one must survive that."""
        if self._actors[sent.place] is not sent.actor:
            return
        self._ray.kill(sent.actor)
        self._actors[sent.place] = new = self._start(self._nodes[sent.place])
        try:
            self._greet(new)
        except SandboxUnavailable:
            # Not the end of the run: what is sent there fails, is tried elsewhere, and at last left out.
            self._ray.kill(new)


def _batches(jobs: Sequence[Job], num_workers: int) -> list[_Batch]:
    """Cut where the problem changes, but not into less than keeps a supervisor's workers busy."""
    batches: list[_Batch] = []
    for _, group in itertools.groupby(range(len(jobs)), key=lambda index: jobs[index].uid):
        places = list(group)
        if batches and len(batches[-1].places) < 2 * num_workers:
            batches[-1].places += places
        else:
            batches.append(_Batch(places))
    return batches


def _patience(jobs: Sequence[Job]) -> float:
    """Seconds that a batch may take when every program uses up its wall time on each of three tries, twice over."""
    return _LEAST_SECONDS + 6 * sum(job.limits.wall_seconds * max(1, len(job.stdin_cases)) for job in jobs)
