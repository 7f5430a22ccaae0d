"""`coupled train --supervise`: a run that is interrupted is resumed from its newest checkpoint."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence

RETRYABLE = 75
"""EX_TEMPFAIL: too few workers, nothing moved, or a checkpoint could not be written."""
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
    """Run a command; while it ends with a status that resuming may mend, run `again`. Returns the last exit status.

    That is 75, and an end by a signal: out of memory, a crash of a library. Not an error that the user must mend, a
    mistake of ours (it would come back), Ctrl-C, or SIGTERM, which is somebody's wish.

    Args:
        committed: names the checkpoints that there are. A process that left a new one has got over what ended the one
            before it, and counting begins again.
    """
    command, restarts = first, 0
    while True:
        before = committed()
        process = subprocess.Popen(command)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            return process.wait()  # it got the signal, too, and says so
        if not committed() <= before:
            restarts = 0
        is_retryable = status == RETRYABLE or (status < 0 and -status not in (2, 15))
        if not is_retryable or restarts == MAX_RESTARTS:
            return status if status >= 0 else 128 - status
        restarts += 1
        seconds = backoff_seconds * 2 ** (restarts - 1)
        how = f"with status {status}" if status > 0 else f"by signal {-status}"
        say(f"the run ended {how}; it is resumed in {seconds:.0f} s (restart {restarts} of {MAX_RESTARTS})")
        time.sleep(seconds)
        command = again
