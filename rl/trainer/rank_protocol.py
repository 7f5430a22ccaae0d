"""Agreements between a rank group and its ranks: keys of their store, handles, reports, and the learner of a rank."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from coupled.rl.errors import RankError
from coupled.rl.model.policy import Policy
from coupled.rl.model.weights import digest_of
from coupled.rl.recipe.schema import AnyRecipe, Recipe
from coupled.rl.trainer.collectives import Ranks
from coupled.rl.trainer.learner import Learner
from coupled.rl.trainer.likelihood_learner import LikelihoodLearner
from coupled.rl.trainer.rl_learner import RLLearner

LOCAL_HOST = "127.0.0.1"
START_SECONDS = 300.0
"""Limit on the time until all ranks are at the store; weights are loaded after that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """The exception that ended a rank. Example: `RankReport(text="ValueError: no rows", is_of_connections=False)`."""

    text: str
    """Class and message of the exception."""
    is_of_connections: bool
    """True if the rank lost its connection to another one, by the type of the exception; False if it failed itself."""

    def encoded(self) -> str:
        """The report as the value of a key of the store."""
        return json.dumps(asdict(self))

    @classmethod
    def decoded(cls, value: bytes) -> RankReport:
        """The report of which `value` is the encoding."""
        return cls(**json.loads(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExit:
    """The end of a rank. Example: `RankExit(how="signal 9", is_lost=True)`."""

    how: str
    is_lost: bool
    """True if its process or host is gone; False if it ended by itself."""
    report: RankReport | None = None
    """The exception that it raised, if the handle knows it. Others are at `error_key` in the store."""


@runtime_checkable
class RankHandle(Protocol):
    """The process of another rank, on this host or another."""

    rank: int
    host: str
    """Address of the host it runs on."""
    log: str
    """File with its output."""

    def ended(self) -> RankExit | None:
        """Its end; None while it runs. Does not wait."""
        ...

    def kill(self) -> None:
        """End it now, if it runs, and release its resources."""
        ...


def call_key(number: int) -> str:
    """Key of the name of the n-th call."""
    return f"call/{number}"


def done_key(number: int, rank: int) -> str:
    """Key that a rank sets when it has done the n-th call."""
    return f"done/{number}/{rank}"


def here_key(rank: int) -> str:
    """Key that a rank sets before it joins the process group."""
    return f"here/{rank}"


def error_key(rank: int) -> str:
    """Key of the `RankReport` of a rank that has failed."""
    return f"error/{rank}"


def learner_of(recipe: AnyRecipe, policy: Policy, ranks: Ranks) -> Learner:
    """The learner of one rank, for the recipe's stage."""
    return RLLearner(recipe, policy, ranks) if isinstance(recipe, Recipe) else LikelihoodLearner(recipe, policy, ranks)


def ready(learner: Learner, ranks: Ranks) -> Learner:
    """Wait until all ranks have their learners, and compare the replicas.

    Raises:
        RankError: the replicas differ; on the first rank.
    """
    found = ranks.gather(None if learner.is_sharded else digest_of(learner.trainable_state()))
    if len(set(found)) > 1:
        odd = [rank for rank, mine in enumerate(found) if mine != found[0]]
        raise RankError(
            f"all ranks of the trainer must begin with the same adapters; adapters of rank "
            f"{', '.join(map(str, odd))} differ from the first rank's. Install the same torch and peft everywhere, "
            "and give all ranks the same checkpoint"
        )
    return learner
