"""A rank of the trainer other than the first, as a process: it joins, and runs the announced calls until it is closed.

The first rank holds a `ProcessRankHandle` of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

from coupled.rl.model.open import open_policy, pick_device, use_threads
from coupled.rl.recipe.read import recipe_from_json
from coupled.rl.recipe.schema import AnyRecipe
from coupled.rl.trainer.collectives import join, moved
from coupled.rl.trainer.rank_failures import report_of
from coupled.rl.trainer.rank_protocol import (
    LOCAL_HOST,
    START_SECONDS,
    RankExit,
    call_key,
    done_key,
    error_key,
    here_key,
    learner_of,
    ready,
)

IDLE_SECONDS = 3600.0
"""Timeout of one poll for the next call. Polls may time out any number of times while programs are judged."""
ABANDONED = 3
"""Exit status of a rank whose first rank is gone."""


class ProcessRankHandle:
    """A rank on this host, in a process of its own that ends when this one does."""

    program: ClassVar[tuple[str, ...]] = ("-m", "coupled.rl.trainer.rank_process")
    """Arguments of the interpreter that run `main`."""

    def __init__(self, recipe: AnyRecipe, rank: int, port: int, folder: Path) -> None:
        self.rank, self.host = rank, LOCAL_HOST
        folder.mkdir(parents=True, exist_ok=True)
        self.log = str(folder / f"rank_{rank}.log")
        place = {"rank": rank, "host": LOCAL_HOST, "port": port}
        command = [sys.executable, "-P", *self.program, json.dumps(place)]
        with Path(self.log).open("ab") as log:
            # A session of its own: ctrl-c is for this process, which then ends the others.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        assert self._process.stdin is not None
        # The pipe stays open: its end is how the rank learns that this process is gone.
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


def serve_rank(recipe: AnyRecipe, *, rank: int, host: str, port: int, device: int) -> None:
    """Run as rank `rank`, on this host's GPU number `device` if the recipe uses one, until the first rank closes.

    Raises:
        RuntimeError: another rank is gone, or did not come in time.
        Exception: any failure of the learner. It is reported to the first rank before it is raised.
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
            except OSError:  # a full disk: the first rank sees it as well, and decides
                traceback.print_exc()
            store.set(done_key(number, rank), "")
            number += 1
        ranks.leave()
    except BaseException as error:
        store.set(error_key(rank), report_of(error).encoded())
        raise


def wait_for_call(store: dist.Store, number: int) -> str:
    """Name of the next call's method; waits for it.

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
    """End this process when standard input ends: the process of the first rank holds it open."""
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
        os._exit(1)  # without waiting for collectives that will not be answered
    os._exit(0)


if __name__ == "__main__":
    main()
