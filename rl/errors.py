"""Errors a user can cause. Each message states the rule, the value received and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class CoupledError(ValueError):
    """Base of every error that the user's input can cause; the command line prints it without a traceback."""

    exit_code: ClassVar[int] = 2
    """Exit status of the command. 2: the input needs a correction. 75 (EX_TEMPFAIL): a resumed run may succeed."""


class RecipeError(CoupledError):
    """The recipe, or an override of it, breaks a rule of the schema."""


class DataError(CoupledError):
    """A dataset is missing, unreadable, or lacks the fields that the recipe names."""


class CheckpointError(CoupledError):
    """A checkpoint is missing, incomplete, or does not fit the recipe."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; earlier checkpoints are intact."""

    exit_code = 75


class FencedError(CheckpointError):
    """Another process has taken over the run folder since this one opened it."""


class RolloutError(CoupledError):
    """Rollouts that cannot be trained on, such as a group whose samples are all the same by construction."""


class RankError(CoupledError):
    """The settings of the trainer's ranks do not fit together, or one rank raised an error."""


class RankLostError(RankError):
    """A rank of the trainer was lost with its process or host, or did not reply in time. Resuming may succeed."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of known names when none is close."""
    known = sorted(known)
    match = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"
