"""`coupled train --supervise`: resumes an interrupted run from its newest checkpoint."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence

RETRYABLE = 75
"""EX_TEMPFAIL: too few workers, no progress, or a checkpoint that could not be written."""
MAX_RESTARTS = 5
BACKOFF_SECONDS = 5.0


def supervise(
    first: Sequence[str],
    again: Sequence[str],
    say: Callable[[str], None],
    *,
    committed: Callable[[], frozenset[str]] = frozenset,
    backoff_seconds: float = BACKOFF_SECONDS,
) -> int:
    """Run a command; while it ends with a status that resuming may fix, run `again`. Returns the last exit status.

    That is status 75, and an end by a signal: out of memory, a crash of a library. Not resumed: errors that the user
    must fix, bugs (they would recur), Ctrl-C, and SIGTERM, which is deliberate.

    Args:
        committed: returns the names of existing checkpoints. A process that wrote a new one has passed the cause of the
            earlier failure, so the count of restarts begins at 0 again.
    """
    command, restarts = first, 0
    while True:
        before = committed()
        process = subprocess.Popen(command)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            return process.wait()  # the child also received the signal, and reports it
        if not committed() <= before:
            restarts = 0
        is_retryable = status == RETRYABLE or (status < 0 and -status not in (2, 15))
        if not is_retryable or restarts == MAX_RESTARTS:
            return status if status >= 0 else 128 - status
        restarts += 1
        seconds = backoff_seconds * 2 ** (restarts - 1)
        how = f"with status {status}" if status > 0 else f"by signal {-status}"
        say(f"the run ended {how}; resuming in {seconds:.0f} s (restart {restarts} of {MAX_RESTARTS})")
        time.sleep(seconds)
        command = again
