"""Checks of a run's rollouts: completions without scores, comparison with exact rollouts, drift of the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from coupled.reward import Status
from coupled.rl.cluster.types import NO_EVENTS, EventSink
from coupled.rl.errors import RolloutError
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.exactness import TOLERANCE, Mismatch
from coupled.rl.shapes import Bool, Float
from coupled.rl.types import Group

MAX_BLIND_STEPS = 3
"""Steps in a row without a single score that end the run, because nothing is learned from them."""
MAX_DRIFTED_STEPS = 2
"""Steps in a row of too large a policy drift before rollouts stop running ahead."""


class RunChecks:
    """Counts and reports faults of successive steps, and decides when the run must change or end.

    Args:
        report: prints a line for the user.
        resume: the value of `resume` that continues the run, for messages.
    """

    def __init__(
        self, recipe: Recipe, resume: str, emit: EventSink = NO_EVENTS, report: Callable[[str], None] = print
    ) -> None:
        self._recipe = recipe
        self._resume = resume
        self._emit = emit
        self._report = report
        self._num_blind = 0
        self._num_drifted = 0

    def scores(self, step: int, groups: Sequence[Group]) -> None:
        """Report completions that have no score because of a fault of the sandbox, with the reason.

        Raises:
            RolloutError: no completion of `MAX_BLIND_STEPS` steps in a row has a score.
        """
        verdicts = [verdict for group in groups for verdict in group.verdicts]
        failed = [verdict for verdict in verdicts if verdict.status is Status.INFRA]
        if failed:
            why = failed[0].detail or failed[0].outcome
            self._emit("unscored", step=step, completions=len(failed), why=why[:500])
            self._report(
                f"alarm: step {step}: {len(failed)} of {len(verdicts)} completions have no score and are left out: "
                f"{why}"
            )
        self._num_blind = self._num_blind + 1 if all(verdict.score is None for verdict in verdicts) else 0
        if self._num_blind >= MAX_BLIND_STEPS:
            raise RolloutError(
                f"in {self._num_blind} steps running, to step {step}, not one completion has a score, so nothing is "
                "learned. Check the reward functions and the sandbox: `coupled doctor`, `coupled sandbox run`; then "
                f"continue with resume={self._resume}"
            )

    def is_exactness_due(self, step: int, sampler: Sampler) -> bool:
        """Whether some groups of the step are to be decoded again, exactly (`rollout.monitor_every`)."""
        every = self._recipe.rollout.monitor_every
        return bool(every) and (step - 1) % every == 0 and not sampler.is_exact

    def exactness(self, step: int, found: Mismatch) -> bool:
        """Report a mismatch beyond the tolerance. True: roll out exactly from the next step on.

        Raises:
            RolloutError: there is a mismatch, and `rollout.on_mismatch` is stop.
        """
        on_mismatch = self._recipe.rollout.on_mismatch
        if not found.is_beyond(TOLERANCE):
            return False
        text = f"step {step}: rollouts differ from exact ones by more than chance: {found}"
        if on_mismatch == "stop":
            raise RolloutError(
                f"{text}. rollout.on_mismatch is stop: lower rollout.entropy_bound, raise rollout.end_fill, "
                "refresh the cache more often, or roll out exactly (rollout.preset=rl)"
            )
        has_fallen_back = on_mismatch == "fall_back"
        self._report(f"{text}; exact from the next step on" if has_fallen_back else text)
        return has_fallen_back

    def policy_drift(self, drift: float, *, lag: int) -> bool:
        """Report a policy that keeps moving too far from the one that rolled out. True: roll out on-policy (lag 0)."""
        limit = self._recipe.cluster.max_policy_drift
        self._num_drifted = self._num_drifted + 1 if drift > limit else 0
        if self._num_drifted < MAX_DRIFTED_STEPS or not lag:
            return False
        self._emit("fall_back", policy_drift=drift)
        self._report(
            f"the policy moved {drift:.3g} nats per token from the one that rolled out, twice more than "
            f"cluster.max_policy_drift={limit:g}: rollouts run ahead no more (lag 0)"
        )
        return True


def policy_drift(
    old: Float[Tensor, "B C"], present: Float[Tensor, "B C"], valid: Bool[Tensor, "B C"], max_log_ratio: float
) -> float:
    """KL(old ‖ present) in nats per valid token by its estimate k3 = r - 1 - log r, r = present / old [Schulman 2020].

    Args:
        old, present: log-probabilities of the tokens under the policy that rolled out and under the present one.
        max_log_ratio: log r is clamped to it.
    """
    log_ratio = (present - old)[valid].clamp(max=max_log_ratio)
    return float((log_ratio.exp() - 1 - log_ratio).mean()) if len(log_ratio) else 0.0
