"""The sections `cluster` and `checkpoint`: processes of a run, and the checkpoints that it keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coupled.rl.recipe.section import Positive, Section


class Checkpoint(Section):
    """Frequency and number of checkpoints."""

    every: Positive = Field(default=1, description="steps between checkpoints, and the most that a crash loses")
    keep: Positive = Field(default=2, description="newest checkpoints kept")


class Cluster(Section):
    """The processes of a run: ranks that train, and workers beside them, which may run ahead."""

    trainer_ranks: Positive = Field(
        default=1,
        description="processes that share the updates and the inline rollouts, one per GPU; adapters are replicated, "
        "and all weights (model.adapter=null) are sharded over them",
    )
    trainer_timeout_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="longest wait of a rank for the others; must exceed the time for loading and for the slowest share "
        "of a step",
    )
    trainer_workers: Literal["process", "ray"] = Field(
        default="process",
        description="home of all ranks but the first, which is the run's own process. process: processes of this "
        "host; ray: actors on this host or on a cluster (cluster.address)",
    )
    address: str | None = Field(
        default=None,
        pattern=r"^(auto|[^/:]+:\d+)$",
        description="ip:port of a running Ray cluster, or auto; none: the run starts Ray on this host",
    )
    lag: int = Field(
        default=0,
        ge=0,
        le=2,
        description="training steps that rollouts run ahead; 0: on-policy, rollouts and training take turns",
    )
    max_policy_drift: float = Field(
        default=0.1,
        gt=0,
        description="the lag falls to 0 when the policy has drifted from the one that rolled out by more than this "
        "(KL, nats per token) in two steps in a row",
    )
    min_workers: Positive = Field(
        default=1, description="rollout workers below which the run ends and can be resumed; others may come and go"
    )
    gpus_per_worker: float = Field(default=0.0, ge=0, description="share of GPUs that each Ray rollout actor reserves")
    health: Literal["patient", "fast"] = Field(
        default="patient",
        description="patient: hosts may be silent for a minute, a batch takes minutes; fast: one host or a quiet "
        "network, a batch takes seconds",
    )

    @model_validator(mode="after")
    def _has_other_ranks(self) -> Cluster:
        default = type(self).model_fields["trainer_timeout_seconds"].default
        if self.trainer_ranks == 1 and self.trainer_timeout_seconds != default:
            raise ValueError(
                f"trainer_timeout_seconds={self.trainer_timeout_seconds:g} has no effect with trainer_ranks=1, which "
                "has no other rank to wait for. Leave it out, or raise trainer_ranks"
            )
        if self.trainer_ranks == 1 and self.trainer_workers != "process":
            raise ValueError(
                f"trainer_workers={self.trainer_workers} has no effect with trainer_ranks=1, which is the run's own "
                "process. Leave it out, or raise trainer_ranks"
            )
        return self
