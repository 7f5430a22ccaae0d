"""The order in which prompts and samples are visited: a function of seed, stream and step alone."""

from __future__ import annotations

from coupled.rl.keys import generator


def epoch_order(num_rows: int, *, seed: int, epoch: int, stream: str) -> list[int]:
    """The order in which an epoch visits the rows: a pure function of its arguments."""
    return [int(i) for i in generator(seed, stream, epoch).permutation(num_rows)]


def rows_of_step(num_rows: int, *, step: int, per_step: int, seed: int, stream: str) -> list[int]:
    """Indices of the rows of step `step` (from 0); no row is skipped or repeated within an epoch.

    Example: with 5 rows and 2 a step, step 2 has the last row of epoch 0 and the first row of epoch 1.
    """
    first = step * per_step
    wanted = range(first, first + per_step)
    orders = {e: epoch_order(num_rows, seed=seed, epoch=e, stream=stream) for e in {i // num_rows for i in wanted}}
    return [orders[i // num_rows][i % num_rows] for i in wanted]
