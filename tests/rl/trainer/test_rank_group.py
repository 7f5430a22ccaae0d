"""The processes of a trainer: they come up; when one is lost the run ends with its name, and leaves nobody behind."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.toys import MakePolicy, make_batch, make_recipe, make_requests
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

import coupled.rl.trainer.rank_failures
from coupled.rl.errors import RankError, RankLostError, RecipeError
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.model.open import open_policy
from coupled.rl.model.weights import digest_of, save_policy, trainable_state
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import InlineEngine, policy_engine
from coupled.rl.trainer.collectives import Ranks
from coupled.rl.trainer.open import open_rl_learner
from coupled.rl.trainer.rank_failures import (
    RankFailures,
    abort_collectives,
    abort_when_one_ends,
    is_of_connections,
    report_of,
)
from coupled.rl.trainer.rank_group import RankGroup, refuse_too_few_devices
from coupled.rl.trainer.rank_process import ProcessRankHandle
from coupled.rl.trainer.rank_protocol import RankExit, RankReport, error_key, ready
from coupled.rl.trainer.rl_learner import RLLearner

pytestmark = pytest.mark.slow
SAMPLER = Sampler(canvas=6, denoising_steps=6, temperature=1.0)


def recipe_of(folder: Path, **cluster: object) -> Recipe:
    return make_recipe(
        model={"path": str(folder)},
        optimizer={"learning_rate": 1e-4, "micro_batch_size": 2},
        rollout={"canvas": 6, "denoising_steps": 6, "batch_size": 2},
        cluster={"trainer_ranks": 2} | cluster,
    )


class Opened:
    """A group of two ranks, and the process of the second."""

    def __init__(self, recipe: Recipe, make: type[ProcessRankHandle] = ProcessRankHandle) -> None:
        self.recipe, self._make = recipe, make
        self.others: list[ProcessRankHandle] = []
        self.rank_group = RankGroup(recipe, open_policy(recipe.model, recipe.seed), self._start)

    def _start(self, rank: int, port: int) -> ProcessRankHandle:
        self.others.append(self._make(self.recipe, rank, port, Path(self.recipe.output_dir)))
        return self.others[-1]


@pytest.fixture
def checkpoint(tiny_policy: MakePolicy, tmp_path: Path) -> Path:
    save_policy(tiny_policy(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def opened(checkpoint: Path, tmp_path: Path, make: type[ProcessRankHandle] = ProcessRankHandle) -> Opened:
    recipe = recipe_of(checkpoint).model_copy(update={"output_dir": str(tmp_path / "logs")})
    return Opened(recipe, make)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_group_does_what_a_learner_does_and_a_killed_rank_ends_it_with_its_name(
    checkpoint: Path, tmp_path: Path
) -> None:
    pair = opened(checkpoint, tmp_path)
    rank_group, other = pair.rank_group, pair.others[0]
    try:
        alone = RLLearner(pair.recipe, open_policy(pair.recipe.model, 0))
        batch = make_batch(seed=1)
        draw = draw_masks(batch, pair.recipe.estimator, (0, "mask", 1, 0))
        done = rank_group.update(1, batch, draw, rank_group.anchor(batch, draw, is_first=True))
        expected = alone.update(1, batch, draw, alone.anchor(batch, draw, is_first=True))
        assert done.sums["loss"] == pytest.approx(expected.sums["loss"], abs=1e-6)
        assert done.grad_norm == pytest.approx(expected.grad_norm, abs=1e-6)
        state = rank_group.trainable_state()
        for name, tensor in alone.trainable_state().items():
            assert (state[name] - tensor).abs().max() < 1e-6

        engine, plain = InlineEngine(rank_group.generate, None), policy_engine(alone.policy, 2)
        for each in (engine, plain):
            each.load_weights(rank_group, 1)
        requests = make_requests(5)
        before = rank_group._num_calls
        made, wanted = (each.generate(requests, SAMPLER, seed=0) for each in (engine, plain))
        assert rank_group._num_calls == before + 1, "the ranks share out all of them, whatever their lengths"
        assert [(r.uid, r.canvas_ids.tolist(), r.weight_version) for r in made] == [
            (r.uid, r.canvas_ids.tolist(), r.weight_version) for r in wanted
        ]

        (tmp_path / "full").write_text("no folder can be made here")
        with pytest.raises(OSError, match="full"):
            rank_group.write(tmp_path / "full", {"step": 1})
        anchor = rank_group.anchor(batch, draw, is_first=True)
        started = time.monotonic()
        os.kill(other.pid, signal.SIGKILL)
        with pytest.raises(
            RankLostError, match=r"rank 1 of the trainer ended with signal 9 in 'update'.*rank_1\.log"
        ) as lost:
            rank_group.update(2, batch, draw, anchor)
        assert time.monotonic() - started < 30
        assert lost.value.exit_code == 75
        with pytest.raises(RankError, match="has lost a rank before"):
            rank_group.sync_reference(2)
    finally:
        rank_group.close()
    assert not is_alive(other.pid)


def test_a_rank_that_stands_still_is_waited_for_until_the_deadline_and_named(checkpoint: Path, tmp_path: Path) -> None:
    pair = opened(checkpoint, tmp_path)
    rank_group, other = pair.rank_group, pair.others[0]
    try:
        rank_group.sync_reference(1)
        # Not in the recipe: starting takes longer than this test should.
        set_timeout(timedelta(seconds=3), dist.group.WORLD)
        rank_group._failures.timeout_seconds = 3
        os.kill(other.pid, signal.SIGSTOP)
        with pytest.raises(RankLostError, match=r"waited 3 s for each other in 'trainable_state'; not done: rank 1 \("):
            rank_group.trainable_state()
    finally:
        rank_group.close()
    assert not is_alive(other.pid)


def test_replicas_that_begin_differently_are_refused(tiny_policy: MakePolicy) -> None:
    state = trainable_state(tiny_policy())
    other = trainable_state(tiny_policy(seed=1))
    assert digest_of(state) == digest_of(trainable_state(tiny_policy())) != digest_of(other)

    class Heard(Ranks):
        def gather(self, item: str) -> list[str]:
            return [item, digest_of(other)]

    learner = RLLearner.__new__(RLLearner)
    learner.policy, learner._shards = tiny_policy(), None
    with pytest.raises(RankError, match="the same adapters; adapters of rank 1 differ"):
        ready(learner, Heard(size=2))


class Ended:
    """A rank that is seen as ended from the n-th poll on."""

    def __init__(self, rank: int, how: str, looks: int = 0, host: str = "127.0.0.1") -> None:
        self.rank, self.host, self.log = rank, host, f"rank_{rank}.log"
        self._end, self._looks = RankExit(how=how, is_lost=how.startswith("signal")), looks

    def ended(self) -> RankExit | None:
        self._looks -= 1
        return self._end if self._looks < 0 else None

    def kill(self) -> None:
        raise AssertionError("nobody is killed for having ended")


def lost(text: str) -> RankReport:
    return RankReport(text=text, is_of_connections=True)


def broken(text: str) -> RankReport:
    return RankReport(text=text, is_of_connections=False)


@pytest.mark.parametrize(
    ("how", "reports", "named", "exit_code"),
    [
        (
            "signal 9",
            {1: lost("RuntimeError: [gloo] Connection reset by peer")},
            "rank 3 of the trainer ended with signal 9 in 'update'\\.",
            75,
        ),
        (
            "status 1",
            {1: lost("RuntimeError: Connection closed by peer"), 3: broken("OutOfMemoryError: 40 GiB")},
            "rank 3 of the trainer ended with status 1 in 'update': OutOfMemoryError: 40 GiB.*Fix the cause",
            2,
        ),
        (
            "status 1",
            {1: lost("RuntimeError: closed by peer"), 3: broken("ValueError: no connection to my database")},
            "rank 3 .* ended with status 1 in 'update': ValueError: no connection to my database.*Fix the cause",
            2,
        ),
        (
            "status 1",
            {1: lost("DistBackendError: 1"), 3: lost("DistBackendError: 3")},
            "rank 1 .* DistBackendError",
            75,
        ),
        ("status 1", {1: lost("DistBackendError: 1")}, "rank 3 .* ended with status 1 in 'update'.*Fix the cause", 2),
    ],
    ids=[
        "killed",
        "failed",
        "failed over a connection of its own",
        "all lost another",
        "failed before it could report",
    ],
)
def test_the_rank_that_ended_first_is_named_and_resuming_is_for_those_that_were_lost(
    how: str, reports: dict[int, RankReport], named: str, exit_code: int
) -> None:
    store = dist.HashStore()
    failures = RankFailures([Ended(1, "status 1"), Ended(3, how, looks=3)], store, 60.0)
    for rank, report in reports.items():
        store.set(error_key(rank), report.encoded())
    with pytest.raises(RankError, match=named) as caught:
        failures.refuse_ended("update")
    assert caught.value.exit_code == exit_code
    assert isinstance(caught.value, RankLostError) == (exit_code == 75)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (dist.DistNetworkError("closed"), True),
        (dist.DistBackendError("unhandled system error"), True),
        (dist.DistStoreError("wait timeout after 100ms"), True),
        (ConnectionResetError("reset"), True),
        (BrokenPipeError(), True),
        (TimeoutError("timed out"), True),
        (ValueError("no connection to my database"), False),
        (RuntimeError("gloo: Connection closed by peer; NCCL timed out; broken pipe"), False),
        (OSError("connection"), False),
        (torch.OutOfMemoryError("NCCL connection"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_type_of_an_exception_decides_whether_a_rank_lost_another(error: Exception, is_lost: bool) -> None:
    assert is_of_connections(error) == is_lost
    assert report_of(error) == RankReport(text=f"{type(error).__name__}: {error}", is_of_connections=is_lost)
    assert RankReport.decoded(report_of(error).encoded().encode()) == report_of(error)


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [("[gloo/transport/tcp/pair.cc:534] Connection closed by peer", True), ("shapes differ", False)],
)
def test_a_message_decides_only_for_what_torch_distributed_raised(message: str, is_lost: bool) -> None:
    """gloo reports a lost peer as a plain RuntimeError. Here a function in a file of torch.distributed raises it."""
    inside: dict[str, Any] = {}
    exec(compile("def wait(error):\n    raise error\n", dist.__file__, "exec"), inside)
    with pytest.raises(RuntimeError) as caught:
        inside["wait"](RuntimeError(message))
    assert is_of_connections(caught.value) == is_lost
    assert not is_of_connections(RuntimeError(message)), "raised nowhere"


def test_an_error_of_the_first_rank_itself_is_passed_on_at_once_whatever_its_words() -> None:
    failures = RankFailures([Ended(1, "status 0", looks=9**9)], dist.HashStore(), 60.0)

    def fail() -> None:
        raise ValueError("no connection to my database: timed out")

    started = time.monotonic()
    with pytest.raises(ValueError, match="my database"):
        failures.guarded("update", 1, fail)
    assert time.monotonic() - started < 5, "nothing is waited for"


class WithoutDatabase(ProcessRankHandle):
    """A rank whose update fails with an error of its own that has the words of a lost connection."""

    program = (
        "-c",
        "from coupled.rl.trainer import rank_process\n"
        "from coupled.rl.trainer.rl_learner import RLLearner\n"
        "def update(*arguments, **named):\n"
        "    raise ValueError('no connection to my database')\n"
        "RLLearner.update = update\n"
        "rank_process.main()\n",
    )


def test_a_rank_that_fails_by_itself_is_no_lost_rank_whatever_its_words(checkpoint: Path, tmp_path: Path) -> None:
    rank_group = opened(checkpoint, tmp_path, WithoutDatabase).rank_group
    try:
        batch = make_batch(seed=1)
        draw = draw_masks(batch, rank_group._learner.recipe.estimator, (0, "mask", 1, 0))
        anchor = rank_group.anchor(batch, draw, is_first=True)
        with pytest.raises(
            RankError, match=r"rank 1 .* ended with status 1 in 'update': ValueError: no connection to my database"
        ) as failed:
            rank_group.update(1, batch, draw, anchor)
        assert not isinstance(failed.value, RankLostError)
        assert failed.value.exit_code == 2
        cause = failed.value.__cause__
        assert cause is None or is_of_connections(cause), "for the first rank the other one is gone"
    finally:
        rank_group.close()


def test_collectives_are_aborted_when_a_rank_ends_and_only_then() -> None:
    aborted: list[int] = []
    handles = [Ended(1, "status 0", looks=9), Ended(2, "signal 9", looks=2)]
    abort_when_one_ends(handles, threading.Event(), lambda lost: aborted.append(lost.rank))
    assert aborted == [2]
    closed = threading.Event()
    closed.set()
    abort_when_one_ends([Ended(1, "signal 9")], closed, lambda lost: aborted.append(lost.rank))
    assert aborted == [2], "a rank group that is closed ends its ranks itself"


def test_who_reads_from_a_host_that_fell_silent_is_told_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo waits for a silent host until its own deadline; here 127.0.0.2 is that host."""
    monkeypatch.setattr(coupled.rl.trainer.rank_failures, "GRACE_SECONDS", 0.1)
    ends: dict[str, list[socket.socket]] = {}
    for address in ("127.0.0.1", "127.0.0.2"):
        with socket.create_server((address, 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            ends[address] = [ours, listener.accept()[0]]
    try:
        heard: list[bytes] = []
        reader = threading.Thread(target=lambda: heard.append(ends["127.0.0.2"][0].recv(1)))
        reader.start()
        for still_here in (Ended(1, "signal 9"), Ended(1, "status 1", host="127.0.0.2")):
            abort_collectives("127.0.0.1", threading.Event(), still_here)
        assert reader.is_alive(), "what ends on a host that lives breaks its own connections"
        abort_collectives("127.0.0.1", threading.Event(), Ended(1, "signal 9", host="127.0.0.2"))
        reader.join(timeout=10)
        assert heard == [b""]
        ends["127.0.0.1"][1].send(b"x")
        assert ends["127.0.0.1"][0].recv(1) == b"x"
    finally:
        for one in (*ends["127.0.0.1"], *ends["127.0.0.2"]):
            one.close()


def test_a_rank_that_cannot_load_the_model_says_why(checkpoint: Path, tmp_path: Path) -> None:
    here = recipe_of(checkpoint)
    there = recipe_of(tmp_path / "nowhere")
    policy = open_policy(here.model, 0)
    started = []

    def start(rank: int, port: int) -> ProcessRankHandle:
        started.append(ProcessRankHandle(there, rank, port, tmp_path))
        return started[-1]

    with pytest.raises(RankError, match=r"rank 1 .* ended with status 1 in 'start': CheckpointError: .*nowhere"):
        RankGroup(here, policy, start)
    assert not is_alive(started[0].pid)


@pytest.fixture
def nobody_home() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_rank_ends_when_the_process_that_started_it_is_gone(
    checkpoint: Path, tmp_path: Path, nobody_home: int
) -> None:
    handle = ProcessRankHandle(recipe_of(checkpoint), 1, nobody_home, tmp_path)
    try:
        assert handle._process.stdin is not None
        handle._process.stdin.close()  # as the kernel does for a killed process
        deadline = time.monotonic() + 60
        while handle.ended() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert handle.ended() == RankExit(how="status 3", is_lost=False)
        assert "the process of the first rank has ended" in (tmp_path / "rank_1.log").read_text()
    finally:
        handle.kill()


def test_one_rank_is_the_process_itself(checkpoint: Path, tmp_path: Path) -> None:
    recipe = recipe_of(checkpoint, trainer_ranks=1)
    learner = open_rl_learner(recipe, open_policy(recipe.model, 0), tmp_path)
    assert isinstance(learner, RLLearner)
    assert not dist.is_initialized()
    assert not (tmp_path / "logs").exists()


def test_more_ranks_than_gpus_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match=r"trainer_ranks=2 needs as many GPUs, and torch sees 1; .*model\.device=cpu"):
        refuse_too_few_devices(recipe_of(checkpoint))
