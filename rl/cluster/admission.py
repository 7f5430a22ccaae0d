"""How far rollouts may run ahead of training."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LAG = 2
"""Behind more steps the clipped ratio says little; nothing is gained beyond 2 with a canvas of fixed length."""


@dataclass(slots=True)
class InOrder:
    """Step s is rolled out with the weights of step s - 1 - lag, whoever is fast or slow: a run can be repeated.

    `lag` 0 is on-policy. It may fall to 0 during a run (`fall_back`); steps that are under way keep their version.
    """

    lag: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.lag <= MAX_LAG:
            raise ValueError(f"lag is 0 to {MAX_LAG} steps; received {self.lag}: use 1, or 0 for on-policy rollouts")

    def version_for(self, step: int) -> int:
        """The weights that step `step` (from 1) is rolled out with."""
        return max(0, step - 1 - self.lag)

    def allow(self, num_trained: int, step: int) -> bool:
        """Whether step `step` may begin when `num_trained` steps have been trained."""
        return self.version_for(step) <= num_trained

    def staleness(self, step: int, version: int) -> int:
        """Training steps between the weights that rolled out and those that are updated."""
        return step - 1 - version

    def fall_back(self) -> None:
        """On-policy from the next step that is issued."""
        self.lag = 0
