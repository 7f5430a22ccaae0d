"""Coupled-GRPO post-training of masked-diffusion language models.

The Python door is two names: `from coupled.rl import Recipe, train`. They are loaded on first use, so that
`import coupled.rl.objective.loss` on a machine that has torch alone does not ask for ray or datasets.
"""

if __name__ != "coupled.rl":
    raise ImportError("import coupled.rl, not rl: the folder is a package of the distribution 'coupled'")

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coupled.rl.recipe.read import load_recipe
    from coupled.rl.recipe.schema import Recipe
    from coupled.rl.train import train

__all__ = ["Recipe", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    import importlib

    home = {"Recipe": "recipe.schema", "load_recipe": "recipe.read", "train": "train"}.get(name)
    if home is None:
        raise AttributeError(f"coupled.rl has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"coupled.rl.{home}"), name)
