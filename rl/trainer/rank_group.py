"""A trainer of several ranks, as the run sees it: one learner that takes the same calls.

The first rank is the run's own process. The others (`follower`) wait for calls at a store, get the arguments from the
first, and do the same; tensors then travel by collectives. Whoever starts the others (processes here; something else on
other hosts) hands over `RankHandle`s, so that a rank that ends is noticed at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from coupled.rl.errors import CoupledError, RankError, RankLostError, RecipeError
from coupled.rl.likelihood.batch import LikelihoodBatch
from coupled.rl.likelihood.objective import Noise
from coupled.rl.model.open import pick_device
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import AnyRecipe, RunRecipe
from coupled.rl.rollout.sampler import Request
from coupled.rl.trainer.collectives import join, moved
from coupled.rl.trainer.likelihood_learner import LikelihoodUpdate
from coupled.rl.trainer.rank_protocol import RankExit, call_key, done_key, error_key, here_key, learner_of, ready
from coupled.rl.trainer.rl_learner import Update
from coupled.rl.types import Anchor, MaskDraw, Prompt, Rollout, TrainBatch

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0
"""How long ranks may take to leave when they are told to, and a failed one to be seen as ended."""
SETTLE_SECONDS = 1.0
"""How long to look, among ranks that ended, for one that did not do so because of another."""
START_SECONDS = 300.0
"""How long the others may take to say that they are there; weights are loaded after that."""
LOCAL_HOST = "127.0.0.1"


@runtime_checkable
class RankHandle(Protocol):
    """Another rank's process, wherever it runs."""

    rank: int
    host: str
    """The address of the host it runs on."""
    log: str
    """Where to read what it printed."""

    def ended(self) -> RankExit | None:
        """How it ended; None while it runs. Does not wait."""
        ...

    def kill(self) -> None:
        """End it now, if it runs, and give back what it held."""
        ...


StartRank = Callable[[int, int], RankHandle]
"""Starts the given rank, which is to meet the others at the given port of the first rank's address."""


