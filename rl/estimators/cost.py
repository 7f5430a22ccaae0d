"""Cost of an estimate: the masked inputs of a completion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringCost:
    """Masked inputs of one estimate, for one completion that fills its canvas.

    Example: one coupled pair with the weights `paper` and 256 positions → 2 own views, 1 shared view, 512 scored.
    """

    own_views: int
    """Inputs that differ between completions: each is one row of a forward pass."""
    shared_views: int
    """Fully masked inputs: completions of one prompt whose inputs are equal share one row of a forward pass."""
    scored: int | float
    """Mean number of scored positions in all views together, over the random draws."""

    @property
    def views(self) -> int:
        """Masked inputs of a completion, without sharing."""
        return self.own_views + self.shared_views
