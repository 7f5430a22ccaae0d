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
    block_length: int | None = None
    """None: every position sees all of its sequence. B: its own block of B and all earlier blocks, counted from the
    first token of the prompt; blocks of 1 are causal attention."""

    def stated(self) -> dict[str, str | int]:
        """What a saved configuration says of it, so that the checkpoint is opened without being told again."""
        stated: dict[str, str | int] = {"family": self.name, "shift": self.shift}
        return stated if self.block_length is None else {**stated, "block_length": self.block_length}


FAMILIES = {
    family.name: family
    for family in (
        Family(name="dream", model_type="qwen2", shift=1),  # Dream, DiffuCoder, and the embedded model
        # Autoregressive models, to be adapted.
        Family(name="qwen2", model_type="qwen2", shift=1),
        Family(name="llama", model_type="llama", shift=1),
    )
}


def family_of(config: dict[str, Any], *, name: str | None = None, shift: int | None = None) -> Family:
    """The family of a checkpoint, from its own `config.json` or from what the recipe says.

    A checkpoint saved by this project carries `diffusion: {family, shift}`, and `block_length` where attention goes by
    blocks. Otherwise `model_type` decides.

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
    return replace(
        family,
        shift=chosen_shift,
        block_length=stated.get("block_length", family.block_length),
    )
