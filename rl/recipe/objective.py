"""The sections of the objective: `estimator`, `loss`, `optimizer`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from coupled.rl.recipe.section import Fraction, Positive, Section, written

READ_BY = {
    "weights": ("coupled", "decoupled"),
    "mask_ratio": ("coupled", "decoupled", "random_mask"),
    "draw": ("coupled", "decoupled", "random_mask"),
    "num_pairs": ("coupled", "decoupled", "random_mask", "espo"),
    "num_nodes": ("gdpo",),
    "shrink": ("trajectory",),
    "num_sampled_steps": ("trajectory",),
}
"""Fields of `Estimator` that only some estimators read, with their readers. All estimators read the other fields."""


class Estimator(Section):
    """The estimate of completions' log-probabilities: see `rl/estimators`."""

    name: Literal["coupled", "decoupled", "full_mask", "random_mask", "espo", "gdpo", "trajectory", "ar_order"] = Field(
        default="coupled",
        description="estimator of a completion's log-probabilities; espo and gdpo score it as a whole, trajectory "
        "replays the rollout's steps, ar_order takes one forward pass per canvas position",
    )
    weights: Literal["paper", "normalized", "antithetic", "unit"] = Field(
        default="paper",
        description="coupled and decoupled only: the published sum; the same with weights that sum to 1; the pairs "
        "alone with 1/t; the pairs alone, each token once",
    )
    mask_ratio: tuple[Fraction, Fraction] = Field(
        default=(0.2, 0.8), description="range of t, symmetric about 1/2; the pair has ratios t and 1 - t"
    )
    draw: Literal["bernoulli", "exact_count"] = Field(
        default="bernoulli",
        description="coupled, decoupled and random_mask only: each token masked with probability t, or exactly a "
        "share t of them (rounded to whole tokens, at least one)",
    )
    num_pairs: Positive = Field(
        default=1,
        description="mask pairs per inner iteration, λ; espo: number of draws; random_mask: half the number of masks",
    )
    num_nodes: Positive = Field(default=3, description="gdpo only: mask ratios of the quadrature, one mask each")
    shrink: Positive = Field(default=1, description="trajectory only: consecutive rollout steps replayed as one")
    num_sampled_steps: int = Field(
        default=0, ge=0, description="trajectory only: steps of a completion that are scored, drawn at random; 0: all"
    )
    prompt_mask_probability: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the prompt's tokens hidden while scoring (d1: 0.15); 0: none"
    )
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="temperature of the scored distribution; none: rollout.temperature, used for sampling",
    )
    post_eos: Literal["kept", "mask", "excluded"] = Field(
        default="kept",
        description="positions after the end token: as the sampler left them; all MASK, so that a group shares its "
        "fully masked pass; or not attended to, as if the canvas ended there",
    )

    @model_validator(mode="after")
    def _symmetric(self) -> Estimator:
        low, high = self.mask_ratio
        if not (0 < low <= high < 1) or abs(low + high - 1) > 1e-9:
            raise ValueError(
                f"mask_ratio must be a range (lo, hi) inside (0, 1) with lo + hi = 1, so that t and 1 - t have the "
                f"same distribution; got ({low}, {high}); for example [0.2, 0.8]"
            )
        return self

    @model_validator(mode="after")
    def _has_no_field_without_effect(self) -> Estimator:
        for field, readers in READ_BY.items():
            value, default = getattr(self, field), type(self).model_fields[field].default
            if self.name not in readers and value != default:
                raise ValueError(
                    f"{field}={written(value)} has no effect with name={self.name}: it is read by "
                    f"{', '.join(readers)}. Leave it out, or set it to its default ({field}={written(default)}), or "
                    "choose another estimator"
                )
        return self


class Loss(Section):
    """The objective of an update: see `rl/objective/loss.py`."""

    objective: Literal["clipped", "likelihood"] = Field(
        default="clipped",
        description="clipped: the clipped ratio to the policy that rolled out; likelihood: the score times its "
        "advantage, without a ratio (wd1: with advantage=softmax, estimator.name=full_mask and kl_beta=0)",
    )
    clip_low: float = Field(default=0.5, ge=0, lt=1, description="ratios below 1 - clip_low are clipped")
    clip_high: float = Field(default=0.5, ge=0, description="ratios above 1 + clip_high are clipped")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="ratios above this are clipped where the advantage is negative, e.g. 3; none: only "
        "max_log_ratio bounds them",
    )
    ratio: Literal["token", "sequence"] = Field(
        default="token", description="a ratio for each token, or their geometric mean for the whole completion"
    )
    norm: Literal["token", "sequence", "fixed"] = Field(
        default="token",
        description="normalisation over the whole batch: all tokens count alike; all completions count alike; or sums "
        "over tokens are divided by the canvas, a constant, instead of by the number of tokens",
    )
    kl: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="estimate of the KL to the reference; the gradient of k1 is zero on average"
    )
    kl_beta: float = Field(default=0.01, ge=0, description="weight of the KL penalty; 0: no reference")
    reference: Literal["frozen", "synced", "old"] = Field(
        default="frozen",
        description="policy that the KL pulls towards: the initial weights (with LoRA the base); a copy that follows "
        "the policy (sync_every, sync_mix); or the policy that rolled out",
    )
    sync_every: Positive = Field(
        default=64,
        description="steps between updates of a synced reference; 1 with a small sync_mix is a moving average",
    )
    sync_mix: Fraction = Field(
        default=0.6, description="share of the policy in an updated reference; the rest is the previous reference"
    )
    negative_weight: Fraction = Field(
        default=1.0,
        description="factor on negative advantages; below 1 because the estimate is a lower bound, whose decrease may "
        "only loosen it",
    )
    max_log_ratio: float = Field(
        default=5.0, gt=0, description="log-ratios are clamped to ± this: k3 is exponential in them"
    )

    @model_validator(mode="after")
    def _clips_a_ratio(self) -> Loss:
        for field in ("clip_low", "clip_high", "dual_clip", "ratio"):
            value, default = getattr(self, field), type(self).model_fields[field].default
            if self.objective == "likelihood" and value != default:
                raise ValueError(
                    f"{field}={written(value)} has no effect with objective=likelihood, which has no ratio. Leave it "
                    f"out, or set it to its default ({field}={written(default)}), or use objective=clipped"
                )
        return self

    @property
    def has_old(self) -> bool:
        """Whether the scores of the policy that rolled out enter the loss."""
        return self.objective == "clipped" or (self.kl_beta > 0 and self.reference == "old")


class Optimizer(Section):
    """AdamW, its schedule, and the micro-batches of the backward pass."""

    learning_rate: float = Field(default=1e-6, gt=0, description="peak learning rate of AdamW")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear rise from 0")
    final_fraction: Fraction = Field(
        default=0.1,
        description="learning rate at the end of the cosine that follows the warm-up, as a share of the peak; 1 keeps "
        "the peak",
    )
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.99), description="AdamW moment decays")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay; 0: none")
    max_grad_norm: float = Field(default=0.2, gt=0, description="gradients are scaled down to this global norm")
    micro_batch_size: Positive = Field(
        default=16,
        description="rows per backward pass; the gradient does not depend on it. With a multiple of "
        "rollout.group_size whole groups share their fully masked pass",
    )
    has_two_passes: bool = Field(
        default=False,
        description="score without gradients first, then backpropagate one masked input at a time: the memory of one "
        "masked input, whatever the estimator, for one more forward pass",
    )
    has_gradient_checkpointing: bool = Field(
        default=False,
        description="keep only the inputs of the layers and recompute the rest in the backward pass: less memory, for "
        "one more forward pass",
    )
