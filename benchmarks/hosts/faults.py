"""The scenarios: what is done to a run, when, and what of it is seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coupled.rl.run_folder.folder import read_run_recipe
from hosts.cloud import SECONDS, Cloud, Event, Layout, NotShown, Run
from hosts.netns import Host

NAME = "quickstart"
NUM_STEPS = 20
RECIPE = (
    "num_threads=1",
    f"num_steps={NUM_STEPS}",
    "optimizer.warmup_steps=0",
    "estimator.num_pairs=1",
    "rollout.num_prompts=3",
    "rollout.group_size=4",
    "rollout.batch_size=2",
    "rollout.denoising_steps=40",
    "sandbox.num_workers=1",
    "data.eval_path=null",
    "cluster.health=fast",
    "rollout.workers=ray",
    "rollout.num_workers=3",
    "sandbox.workers=ray",
)
FAULT_STEP = 3
"""The fault waits for a batch of this step."""

Fault = Callable[[Cloud, Run], dict[str, float]]
"""Does a fault to a run, and returns the seconds that things took, by their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A fault, and the cluster that it happens to."""

    what: str
    fault: Fault
    lags: tuple[int, ...] = (0, 1)
    layout: Layout = field(default_factory=Layout)
    arguments: tuple[str, ...] = ()
    """Of `coupled train`, besides the recipe."""
    fewest: dict[str, int] = field(default_factory=dict)
    """Counts that the metrics must reach at least: the fault did hit."""


def none(cloud: Cloud, run: Run) -> dict[str, Any]:
    """Nothing happens."""
    return {}


def cut_briefly(cloud: Cloud, run: Run) -> dict[str, Any]:
    """A cable is out for five seconds: shorter than any deadline."""
    host = cloud[run.busy_host(FAULT_STEP)]
    host.cut()
    time.sleep(5.0)
    host.heal()
    return {}


def cut_until_hedged(cloud: Cloud, run: Run) -> dict[str, Any]:
    """A cable is out until another host has made what its host has: the same batch comes twice."""
    host = cloud[run.busy_host(FAULT_STEP)]
    since = time.time()
    host.cut()
    hedged = run.wait(lambda event: event["event"] == "hedged", after=since)
    run.wait(lambda event: event["event"] == "rolled" and event["key"] == hedged["key"], after=since)
    host.heal()
    return {"seconds until hedged": hedged["time"] - since}


def cut_for_good(cloud: Cloud, run: Run) -> dict[str, Any]:
    """A cable is never put back."""
    host = cloud[run.busy_host(FAULT_STEP)]
    since = time.time()
    host.cut()
    return {"seconds until given up": seconds_until_given_up(run, host, since)}


def heal_late(cloud: Cloud, run: Run) -> dict[str, Any]:
    """A cable is put back when Ray has given up the host: its Ray ends itself, is started again, and gets work."""
    host = cloud[run.busy_host(FAULT_STEP)]
    since = time.time()
    host.cut()
    seen = {"seconds until given up": seconds_until_given_up(run, host, since)}
    cloud.wait_given_up(host)
    seen["seconds until Ray noticed"] = time.time() - since
    host.heal()
    since = time.time()
    cloud.rays[host.name].wait(timeout=SECONDS)
    seen["seconds until its Ray ended itself"] = time.time() - since
    return seen | rejoin(cloud, run, host)


def crash_and_rejoin(cloud: Cloud, run: Run) -> dict[str, Any]:
    """All that runs on a host is killed; it is started again and gets work."""
    host = cloud[run.busy_host(FAULT_STEP)]
    since = time.time()
    host.crash()
    seen = {"seconds until given up": seconds_until_given_up(run, host, since)}
    return seen | rejoin(cloud, run, host)


def rejoin(cloud: Cloud, run: Run, host: Host) -> dict[str, Any]:
    """Start Ray on a host again, and wait until it has made a batch."""
    since = time.time()
    cloud.start_ray(host.name)
    ready = run.wait(is_of_host("ready", "roll", host), after=since)
    rolled = run.wait(lambda e: e["event"] == "rolled" and e["worker"] == ready["worker"], after=since)
    return {"seconds until it is ready again": ready["time"] - since, "and has made a batch": rolled["time"] - since}


def seconds_until_given_up(run: Run, host: Host, since: float) -> float:
    """Wait until the rollout worker on a host is given up."""
    there = {e["worker"] for e in run.events() if is_of_host("ready", "roll", host)(e)}
    lost = run.wait(lambda event: event["event"] == "lost" and event["worker"] in there, after=since)
    return float(lost["time"]) - since


def is_of_host(kind: str, stage: str, host: Host) -> Callable[[Event], bool]:
    return lambda e: e["event"] == kind and e.get("host") == host.name and str(e["worker"]).startswith(f"{stage}-")


def kill_trainer(cloud: Cloud, run: Run) -> dict[str, Any]:
    """The training process is killed; its supervisor resumes the run."""
    run.busy_host(FAULT_STEP)
    _, trainer = cloud["head"].ask(["pgrep", "-f", "coupled.rl.cli train"]).split()
    since = time.time()
    cloud["head"].ask(["kill", "-9", trainer])
    issued = run.wait(lambda event: event["event"] == "issue", after=since)
    return {"seconds until resumed": issued["time"] - since}


def take_over(cloud: Cloud, run: Run) -> dict[str, Any]:
    """The trainer's host is cut off and the run resumed on the head's; the first one comes back, and may not go on."""
    seen, successor = resume_elsewhere(cloud, run)
    status, seconds = come_back(cloud, run)
    if status != 2 or "has taken over" not in run.tail():
        raise NotShown(f"the first trainer was to be refused, and ended with {status}: {run.tail()}")
    run.process = successor.process
    return seen | {"seconds until the first one stopped": seconds}


def take_over_late(cloud: Cloud, run: Run) -> dict[str, Any]:
    """The same, when Ray has also given the trainer's host up: its node ends itself, and the trainer with it."""
    seen, successor = resume_elsewhere(cloud, run)
    cloud.wait_given_up(cloud["trainer"])
    status, seconds = come_back(cloud, run)
    if status == 0:
        raise NotShown(f"the first trainer was to end, and was done: {run.tail()}")
    run.process = successor.process
    return seen | {"seconds until the first one stopped": seconds}


