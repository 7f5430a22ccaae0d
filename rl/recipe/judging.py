"""The sections of judging: `reward`, `sandbox`, `evaluation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coupled.rl.recipe.section import Positive, Section


class Reward(Section):
    """One reward function and its weight."""

    name: str | None = Field(default=None, description="a built-in reward: code or format")
    path: str | None = Field(default=None, description="file.py:function, a function of the user with TRL's signature")
    weight: float = Field(default=1.0, description="factor in the sum")

    @model_validator(mode="after")
    def _one_source(self) -> Reward:
        if (self.name is None) == (self.path is None):
            raise ValueError(f"a reward has either name or path; got name={self.name!r}, path={self.path!r}")
        return self


class Rewards(Section):
    """The reward of a completion: a weighted sum."""

    functions: tuple[Reward, ...] = Field(
        default=(Reward(name="code", weight=2.0), Reward(name="format", weight=0.5)),
        min_length=1,
        description="summed with their weights; the default is the published reward",
    )
    timeout_seconds: float = Field(default=60.0, gt=0, description="time limit of a user's reward function")
    on_error: Literal["stop", "mask"] = Field(
        default="stop",
        description="if a user's reward function raises, hangs, crashes or returns something other than a score: stop "
        "ends the run, which can be resumed; mask leaves the completions that it fails on out of the update and "
        "reports them",
    )
    allow_weak: bool = Field(
        default=False,
        description="accept tests that share the program's process (tier T2); a program can forge their verdicts",
    )


class Sandbox(Section):
    """Isolation and limits of the programs."""

    tier: Literal["auto", "namespaces", "landlock", "process", "remote"] = Field(
        default="auto",
        description="isolation of the programs: auto: namespaces, or else landlock, if its self-check "
        "passes on this machine; otherwise an error. process: limits only, which do not contain a hostile program; "
        "remote: a SandboxFusion server at url",
    )
    url: str | None = Field(
        default=None, pattern=r"^https?://", description="base address of the server; for tier remote only"
    )
    workers: Literal["inline", "ray"] = Field(
        default="inline", description="inline: jails under this process; ray: a supervisor with jails on every node"
    )
    num_workers: Positive = Field(default=2, description="programs that run at the same time on each node")
    cpu_seconds: Positive = Field(default=2, description="CPU time a program may use, whole seconds")
    wall_seconds: float = Field(default=6.0, gt=0, description="wall-clock time a program may take")
    memory_mb: Positive = Field(default=512, description="address space a program may add, in MiB")

    @model_validator(mode="after")
    def _url_goes_with_remote(self) -> Sandbox:
        if (self.tier == "remote") != (self.url is not None):
            raise ValueError(
                f"sandbox.url goes with sandbox.tier=remote and only with it; got tier={self.tier!r}, url={self.url!r}"
            )
        return self


class Evaluation(Section):
    """Evaluations on held-out problems during a run."""

    every: int = Field(
        default=0, ge=0, description="steps between evaluations during training; 0: only before and after"
    )
    num_problems: Positive = Field(default=200, description="held-out problems, the first of eval_path")
    num_samples: Positive = Field(default=4, description="completions per problem at the rollout temperature")
    has_greedy: bool = Field(default=True, description="also decode each problem once at temperature 0")
