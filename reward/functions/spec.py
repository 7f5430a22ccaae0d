"""One reward function of a recipe: a built-in name, or the path of a function of the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from coupled.reward.types import RewardError

BUILT_IN = ("code", "format")
"""`code`: share of the hidden tests passed, 0 unless the format is right. `format`: see `extract`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """One reward function and its weight: a built-in by `name`, or a user's by `path`.

    Example: `RewardSpec(path="my_reward.py:score", weight=0.5)`.
    """

    name: str | None = None
    path: str | None = None
    """`file.py:function`, relative to the root given to the scorer."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.name is None) == (self.path is None):
            raise RewardError(
                f"a reward function has a name or a path; received name={self.name!r}, path={self.path!r}: "
                f"give one; built-in names: {', '.join(BUILT_IN)}"
            )
        if self.name is not None and self.name not in BUILT_IN:
            raise RewardError(
                f"a reward function's name is one of the built-in ones; received {self.name!r}: "
                f"{nearest(self.name, BUILT_IN)}, or give the path of your own as 'file.py:function'"
            )
        if not math.isfinite(self.weight):
            raise RewardError(f"a weight is a finite number; {self.key} has {self.weight!r}")

    @property
    def key(self) -> str:
        """The name of its part in a verdict: the built-in's, or the function's."""
        return self.name or str(self.path).rpartition(":")[2]


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the remedy for a name that does not exist: the nearest one, or all there are."""
    match = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"there are: {', '.join(sorted(known)) or 'none'}"
