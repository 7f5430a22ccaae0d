"""How far rollouts may run ahead of training."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LAG = 2
"""With more lag the clipped ratio is of little use, and with a canvas of fixed length nothing is gained beyond 2."""


@dataclass(slots=True)
class InOrder:
    """Step s is rolled out with the weights of step s - 1 - lag, whatever the timing, so that a run is reproducible.

    `lag` 0 is on-policy. It may fall to 0 during a run (`fall_back`); steps in progress keep their version.
    """

    lag: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.lag <= MAX_LAG:
            raise ValueError(f"lag is 0 to {MAX_LAG} steps; received {self.lag}: use 1, or 0 for on-policy rollouts")

    def version_for(self, step: int) -> int:
        """Weight version that step `step` (from 1) is rolled out with."""
        return max(0, step - 1 - self.lag)

    def allow(self, num_trained: int, step: int) -> bool:
        """Whether step `step` may begin when `num_trained` steps have been trained."""
        return self.version_for(step) <= num_trained

    def staleness(self, step: int, version: int) -> int:
        """Training steps between the weights that rolled out and those that are updated."""
        return step - 1 - version

    def fall_back(self) -> None:
        """Set the lag to 0 from the next issued step on."""
        self.lag = 0
