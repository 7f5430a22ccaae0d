"""A trainer of several ranks behind the interface of a learner.

The first rank is the run's own process. The others (`rank_process`) wait for calls at a store, receive the arguments
from the first, and run the same method; tensors then travel by collectives. A function starts each of them, as a
process of this host or as an actor of Ray, and returns its `RankHandle`, which reports the end of a rank at once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coupled.rl.errors import RankLostError, RecipeError
from coupled.rl.likelihood.batch import LikelihoodBatch
from coupled.rl.likelihood.objective import Noise
from coupled.rl.model.open import pick_device
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import AnyRecipe, RunRecipe
from coupled.rl.rollout.sampler import Request
from coupled.rl.trainer.collectives import join, moved
from coupled.rl.trainer.likelihood_learner import LikelihoodUpdate
from coupled.rl.trainer.rank_failures import (
    GRACE_SECONDS,
    POLL_SECONDS,
    RankFailures,
    abort_collectives,
    abort_when_one_ends,
)
from coupled.rl.trainer.rank_protocol import (
    LOCAL_HOST,
    START_SECONDS,
    RankHandle,
    call_key,
    here_key,
    learner_of,
    ready,
)
from coupled.rl.trainer.rl_learner import Update
from coupled.rl.types import Anchor, MaskDraw, Prompt, Rollout, TrainBatch

StartRank = Callable[[int, int], RankHandle]
"""Starts the given rank, which meets the others at the given port of the first rank's address."""


class RankGroup:
    """The ranks of a trainer. It has a learner's methods, and each of them runs on every rank.

    Args:
        start: starts another rank.
        host: the address of this host that the other ranks reach; nothing listens on another one.
        on_close: called when the ranks have ended, to release their resources.

    Raises:
        RankError: a rank did not come up, or failed while it loaded the model.
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
        self._num_calls = 0
        self._is_whole = False
        self._has_closed = threading.Event()
        self._handles: list[RankHandle] = []
        size, is_gpu = recipe.cluster.trainer_ranks, policy.device.type == "cuda"
        timeout = recipe.cluster.trainer_timeout_seconds
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
            master_listen_fd=listener.detach(),
        )
        self._failures = RankFailures(self._handles, self._store, timeout)
        try:
            for rank in range(1, size):
                self._handles.append(start(rank, port))
            self._wait_until_all_are_there()
            if is_gpu or any(handle.host != host for handle in self._handles):
                watch = (tuple(self._handles), self._has_closed, partial(abort_collectives, host, self._has_closed))
                threading.Thread(target=abort_when_one_ends, args=watch, daemon=True).start()
            self._ranks = join(self._store, index=0, size=size, is_gpu=is_gpu, timeout_seconds=timeout)
            self._learner = self._failures.guarded(
                "start", self._num_calls, lambda: ready(learner_of(recipe, policy, self._ranks), self._ranks)
            )
        except BaseException:
            self.close()
            raise
        self._is_whole = True

    @property
    def policy(self) -> Policy:
        return self._learner.policy

    @property
    def bodies(self) -> list[nn.Module]:
        """See `Learner.bodies`; the modules of this process."""
        return self._learner.bodies

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
        """End the other ranks: on request if all is well, otherwise at once."""
        self._has_closed.set()
        if self._is_whole:
            self._is_whole = False
            self._announce("close")
            deadline = time.monotonic() + GRACE_SECONDS
            while any(handle.ended() is None for handle in self._handles) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        for handle in self._handles:
            handle.kill()
        self._handles.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._on_close()

    # --- calls --------------------------------------------------------------------------------------------------------

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Run a learner's method on all ranks at once.

        Raises:
            RankError: a rank has ended, or the ranks waited for each other for too long. The group is unusable then.
        """
        if not self._is_whole:
            raise RankLostError("the trainer has lost a rank before; continue the run with resume=auto")
        self._failures.refuse_ended(method)

        def run() -> Any:
            self._announce(method)
            self._ranks.broadcast(moved((arguments, tuple(named.items())), "cpu"))
            return getattr(self._learner, method)(*arguments, **named)

        self._is_whole = False
        try:
            result = self._failures.guarded(method, self._num_calls + 1, run)
        except OSError:
            self._is_whole = True  # a full disk ends no rank
            raise
        self._failures.refuse_ended(method)  # aborted collectives leave undefined values in tensors
        self._is_whole = True
        return result

    def _announce(self, method: str) -> None:
        self._num_calls += 1
        self._store.set(call_key(self._num_calls), method)

    def _wait_until_all_are_there(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._store.check([here_key(handle.rank) for handle in self._handles]):
            self._failures.refuse_ended("start")
            if time.monotonic() > deadline:
                missing = [handle for handle in self._handles if not self._store.check([here_key(handle.rank)])]
                raise RankLostError(
                    f"after {START_SECONDS:g} s these ranks of the trainer have not come up: "
                    f"{', '.join(f'{handle.rank} ({handle.log})' for handle in missing)}"
                )
            time.sleep(POLL_SECONDS)


def refuse_too_few_devices(recipe: RunRecipe) -> None:
    """Return if every rank has a GPU of its own, or none uses one.

    Raises:
        RecipeError: more ranks than GPUs.
    """
    size = recipe.cluster.trainer_ranks
    if pick_device(recipe.model.device) == "cuda" and torch.cuda.device_count() < size:
        raise RecipeError(
            f"cluster.trainer_ranks={size} needs as many GPUs, and torch sees {torch.cuda.device_count()}; lower it, "
            "or set model.device=cpu"
        )