def resume_elsewhere(cloud: Cloud, run: Run) -> tuple[dict[str, Any], Run]:
    """Cut the trainer's host off, resume its run on the head's, and wait for the first commit there."""
    run.busy_host(FAULT_STEP)
    cloud["trainer"].cut()
    since = time.time()
    lag = f"cluster.lag={read_run_recipe(run.folder).cluster.lag}"
    successor = cloud.train(NAME, (*RECIPE, lag, "resume=auto"))
    successor.wait_committed(FAULT_STEP, generation=2)
    return {"seconds until the successor committed": time.time() - since}, successor


def come_back(cloud: Cloud, run: Run) -> tuple[int, float]:
    """Put the cable of the trainer's host back; returns how its trainer ends, and after how many seconds."""
    cloud["trainer"].heal()
    since = time.time()
    return run.status(), time.time() - since


def wrong_token(cloud: Cloud, run: Run) -> dict[str, Any]:
    """Beside the run, others try to join with a wrong token, and without saying how they authenticate."""
    run.busy_host(FAULT_STEP)
    seen = {}
    right = cloud.environment()
    strangers = {
        "with another token": (right | {"RAY_AUTH_TOKEN": "0" * 64}, "RAY_AUTH_MODE and the token are the same"),
        "without a token": (right | {"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE and the token are the same"),
        "without RAY_AUTH_MODE": (
            {name: value for name, value in right.items() if name != "RAY_AUTH_MODE"},
            "joining a Ray cluster requires RAY_AUTH_MODE",
        ),
    }
    for name, (variables, told) in strangers.items():
        since = time.time()
        stranger = cloud.train(NAME, (*RECIPE, "name=stranger"), environment=variables)
        if stranger.status() != 2 or told not in stranger.tail():
            raise NotShown(f"{name}: {stranger.process.returncode}, {stranger.tail()}")
        seen[f"seconds until refused, {name}"] = time.time() - since
    return seen


SCENARIOS = {
    "none": Scenario(what="no fault", fault=none),
    "brief": Scenario(what="cable of a worker's host out for 5 s", fault=cut_briefly),
    "hedged": Scenario(
        what="cable out until another host has made the batch, then back",
        fault=cut_until_hedged,
        fewest={"hedged": 1, "duplicates": 1},
    ),
    "lost": Scenario(what="cable out for good", fault=cut_for_good, fewest={"hedged": 1, "lost_workers": 1}),
    "noticed": Scenario(
        what="cable out for good; the head gives a silent node up after 9 s",
        fault=cut_for_good,
        layout=Layout(silent_seconds=9),
        fewest={"lost_workers": 1},
    ),
    "zombie": Scenario(
        what="cable back when Ray has given the host up; its Ray is started again",
        fault=heal_late,
        fewest={"hedged": 1, "lost_workers": 1},
    ),
    "crash": Scenario(
        what="all processes of a worker's host killed; its Ray is started again",
        fault=crash_and_rejoin,
        fewest={"redispatched": 1, "lost_workers": 1},
    ),
    "slow": Scenario(
        what="every worker's host 50 ms away, 2 % of the frames lost", fault=none, layout=Layout(delay=0.05, loss=0.02)
    ),
    "trainer": Scenario(
        what="training process killed, under --supervise", fault=kill_trainer, arguments=("--supervise",)
    ),
    "takeover": Scenario(
        what="trainer's host cut off, run resumed on another host, then the cable put back",
        fault=take_over,
        layout=Layout(cpus_per_host=2, has_trainer_host=True, silent_seconds=300),
    ),
    "takeover-late": Scenario(
        what="trainer's host cut off, run resumed on another host, cable back when Ray has given the first up",
        fault=take_over_late,
        layout=Layout(cpus_per_host=2, has_trainer_host=True),
    ),
    "token": Scenario(what="others try to join with a wrong token", fault=wrong_token, lags=(0,)),
    "shm": Scenario(what="/dev/shm of 64 MB on every host", fault=none, layout=Layout(shm_mb=64), lags=(0,)),
}
