"""The recipe: all settings of a run, validated before it starts.

The description of a field states its unit, its range and the meaning of 0 or none. An unknown key is an error that
names the nearest known one. Defaults are the vetted settings; a recipe file lists only the fields that differ.

A recipe has the sections of its stage: `Recipe` for `rl`, `LikelihoodRecipe` for `sft` and `pretrain`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coupled.rl.recipe.cluster import Checkpoint, Cluster
from coupled.rl.recipe.data import Data
from coupled.rl.recipe.judging import Evaluation, Rewards, Sandbox
from coupled.rl.recipe.likelihood import Fit
from coupled.rl.recipe.model import Model
from coupled.rl.recipe.objective import Estimator, Loss, Optimizer
from coupled.rl.recipe.rollout import Rollout
from coupled.rl.recipe.section import Fraction, Positive, Section


class RunRecipe(Section):
    """Fields of the recipes of all stages."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$", description="first part of the run's folder name")
    seed: int = Field(default=0, ge=0, description="seed of all random draws")
    num_steps: Positive = Field(default=100, description="optimizer steps (sft, pretrain) or rollout steps (rl)")
    num_threads: int = Field(
        default=0,
        ge=0,
        description="torch threads of each process; 0: torch's default, divided among trainer_ranks",
    )
    output_dir: str = Field(default="runs", description="parent of the run folders")
    model: Model
    data: Data
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> RunRecipe:
        if self.optimizer.warmup_steps > self.num_steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must not exceed num_steps ({self.num_steps})"
            )
        return self


class Recipe(RunRecipe):
    """A run of coupled-GRPO."""

    stage: Literal["rl"] = Field(
        description="rl: coupled-GRPO; sft, pretrain: likelihood training, with its own fields"
    )
    num_updates: Positive = Field(default=2, description="optimizer updates per rollout step, each with fresh masks")
    advantage: Literal["mean", "loo", "z", "softmax"] = Field(
        default="mean",
        description="reward minus the group's mean; leave-one-out mean; standardised; or the softmax of the rewards "
        "over the group minus the softmax of their negatives (wd1)",
    )
    group_filter: Literal["none", "zero_std", "accuracy"] = Field(
        default="none",
        description="groups left out of the batch: none; groups whose rewards are all equal; groups whose share of "
        "passing completions is not inside accuracy_range. They are not replaced",
    )
    accuracy_range: tuple[Fraction, Fraction] = Field(
        default=(0.0, 1.0),
        description="open interval of the accuracy filter; (0, 1) keeps groups with some passes and some fails",
    )
    rollout: Rollout = Rollout()
    estimator: Estimator = Estimator()
    loss: Loss = Loss()
    reward: Rewards = Rewards()
    sandbox: Sandbox = Sandbox()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.rollout.denoising_steps > self.rollout.canvas:
            raise ValueError(
                f"rollout.denoising_steps ({self.rollout.denoising_steps}) must not exceed rollout.canvas "
                f"({self.rollout.canvas}): a step that unmasks nothing is wasted"
            )
        if self.cluster.lag and self.rollout.workers == "inline":
            raise ValueError(
                f"cluster.lag={self.cluster.lag} needs rollout workers that run while this process trains: set "
                "rollout.workers to process or ray, or cluster.lag to 0"
            )
        if self.rollout.workers != "inline" and self.cluster.min_workers > self.rollout.num_workers:
            raise ValueError(
                f"cluster.min_workers ({self.cluster.min_workers}) must not exceed rollout.num_workers "
                f"({self.rollout.num_workers})"
            )
        low, high = self.accuracy_range
        if low >= high:
            raise ValueError(f"accuracy_range must be (lo, hi) with lo < hi; got ({low}, {high}); for example [0, 1]")
        if self.group_filter == "accuracy" and all(function.name != "code" for function in self.reward.functions):
            raise ValueError(
                "group_filter=accuracy needs hidden tests, and reward.functions has no 'code'; add it (its weight may "
                "be 0), or use group_filter=zero_std"
            )
        return self


class LikelihoodRecipe(RunRecipe):
    """A run of a stage before RL."""

    stage: Literal["sft", "pretrain"] = Field(description="sft, pretrain: likelihood training; rl: coupled-GRPO")
    fit: Fit = Fit()

    @property
    def fit_micro_batch_size(self) -> int:
        """`fit.micro_batch_size`; if that is 0, a rank's share of the rows of a step, rounded up."""
        return self.fit.micro_batch_size or -(-self.fit.batch_size // self.cluster.trainer_ranks)


AnyRecipe = Recipe | LikelihoodRecipe
"""The recipe of any stage; `stage` distinguishes them."""
STAGES = ("rl", "sft", "pretrain")


def recipe_class(stage: object) -> type[Recipe] | type[LikelihoodRecipe]:
    """The class of the recipes of a stage; an unknown stage gets the RL recipe, whose validation refuses it."""
    return LikelihoodRecipe if stage in ("sft", "pretrain") else Recipe
