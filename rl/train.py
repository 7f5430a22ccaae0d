"""Coupled-GRPO, top to bottom.

Each step: roll out a group of completions per prompt, execute every program, compare each reward with the rewards of
its group, score the completions under complementary mask pairs, and take a few clipped steps on the same draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coupled.rl.estimators.draw import draw_masks
from coupled.rl.evaluation.held_out import Evaluation
from coupled.rl.recipe.schema import Recipe
from coupled.rl.run import open_run


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Folder of the run, last checkpoint, and held-out results before and after (None without held-out problems)."""

    path: Path
    checkpoint: Path
    before: Evaluation | None
    after: Evaluation | None


def train(recipe: Recipe, resume: str = "never") -> TrainResult:
    """Post-train a diffusion language model with coupled-GRPO.

    Args:
        recipe: all settings of the run.
        resume: `never` starts a new run folder, `auto` continues the newest of this recipe, a path continues that one.

    Raises:
        CoupledError: the user's input is not usable; results computed so far are kept.
    """
    with open_run(recipe, resume) as run:
        run.check_parity()
        before = run.evaluate(0)
        for step in run.steps():
            groups = run.informative(step, run.rollouts(step))
            if groups:
                batch = run.collate(groups)
                # Drawn once, and shared by old, reference and new: scores then differ by policy, not by masks.
                draws = [
                    draw_masks(batch, recipe.estimator, (recipe.seed, "mask", step, inner))
                    for inner in range(recipe.num_updates)
                ]
                # All anchors before the first update: `old` is the policy that rolled out.
                anchors = [run.anchor(batch, masks, is_first=inner == 0) for inner, masks in enumerate(draws)]
                for masks, anchor in zip(draws, anchors, strict=True):
                    run.update(step, batch, masks, anchor)
            run.sync_reference(step)
            run.sync_weights(step)
            run.log(step)
            run.evaluate_if_due(step)
            run.commit_if_due(step)
        after = run.evaluate(recipe.num_steps)
        checkpoint = run.folder.latest()
        assert checkpoint is not None, "the last step always commits"
        return TrainResult(path=run.folder.path, checkpoint=checkpoint, before=before, after=after)
