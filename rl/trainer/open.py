"""Opens the learner of a recipe: this process alone, or several ranks behind the same interface."""

from __future__ import annotations

from pathlib import Path

from coupled.rl.model.policy import Policy
from coupled.rl.recipe.schema import Recipe
from coupled.rl.trainer.likelihood_learner import FitLearner
from coupled.rl.trainer.rank_group import FollowerProcess, Gang, refuse_too_few_devices
from coupled.rl.trainer.rl_learner import Learner


def open_learner(recipe: Recipe, policy: Policy, folder: Path) -> Learner | Gang:
    """What trains: this process alone, or with as many more, on this host or others, as the recipe asks for.

    Raises:
        RecipeError: more ranks than GPUs.
        ClusterError: the cluster has no room for the ranks.
        RankError: a rank did not come up.
    """
    return Learner(recipe, policy) if recipe.cluster.trainer_ranks == 1 else _open_gang(recipe, policy, folder)


def open_fit_learner(recipe: Recipe, policy: Policy, folder: Path) -> FitLearner | Gang:
    """As `open_learner`, for likelihood training."""
    return FitLearner(recipe, policy) if recipe.cluster.trainer_ranks == 1 else _open_gang(recipe, policy, folder)


def _open_gang(recipe: Recipe, policy: Policy, folder: Path) -> Gang:
    if recipe.cluster.trainer_workers == "ray":
        from coupled.rl.trainer.ray_ranks import open_ray_gang

        return open_ray_gang(recipe, policy, folder)
    refuse_too_few_devices(recipe)
    return Gang(recipe, policy, lambda rank, port: FollowerProcess(recipe, rank, port, folder / "logs"))
