"""Saving of checkpoints in either stage: when one is due, and which failed saves end the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coupled.rl.cluster.types import NO_EVENTS, EventSink
from coupled.rl.errors import SaveError
from coupled.rl.run_folder.folder import RunFolder

MAX_FAILED_SAVES = 5
"""Failed saves in a row that end the run, because its results would be lost."""


class CheckpointSaver:
    """Commits checkpoints. A failed save is reported and retried after the next step; training continues.

    Args:
        every: steps between checkpoints; the last step always has one.
        report: shows a line to the user.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        num_steps: int,
        every: int,
        emit: EventSink = NO_EVENTS,
        report: Callable[[str], None] = print,
    ) -> None:
        self._folder = folder
        self._num_steps = num_steps
        self._every = every
        self._emit = emit
        self._report = report
        self.num_failed = 0
        """Failed saves in a row."""

    def restore(self, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The state that `read` returns for the newest intact checkpoint; `{"step": 0}` for a new run.

        Log rows of later steps are dropped, because these steps are repeated.
        """
        latest = self._folder.latest()
        state = {"step": 0} if latest is None else read(latest)
        self._folder.forget_after(int(state["step"]))
        return state

    def save_if_due(self, step: int, write: Callable[[Path], None], facts: Mapping[str, Any] | None = None) -> None:
        """Commit the checkpoint of step `step` (steps finished) if it is due, or if the previous save failed.

        Args:
            write: writes the checkpoint's files into an empty folder; not called when none is due.
            facts: further entries of the manifest.

        Raises:
            SaveError: `MAX_FAILED_SAVES` saves in a row have failed, or the save of the final step.
            FencedError: another process has taken over the run.
        """
        is_last = step == self._num_steps
        if not (is_last or step % self._every == 0 or self.num_failed):
            return
        try:
            self._folder.commit(step, write, facts)
        except SaveError as error:
            self.num_failed += 1
            self._emit("save_failed", step=step, why=str(error))
            if is_last or self.num_failed >= MAX_FAILED_SAVES:
                raise
            self._report(f"alarm: {error}. Training goes on, and the next step is tried")
        else:
            self.num_failed = 0
