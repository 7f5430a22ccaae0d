"""Finds the checkpoint and the recipe behind a path that a user gives."""

from __future__ import annotations

from pathlib import Path

from coupled.rl.errors import CheckpointError, RecipeError
from coupled.rl.recipe.read import load_sampling_recipe, sampling_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.rl.run_folder.folder import committed_checkpoints, read_run_values


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is; of a run folder, its newest checkpoint.

    Raises:
        CheckpointError: neither.
    """
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    found = committed_checkpoints(path / "checkpoints")
    if found:
        return found[-1]
    raise CheckpointError(f"{path} is neither a checkpoint folder nor a run folder with a checkpoint")


def recipe_for(checkpoint: Path, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe to use a checkpoint with: the one named, or that of the run it lies in.

    Raises:
        RecipeError: neither is there.
    """
    if recipe is not None:
        return load_sampling_recipe(recipe, overrides)
    run = checkpoint.resolve().parent.parent
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{checkpoint} does not lie in a run folder; say how to sample from it with --recipe FILE")
    return sampling_recipe(read_run_values(run), overrides, str(run / "recipe.yaml"), is_saved=True)
