"""A rank of the trainer other than the first: it joins, and does what it is called for until it is told to leave."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from coupled.rl.model.open import open_policy, pick_device, use_threads
from coupled.rl.recipe.read import recipe_from_json
from coupled.rl.recipe.schema import AnyRecipe
from coupled.rl.trainer.collectives import join, moved
from coupled.rl.trainer.rank_group import START_SECONDS
from coupled.rl.trainer.rank_protocol import call_key, done_key, error_key, here_key, learner_of, ready

IDLE_SECONDS = 3600.0
"""How long one look for a call lasts. Between calls programs are judged, so any number of looks may be in vain."""
ABANDONED = 3
"""Exit status of a rank whose first rank is gone."""


def serve_rank(recipe: AnyRecipe, *, rank: int, host: str, port: int, device: int) -> None:
    """Be rank `rank`, on this host's GPU number `device` if the recipe uses one, until the first rank says to leave.

    Raises:
        RuntimeError: another rank is gone, or did not come in time.
    """
    size, timeout = recipe.cluster.trainer_ranks, recipe.cluster.trainer_timeout_seconds
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=START_SECONDS))
    try:
        use_threads(recipe)
        if is_gpu := pick_device(recipe.model.device) == "cuda":
            torch.cuda.set_device(device)
        store.set(here_key(rank), "")
        ranks = join(store, index=rank, size=size, is_gpu=is_gpu, timeout_seconds=timeout)
        learner = ready(learner_of(recipe, open_policy(recipe.model, recipe.seed), ranks), ranks)
        number = 1
        while (method := wait_for_call(store, number)) != "close":
            arguments, named = moved(ranks.broadcast(None), learner.policy.device)
            try:
                getattr(learner, method)(*arguments, **dict(named))
            except OSError:  # a full disk: the first rank knows of it, and decides
                traceback.print_exc()
            store.set(done_key(number, rank), "")
            number += 1
        ranks.leave()
    except BaseException as error:
        store.set(error_key(rank), f"{type(error).__name__}: {error}")
        raise


def wait_for_call(store: dist.Store, number: int) -> str:
    """The method that is called next.

    Raises:
        dist.DistNetworkError: the first rank, which holds the store, is gone.
    """
    while True:
        try:
            store.wait([call_key(number)], timedelta(seconds=IDLE_SECONDS))
        except dist.DistStoreError:
            continue
        return store.get(call_key(number)).decode()


def end_with_the_first_rank() -> None:
    """Standard input is held open by the process of the first rank; when it ends, there is nobody to follow."""
    sys.stdin.buffer.read()
    print("the process of the first rank has ended", file=sys.stderr, flush=True)
    os._exit(ABANDONED)


def main() -> None:
    """`python -m coupled.rl.trainer.rank_process '{"rank": 1, "host": …, "port": …}'`, with the recipe as a line
    of JSON on standard input."""
    place = json.loads(sys.argv[1])
    recipe = recipe_from_json(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_the_first_rank, daemon=True).start()
    try:
        serve_rank(recipe, rank=place["rank"], host=place["host"], port=place["port"], device=place["rank"])
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # without waiting for collectives that nobody answers
    os._exit(0)


if __name__ == "__main__":
    main()