class ProcessRankHandle:
    """A rank on this host, in a process of its own that ends when this one does."""

    def __init__(self, recipe: AnyRecipe, rank: int, port: int, folder: Path) -> None:
        self.rank, self.host = rank, LOCAL_HOST
        folder.mkdir(parents=True, exist_ok=True)
        self.log = str(folder / f"rank_{rank}.log")
        place = {"rank": rank, "host": LOCAL_HOST, "port": port}
        command = [sys.executable, "-P", "-m", "coupled.rl.trainer.rank_process", json.dumps(place)]
        with Path(self.log).open("ab") as log:
            # A session of its own: ctrl-c is for this process, which then ends the others.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        assert self._process.stdin is not None
        # The pipe stays open: its end tells the follower that this process is gone.
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which is seen soon
            self._process.stdin.write(recipe.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> RankExit | None:
        status = self._process.poll()
        if status is None:
            return None
        return RankExit(how=f"signal {-status}" if status < 0 else f"status {status}", is_lost=status < 0)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


class RankGroup:
    """The ranks of a trainer. It has a learner's methods, and each of them runs on every rank.

    Args:
        start: starts another rank.
        host: the address of this host that the other ranks reach; nothing listens on another one.
        on_close: called when the ranks have ended, to give back what they ran on.
    """

    def __init__(
        self,
        recipe: AnyRecipe,
        policy: Policy,
        start: StartRank,
        *,
        host: str = LOCAL_HOST,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_close = on_close
        self._timeout = recipe.cluster.trainer_timeout_seconds
        self._num_calls = 0
        self._is_whole = False
        self._has_closed = threading.Event()
        size, is_gpu = recipe.cluster.trainer_ranks, policy.device.type == "cuda"
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._timeout),
            master_listen_fd=listener.detach(),
        )
        self._handles: list[RankHandle] = []
        try:
            for rank in range(1, size):
                self._handles.append(start(rank, port))
            self._wait_until_all_are_there()
            if is_gpu or any(handle.host != host for handle in self._handles):
                watch = (self._handles, self._has_closed, partial(abort_collectives, host, self._has_closed))
                threading.Thread(target=abort_when_one_ends, args=watch, daemon=True).start()
            self._ranks = join(self._store, index=0, size=size, is_gpu=is_gpu, timeout_seconds=self._timeout)
            self._learner = self._guarded("start", lambda: ready(learner_of(recipe, policy, self._ranks), self._ranks))
        except BaseException:
            self.close()
            raise
        self._is_whole = True

    @property
    def policy(self) -> Policy:
        return self._learner.policy

    def anchor(
        self, batch: TrainBatch, masks: MaskDraw, *, is_first: bool, earlier: dict[str, Tensor] | None = None
    ) -> Anchor:
        """See `RLLearner.anchor`."""
        found: Anchor = self._call("anchor", batch, masks, is_first=is_first, earlier=earlier)
        return found

    def present_scores(self, batch: TrainBatch, masks: MaskDraw) -> Tensor:
        """See `RLLearner.present_scores`."""
        scores: Tensor = self._call("present_scores", batch, masks)
        return scores

    def update(self, step: int, batch: TrainBatch, masks: MaskDraw, anchor: Anchor) -> Update:
        """See `RLLearner.update`."""
        done: Update = self._call("update", step, batch, masks, anchor)
        return done

    def fit(self, step: int, batch: LikelihoodBatch, noise: Noise) -> LikelihoodUpdate:
        """See `LikelihoodLearner.fit`."""
        done: LikelihoodUpdate = self._call("fit", step, batch, noise)
        return done

    def sync_reference(self, step: int) -> None:
        """See `RLLearner.sync_reference`."""
        self._call("sync_reference", step)

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int, weight_version: int) -> list[Rollout]:
        """See `RLLearner.generate`."""
        made: list[Rollout] = self._call("generate", requests, sampler, seed=seed, weight_version=weight_version)
        return made

    def check_parity(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> float:
        """See `RLLearner.check_parity`."""
        found: float = self._call("check_parity", prompts, rollouts)
        return found

    def trainable_state(self) -> dict[str, Tensor]:
        """See `RLLearner.trainable_state`."""
        if not self._learner.is_sharded:
            return self._learner.trainable_state()
        state: dict[str, Tensor] = self._call("trainable_state")
        return state

    def write(self, folder: Path, state: dict[str, Any]) -> None:
        """See `RLLearner.write`."""
        if self._learner.is_sharded:
            self._call("write", folder.resolve(), state)  # ranks may have other working folders
        else:
            self._learner.write(folder, state)

    def read(self, folder: Path) -> dict[str, Any]:
        """See `RLLearner.read`."""
        state: dict[str, Any] = self._call("read", folder.resolve())
        return state

    def close(self) -> None:
        """End the other ranks: when all is well by telling them, otherwise at once."""
        self._has_closed.set()
        if self._is_whole:
            self._is_whole = False
            self._announce("close")
            deadline = time.monotonic() + GRACE_SECONDS
            while any(f.ended() is None for f in self._handles) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        for handle in self._handles:
            handle.kill()
        self._handles = []
        if dist.is_initialized():
            dist.destroy_process_group()
        self._on_close()

    # --- calls --------------------------------------------------------------------------------------------------------

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Run a learner's method on all ranks at once.

        Raises:
            RankError: a rank has ended, or the ranks waited for each other for too long. The gang is of no use then.
        """
        if not self._is_whole:
            raise RankLostError("the trainer has lost a rank before; continue the run with resume=auto")
        self._refuse_ended(method)

        def run() -> Any:
            self._announce(method)
            self._ranks.broadcast(moved((arguments, tuple(named.items())), "cpu"))
            return getattr(self._learner, method)(*arguments, **named)

        self._is_whole = False
        try:
            result = self._guarded(method, run)
        except OSError:
            self._is_whole = True  # a full disk ends no rank
            raise
        self._refuse_ended(method)  # what aborted collectives leave in tensors is nothing to go on with
        self._is_whole = True
        return result

    def _announce(self, method: str) -> None:
        self._num_calls += 1
        self._store.set(call_key(self._num_calls), method)

    def _guarded(self, method: str, run: Callable[[], Any]) -> Any:
        """Say which rank is at fault when a collective fails."""
        try:
            return run()
        except (CoupledError, OSError):
            raise
        except Exception as error:  # whatever collectives make of it
            text = str(error).lower()
            has_expired = "timed out" in text or "timeout" in text
            # A rank that ends closes its connections first.
            deadline = time.monotonic() + (0 if has_expired or not is_of_connections(text) else GRACE_SECONDS)
            self._refuse_ended(method, error)
            while time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                self._refuse_ended(method, error)
            if has_expired:
                late = [f for f in self._handles if not self._store.check([done_key(self._num_calls, f.rank)])]
                raise RankLostError(
                    f"the trainer's ranks waited {self._timeout:g} s for each other in {method!r}; not done: "
                    f"{', '.join(f'rank {f.rank} ({f.log})' for f in late)}. If one of them is only slow, raise "
                    "cluster.trainer_timeout_seconds; then continue with resume=auto"
                ) from error
            if is_of_connections(text):
                raise RankLostError(
                    f"the trainer's ranks lost each other in {method!r}, and all of them still run: {error}. If the "
                    "network is whole, continue with resume=auto"
                ) from error
            raise

    def _refuse_ended(self, method: str, cause: BaseException | None = None) -> None:
        if all(handle.ended() is None for handle in self._handles):
            return
        # Ranks that lose a connection end, too: look for the one that was first.
        deadline = time.monotonic() + SETTLE_SECONDS
        while (found := self._blame()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        first = found or next(f for f in self._handles if f.ended() is not None)
        end, reason = first.ended(), self._reason(first)
        assert end is not None
        text = f"rank {first.rank} of the trainer ended with {end.how} in {method!r}{reason and f': {reason}'}"
        if end.is_lost or is_of_connections(reason.lower()):
            raise RankLostError(f"{text}. What it printed is in {first.log}. Continue with resume=auto") from cause
        raise RankError(
            f"{text}. What it printed is in {first.log}. Mend that, then continue with resume=auto"
        ) from cause

    def _blame(self) -> RankHandle | None:
        """A rank that ended by itself: without a word, or with a reason that is not the loss of another one."""
        ended = [f for f in self._handles if f.ended() is not None]
        return next((f for f in ended if not is_of_connections(self._reason(f).lower())), None)

    def _reason(self, handle: RankHandle) -> str:
        """What an ended rank has raised, as far as that is known."""
        end, key = handle.ended(), error_key(handle.rank)
        if end is not None and end.reason is not None:
            return end.reason
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _wait_until_all_are_there(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._store.check([here_key(f.rank) for f in self._handles]):
            self._refuse_ended("start")
            if time.monotonic() > deadline:
                missing = [f for f in self._handles if not self._store.check([here_key(f.rank)])]
                raise RankLostError(
                    f"after {START_SECONDS:g} s these ranks of the trainer have not come up: "
                    f"{', '.join(f'{f.rank} ({f.log})' for f in missing)}"
                )
            time.sleep(POLL_SECONDS)


def abort_when_one_ends(
    handles: Sequence[RankHandle], has_closed: threading.Event, abort: Callable[[RankHandle], None]
) -> None:
    """Let collectives fail when a rank has ended.

    A process that ends breaks gloo's connections by itself, but NCCL's kernels go on waiting for it, and so does gloo
    for a host that falls silent.
    """
    while not has_closed.wait(POLL_SECONDS):
        for handle in handles:
            if handle.ended() is not None:
                abort(handle)
                return


def abort_collectives(here: str, has_closed: threading.Event, lost: RankHandle) -> None:
    """Let the collectives of this process, on host `here`, fail now that a rank has ended."""
    if dist.is_initialized() and dist.group.WORLD is not None:
        dist.group.WORLD.abort()  # NCCL's
    end = lost.ended()
    is_silent = lost.host != here and end is not None and end.is_lost and not has_closed.wait(GRACE_SECONDS)
    if is_silent:
        cut_connections(lost.host)


def cut_connections(address: str) -> None:
    """Shut this process's TCP connections to a host that is gone: whoever reads from one is told so at once.

    gloo has no other way to be told. Ray's connections to that host are among them; nobody answers there.
    """
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if not stat.S_ISSOCK(entry.stat().st_mode):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.getpeername()[0].removeprefix("::ffff:") == address:
                    connection.shutdown(socket.SHUT_RDWR)


def is_of_connections(text: str) -> bool:
    """Whether a collective failed because somebody is not there any more, by its message in lower case."""
    return any(word in text for word in ("connection", "gloo", "nccl", "broken pipe"))


def refuse_too_few_devices(recipe: RunRecipe) -> None:
    """Every rank needs a GPU of its own, if it is to use one."""
    size = recipe.cluster.trainer_ranks
    if pick_device(recipe.model.device) == "cuda" and torch.cuda.device_count() < size:
        raise RecipeError(
            f"cluster.trainer_ranks={size} needs as many GPUs, and torch sees {torch.cuda.device_count()}; lower it, "
            "or set model.device=cpu"
        )
