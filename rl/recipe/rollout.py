"""The `rollout` section: the denoising of completions, their number, and the processes that make them."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from coupled.rl.recipe.section import Positive, Section

PARALLEL = ("confidence_threshold", "entropy_bound")
"""Settings with which a step may commit more positions than its schedule."""
ALWAYS_NAMED = ("canvas", "denoising_steps", "temperature", "top_p", "order")
"""Fields that enter the hash of a sampler even at their default values."""


class Sampler(Section):
    """The settings of denoising. Example: 36 positions in 18 steps at temperature 1, lowest entropy first.

    The `rollout` section of a recipe is a sampler with a temperature above 0 and the number of completions.
    """

    canvas: Positive = Field(default=256, description="positions denoised after the prompt, in tokens")
    denoising_steps: Positive = Field(default=256, description="forward passes per completion; at most canvas")
    temperature: float = Field(
        default=1.2,
        ge=0,
        description="temperature of the token distribution; 0 is greedy: the likeliest token, with confidence from the "
        "untempered distribution",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="probability mass of the nucleus; 1 keeps all tokens"
    )
    top_k: int = Field(default=0, ge=0, description="likeliest tokens kept, before top_p; 0 keeps all tokens")
    order: Literal["entropy", "maskgit", "margin", "origin"] = Field(
        default="entropy",
        description="positions that are committed first: lowest entropy, likeliest draw, largest margin, or random",
    )
    block_length: int = Field(
        default=0,
        ge=0,
        description="full attention only: canvas positions of a block, denoised before any later block [LLaDA]; 0: the "
        "whole canvas. Models with block attention have a block length of their own",
    )
    has_early_exit: bool = Field(
        default=True,
        description="true: a completion is done when all positions before its first end token are; false: when its "
        "canvas is",
    )
    entropy_bound: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="bounded: each step also commits the surest tokens while the entropies of all but the last add up "
        "to at most this, in nats [EB-Sampler]; none: the schedule alone",
    )
    end_fill: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="bounded, full attention only: positions after an end token whose likeliest token is an end "
        "token of at least this probability get it at once; none: the schedule alone",
    )
    confidence_threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="approximate: each step also commits every token of at least this probability; none: the "
        "schedule alone",
    )
    cache: Literal["none", "prefix", "dual"] = Field(
        default="none",
        description="approximate, full attention only: keys and values before the block (prefix), or outside of it "
        "(dual), are kept from the last refresh [Fast-dLLM]; none: each step computes all of them",
    )
    refresh_steps: int = Field(
        default=0, ge=0, description="with a cache: steps between refreshes; 0: refreshed only at the start of a block"
    )

    @model_validator(mode="after")
    def _caches_something(self) -> Sampler:
        if self.cache == "dual" and not self.block_length:
            raise ValueError(
                "cache=dual keeps the positions after the block that is denoised, and block_length=0 makes the whole "
                "canvas one block; set a block_length, for example 32, or cache=prefix"
            )
        if self.refresh_steps and self.cache == "none":
            raise ValueError(
                f"refresh_steps={self.refresh_steps} has no effect without a cache; leave it out, or set cache=prefix"
            )
        return self

    @property
    def hash(self) -> str:
        """The sampler's name in logs: equal samplers have equal hashes."""
        fields = Sampler.model_fields
        settings = {name: getattr(self, name) for name in fields}
        named = {k: v for k, v in settings.items() if k in ALWAYS_NAMED or v != fields[k].default}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def is_parallel(self) -> bool:
        """Whether a step may commit more positions than its schedule."""
        return any(getattr(self, name) is not None for name in PARALLEL)

    @property
    def is_exact(self) -> bool:
        """Whether rollouts have the distribution of the plain loop with these steps, order, temperature and nucleus."""
        return not self.is_parallel and self.end_fill is None and self.cache == "none"

    def changed(self, **fields: Any) -> Sampler:
        """A copy with other values of some fields, validated like the original.

        Raises:
            pydantic.ValidationError: a field is unknown, or a value breaks a rule.
        """
        return type(self).model_validate({name: getattr(self, name) for name in type(self).model_fields} | fields)

    def exact(self) -> Sampler:
        """The same sampler without its bounded and approximate parts."""
        return self.changed(confidence_threshold=None, entropy_bound=None, end_fill=None, cache="none", refresh_steps=0)


PRESETS: dict[str, dict[str, Any]] = {
    "rl": {},
    "reference": {"top_p": 0.95, "has_early_exit": False},
    "fast": {"entropy_bound": 0.1, "end_fill": 0.99},
}
"""Settings of each `rollout.preset`; fields that a preset does not name keep their defaults."""
OF_PRESETS = (
    "top_p",
    "has_early_exit",
    "entropy_bound",
    "end_fill",
    "confidence_threshold",
    "cache",
    "refresh_steps",
)
"""Fields of `rollout` that are reset when another preset is chosen."""


class Rollout(Sampler):
    """The completions of a step, and the sampler that makes them."""

    temperature: float = Field(default=1.2, gt=0, description="temperature of the token distribution")
    preset: Literal["rl", "reference", "fast"] = Field(
        default="rl",
        description="rl: exact; reference: the published loop, with its nucleus and to the end of the canvas; fast: "
        "bounded (entropy_bound, end_fill). Fields given in the recipe override the preset",
    )
    num_prompts: Positive = Field(default=16, description="prompts per step")
    group_size: Annotated[int, Field(ge=2)] = Field(default=10, description="completions per prompt, G")
    batch_size: Positive = Field(default=64, description="rows per forward pass, and per call of a worker")
    workers: Literal["inline", "process", "ray"] = Field(
        default="inline",
        description="inline: in this process, on the weights that are trained; process: processes of this host; ray: "
        "actors on this host or on a cluster (cluster.address)",
    )
    num_workers: Positive = Field(default=2, description="rollout workers, when workers is process or ray")
    monitor_every: int = Field(
        default=0,
        ge=0,
        description="steps between comparisons with exact rollouts, from the first step on: a few groups are decoded a "
        "second time; 0: no comparisons",
    )
    on_mismatch: Literal["warn", "fall_back", "stop"] = Field(
        default="warn",
        description="action when the compared rewards differ by more than 0.1 and by more than chance: print a "
        "warning; roll out exactly from the next step on; or end the run",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return PRESETS.get(str(values.get("preset", "rl")), {}) | values

    @property
    def sampler(self) -> Sampler:
        """The sampler alone, without the number and place of the completions."""
        return Sampler(**{name: getattr(self, name) for name in Sampler.model_fields})
