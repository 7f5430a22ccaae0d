"""Finds the checkpoint and the recipe behind a path that a user gives."""

from __future__ import annotations

from pathlib import Path

from coupled.rl.errors import CheckpointError, RecipeError
from coupled.rl.recipe.read import load_sampling_recipe, sampling_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.rl.run_folder.folder import committed_checkpoints, read_run_values


def find_checkpoint(path: Path) -> Path:
    """The path itself if it is a checkpoint folder, or the newest checkpoint of a run folder.

    Raises:
        CheckpointError: the path is neither.
    """
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    found = committed_checkpoints(path / "checkpoints")
    if found:
        return found[-1]
    raise CheckpointError(f"{path} is neither a checkpoint folder nor a run folder with a checkpoint")


def recipe_for(checkpoint: Path, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe to use a checkpoint with: the named one, or the recipe of the run that contains the checkpoint.

    Raises:
        RecipeError: no recipe is named, and the checkpoint is not in a run folder.
    """
    if recipe is not None:
        return load_sampling_recipe(recipe, overrides)
    run = checkpoint.resolve().parent.parent
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{checkpoint} is not in a run folder; name the recipe to sample with: --recipe FILE")
    return sampling_recipe(read_run_values(run), overrides, str(run / "recipe.yaml"), is_saved=True)
