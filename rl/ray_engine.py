"""Rollouts in Ray actors.

Each actor holds a policy of its own and gets whole request batches, cut as the inline engine cuts them, so that its
results are the same bit for bit. Weights travel through the object store as NumPy arrays, which Ray reads without
copying; the driver owns them, so they survive any actor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from coupled.rl.checkpoint import open_policy, use_threads
from coupled.rl.denoise import Request, Sampler
from coupled.rl.engine import Weights, request_chunks, roll_out
from coupled.rl.errors import RolloutError
from coupled.rl.ray_cluster import close_ray, open_ray
from coupled.rl.recipe import Recipe
from coupled.rl.types import Rollout

MAX_ATTEMPTS = 3
"""A batch whose actor dies is made again elsewhere, so often; results do not depend on who makes them."""


class RolloutWorker:
    """What runs inside an actor."""

    def __init__(self, recipe: Recipe) -> None:
        use_threads(recipe)
        self._policy = open_policy(recipe.model, recipe.seed)
        self._version = -1

    def load_weights(self, state: dict[str, np.ndarray], version: int) -> int:
        """Take the trainer's weights. Arrays from the object store are read-only, hence the copy."""
        self._policy.load_trainable_state({name: torch.from_numpy(array.copy()) for name, array in state.items()})
        self._version = version
        return version

    def generate(self, requests: list[Request], sampler: Sampler, seed: int) -> list[Rollout]:
        """Denoise one batch."""
        return roll_out(self._policy, requests, sampler, seed=seed, weight_version=self._version)


class RayEngine:
    """A pool of rollout actors on a Ray instance that this process starts and stops."""

    def __init__(self, recipe: Recipe, log_dir: Path | None = None) -> None:
        ray = self._ray = open_ray(recipe, log_dir)
        self._recipe = recipe
        self._state: Any = None
        self._version = 0
        self._actor_class = ray.remote(num_cpus=1, max_restarts=0)(RolloutWorker)
        self._actors = [self._actor_class.remote(recipe) for _ in range(recipe.rollout.num_workers)]

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        """Hand batches to whichever actor is free.

        Raises:
            RolloutError: a batch killed its actor several times over.
        """
        ray = self._ray
        waiting = [(chunk, 1) for chunk in request_chunks(requests, self._recipe.rollout.batch_size)]
        free = list(range(len(self._actors)))
        running: dict[Any, tuple[int, list[Request], int]] = {}
        made: dict[str, Rollout] = {}
        while waiting or running:
            while waiting and free:
                place, (chunk, attempt) = free.pop(0), waiting.pop(0)
                running[self._actors[place].generate.remote(chunk, sampler, seed)] = (place, chunk, attempt)
            done, _ = ray.wait(list(running), num_returns=1)
            place, chunk, attempt = running.pop(done[0])
            try:
                made.update((r.uid, r) for r in ray.get(done[0]))
            except ray.exceptions.RayActorError as error:
                if attempt >= MAX_ATTEMPTS:
                    raise RolloutError(
                        f"{len(chunk)} completions (first {chunk[0].uid}) ended their rollout actor {attempt} times: "
                        f"{error}. Look at the memory the actors have; lower rollout.batch_size"
                    ) from error
                self._replace(place)
                waiting.insert(0, (chunk, attempt + 1))
            free.append(place)
        return [made[r.uid] for r in requests]

    def load_weights(self, policy: Weights, version: int) -> None:
        """Publish the weights once; every actor reads the same copy."""
        self._state = self._ray.put({name: tensor.numpy() for name, tensor in policy.trainable_state().items()})
        self._version = version
        self._ray.get([actor.load_weights.remote(self._state, version) for actor in self._actors])

    def close(self) -> None:
        """Stop the actors, and the Ray instance when nobody else uses it."""
        for actor in self._actors:
            self._ray.kill(actor)
        close_ray()

    def _replace(self, place: int) -> None:
        self._actors[place] = self._actor_class.remote(self._recipe)
        self._ray.get(self._actors[place].load_weights.remote(self._state, self._version))
