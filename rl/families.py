"""Model families as data: which transformers class, which logit shift, which attention.

A family is not a modelling file: the classes of transformers reproduce the published modelling code once attention is
told to look both ways. What differs is written here as numbers and names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from coupled.rl.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the project must know of a diffusion language model besides its weights."""

    name: str
    model_type: str
    """The transformers architecture that computes it."""
    shift: int
    """1: position p is predicted from the hidden state at p - 1 (Dream, DiffuCoder). 0: at p itself (LLaDA)."""


FAMILIES = {
    family.name: family
    for family in (
        Family(name="dream", model_type="qwen2", shift=1),  # Dream, DiffuCoder, and the embedded model
    )
}


def family_of(config: dict[str, Any], *, name: str | None = None, shift: int | None = None) -> Family:
    """The family of a checkpoint, from its own `config.json` or from what the recipe says.

    A checkpoint saved by this project carries `diffusion: {family, shift}`. Otherwise `model_type` decides.

    Raises:
        CheckpointError: the checkpoint is not a diffusion model that is known here.
    """
    stated = config.get("diffusion") or {}
    chosen = name or stated.get("family") or {"Dream": "dream"}.get(str(config.get("model_type")))
    if chosen is None:
        raise CheckpointError(
            f"the checkpoint does not say which diffusion family it is of (model_type {config.get('model_type')!r}); "
            f"set model.family in the recipe to one of: {', '.join(FAMILIES)}"
        )
    if chosen not in FAMILIES:
        raise CheckpointError(f"unknown model family {chosen!r}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[chosen]
    chosen_shift = stated.get("shift", family.shift) if shift is None else shift
    return replace(family, shift=chosen_shift)
