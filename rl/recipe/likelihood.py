"""The `fit` section of the stages before RL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coupled.rl.recipe.section import Fraction, Positive, Section


class Fit(Section):
    """The objective and the rows of likelihood training (`stage: pretrain` and `stage: sft`)."""

    objective: Literal["masked_diffusion", "autoregressive", "causal_diffusion", "block_diffusion"] | None = Field(
        default=None,
        description="masked diffusion with weight 1/t; next-token prediction; masked diffusion that reads only "
        "positions to the left; or block by block, each with its own t. The saved model keeps the attention it was "
        "trained with; none: block_diffusion for a model that attends in blocks, else masked_diffusion",
    )
    block_length: int = Field(
        default=0, ge=0, description="block_diffusion only: positions of a block, B; 0: the model's, or else 4"
    )
    batch_size: Positive = Field(default=64, description="rows per optimizer step")
    micro_batch_size: int = Field(
        default=0,
        ge=0,
        description="rows per backward pass; the gradient does not depend on it; 0: all rows of a step at once; with "
        "several trainer ranks, the share of each rank",
    )
    canvas: Positive = Field(
        default=256, description="response positions of a row that holds one sample, in tokens; longer ones are skipped"
    )
    context: int = Field(
        default=0,
        ge=0,
        description="positions of a row that packs several samples, in tokens. The samples do not attend to each "
        "other; longer samples are skipped, and plain text is cut; 0: one sample a row",
    )
    random_length: Fraction = Field(
        default=0.0, description="share of packed rows of plain text that end at a random length (LLaDA: 0.01)"
    )
    end_tokens: tuple[Positive, Positive] = Field(
        default=(1, 1), description="number of end tokens after a response, drawn from this range for each sample"
    )
    mask_ratio: tuple[Fraction, Fraction] = Field(default=(0.001, 1.0), description="range of t, uniform")
    noise_warmup_steps: int = Field(
        default=0,
        ge=0,
        description="steps in which t is drawn below a cap that rises from 0.001 to 1, without loss weights; 0: none",
    )
    clipped_noise: Literal["none", "paper", "exact"] = Field(
        default="none",
        description="block_diffusion only: t is at least 1/B and every block has a mask; weight 1/t as published, or "
        "the inverse of a position's true chance of being masked",
    )
    attention_anneal_steps: int = Field(
        default=0,
        ge=0,
        description="masked_diffusion only: steps in which causal attention becomes full attention; 0: full at once",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Fit:
        for name in ("mask_ratio", "end_tokens"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"fit.{name} must be a range (lo, hi) with lo <= hi; got ({low}, {high})")
        if self.clipped_noise != "none" and self.objective not in (None, "block_diffusion"):
            raise ValueError(
                f"fit.clipped_noise needs blocks, that is fit.objective=block_diffusion; got {self.objective!r}"
            )
        if self.attention_anneal_steps and self.objective not in (None, "masked_diffusion"):
            raise ValueError(
                "fit.attention_anneal_steps ends in full attention and needs fit.objective=masked_diffusion; got "
                f"{self.objective!r}"
            )
        if self.random_length and not self.context:
            raise ValueError("fit.random_length cuts packed rows; set their length, for example fit.context=4096")
        return self
