"""Opens the learner of a recipe: this process alone, or several ranks behind the same interface."""

from __future__ import annotations

from pathlib import Path

from coupled.rl.model.policy import Policy
from coupled.rl.recipe.schema import AnyRecipe, LikelihoodRecipe, Recipe
from coupled.rl.trainer.likelihood_learner import LikelihoodLearner
from coupled.rl.trainer.rank_group import RankGroup, refuse_too_few_devices
from coupled.rl.trainer.rank_process import ProcessRankHandle
from coupled.rl.trainer.rl_learner import RLLearner


def open_rl_learner(recipe: Recipe, policy: Policy, folder: Path) -> RLLearner | RankGroup:
    """The learner of an RL run: this process alone, or the recipe's number of ranks on this host or others.

    Raises:
        RecipeError: more ranks than GPUs.
        ClusterError: the cluster lacks capacity for the ranks.
        RankError: a rank did not come up.
    """
    return RLLearner(recipe, policy) if recipe.cluster.trainer_ranks == 1 else _open_rank_group(recipe, policy, folder)


def open_likelihood_learner(recipe: LikelihoodRecipe, policy: Policy, folder: Path) -> LikelihoodLearner | RankGroup:
    """The learner of a likelihood run, as `open_rl_learner`."""
    return (
        LikelihoodLearner(recipe, policy)
        if recipe.cluster.trainer_ranks == 1
        else _open_rank_group(recipe, policy, folder)
    )


def _open_rank_group(recipe: AnyRecipe, policy: Policy, folder: Path) -> RankGroup:
    if recipe.cluster.trainer_workers == "ray":
        from coupled.rl.trainer.ray_ranks import open_ray_rank_group

        return open_ray_rank_group(recipe, policy, folder)
    refuse_too_few_devices(recipe)
    return RankGroup(recipe, policy, lambda rank, port: ProcessRankHandle(recipe, rank, port, folder / "logs"))
