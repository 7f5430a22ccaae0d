"""What a rank group and its ranks agree on: keys of their store, their learner, and how a rank ended."""

from __future__ import annotations

from dataclasses import dataclass

from coupled.rl.errors import RankError
from coupled.rl.model.policy import Policy, digest_of
from coupled.rl.recipe.schema import AnyRecipe, Recipe
from coupled.rl.trainer.collectives import Ranks
from coupled.rl.trainer.learner import Learner
from coupled.rl.trainer.likelihood_learner import LikelihoodLearner
from coupled.rl.trainer.rl_learner import RLLearner


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExit:
    """How a rank ended. Example: `End(how="signal 9", is_lost=True)`."""

    how: str
    is_lost: bool
    """Whether its process or host is gone. Otherwise it has ended by itself."""
    reason: str | None = None
    """What it raised, where that is known."""


def call_key(number: int) -> str:
    """Where the name of the n-th call is."""
    return f"call/{number}"


def done_key(number: int, rank: int) -> str:
    """Set by a rank that has done the n-th call."""
    return f"done/{number}/{rank}"


def here_key(rank: int) -> str:
    """Set by a rank that is about to join."""
    return f"here/{rank}"


def error_key(rank: int) -> str:
    """Where a rank says what ended it."""
    return f"error/{rank}"


def learner_of(recipe: AnyRecipe, policy: Policy, ranks: Ranks) -> Learner:
    """One rank's learner, of the recipe's stage."""
    return RLLearner(recipe, policy, ranks) if isinstance(recipe, Recipe) else LikelihoodLearner(recipe, policy, ranks)


def ready(learner: Learner, ranks: Ranks) -> Learner:
    """Wait until all ranks have their learners, and see to it that replicas begin alike.

    Raises:
        RankError: they do not; on the first rank.
    """
    found = ranks.gather(None if learner.is_sharded else digest_of(learner.trainable_state()))
    if len(set(found)) > 1:
        odd = [rank for rank, mine in enumerate(found) if mine != found[0]]
        raise RankError(
            f"all ranks of the trainer must begin with the same adapters; those of rank {', '.join(map(str, odd))} "
            "differ from the first's. Install the same torch and peft everywhere, and give all the same checkpoint"
        )
    return learner
