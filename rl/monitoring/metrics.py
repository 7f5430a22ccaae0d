"""Metrics of a step, computed over the batch that was optimised. Comments give the units."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coupled.reward import Status
from coupled.rl.cluster.types import Counters
from coupled.rl.objective.advantage import GroupFilter
from coupled.rl.objective.batch import rewards_of
from coupled.rl.shapes import Float
from coupled.rl.types import Group
from coupled.sandbox import CacheStatistics


class StepMetrics:
    """Collects the metrics of a step's parts; `row` is the row to log."""

    def __init__(self) -> None:
        self._row: dict[str, float] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._updates: list[dict[str, float]] = []
        self._tokens = 0
        self._started = time.perf_counter()

    def add_seconds(self, part: str, seconds: float) -> None:
        """Wall-clock time of a part of the step."""
        self._seconds[part] += seconds

    def of_groups(self, groups: Sequence[Group]) -> None:
        """Rewards and completions."""
        verdicts = [v for g in groups for v in g.verdicts]
        rollouts = [r for g in groups for r in g.rollouts]
        scored = [v for v in verdicts if v.score is not None]
        self._row["reward"] = float(np.mean([v.score for v in scored])) if scored else float("nan")
        for part in sorted({name for v in scored for name in v.parts}):
            self._row[f"reward/{part}"] = float(np.mean([v.parts[part] for v in scored if part in v.parts]))
        judged = [v for v in verdicts if v.status is not Status.INFRA]
        passed = [v.total > 0 and v.passed == v.total for v in judged]
        self._row["pass_rate"] = float(np.mean(passed)) if judged else float("nan")
        # Share of verdicts that the programs could have forged.
        self._row["weak_verdicts"] = float(np.mean([v.tier == "T2" for v in judged])) if judged else float("nan")
        self._row["unscored"] = float(len(verdicts) - len(scored))  # completions without a verdict
        lengths = np.array([r.completion_length for r in rollouts])
        self._row["completion_length"] = float(lengths.mean())  # tokens, end token included
        self._row["end_rate"] = float(np.mean([r.finish_reason == "end" for r in rollouts]))
        entropies = [r.commit_entropy[: r.completion_length].mean() for r in rollouts]
        self._row["entropy"] = float(np.mean(entropies))  # nats per token, when committed
        self._row["num_forwards"] = float(np.mean([r.num_forwards for r in rollouts]))  # per completion
        distinct = [len({r.text for r in g.rollouts}) / len(g.rollouts) for g in groups]
        self._row["group_diversity"] = float(np.mean(distinct))  # distinct completions / G
        rewards = rewards_of(groups)
        spreads = [row[~row.isnan()].std().item() for row in rewards if (~row.isnan()).sum() > 1]
        self._row["reward_std"] = float(np.mean(spreads)) if spreads else 0.0  # within a group
        self._tokens = int(lengths.sum())

    def of_bounds(self, groups: Sequence[Group]) -> None:
        """Bounds on the cost of committing several tokens at once, per completion; logged only in bounded modes."""
        rollouts = [r for g in groups for r in g.rollouts]
        self._row["kl_bound"] = float(np.mean([r.kl_bound for r in rollouts]))  # nats
        self._row["fill_bound"] = float(np.mean([r.fill_bound for r in rollouts]))  # probability

    def add(self, row: dict[str, float]) -> None:
        """Metrics that their source has named."""
        self._row |= row

    def of_cache(self, before: CacheStatistics, after: CacheStatistics) -> None:
        """Use of the sandbox's cache during the step."""
        num_jobs = after.num_jobs - before.num_jobs
        # Share of the programs that were not run again.
        self._row["cache/hit_rate"] = (after.num_hits - before.num_hits) / num_jobs if num_jobs else 0.0

    def of_filter(self, found: GroupFilter) -> None:
        """Groups that are rolled out and not trained on; logged only with a filter."""
        self._row["dropped_groups"] = float((~found.is_kept).sum())
        self._row["dropped_groups/too_hard"] = float(found.is_too_hard.sum())
        self._row["dropped_groups/too_easy"] = float(found.is_too_easy.sum())

    def of_advantages(self, advantages: Float[Tensor, "P G"]) -> None:
        """Share of groups whose advantages are all 0."""
        self._row["zero_advantage_groups"] = float((advantages.abs().amax(-1) == 0).float().mean())

    def of_update(self, sums: dict[str, float], grad_norm: float, rate: float) -> None:
        """Sums over an update's micro-batches; divided here by the tokens of the update."""
        tokens = max(1.0, sums.get("tokens", 0.0))
        of_ratios = {"ratio": "ratio", "clip_low": "clip_fraction_low", "clip_high": "clip_fraction_high"}
        update = {
            "loss": sums.get("loss", 0.0),
            "kl": sums.get("kl", 0.0) / tokens,  # as loss.kl estimates it, nats per token
            # Absent where the objective has no ratio.
            **{of_ratios[name]: sums[name] / tokens for name in of_ratios if name in sums},
            "grad_norm": grad_norm,  # before clipping
            "learning_rate": rate,
        }
        if "clip_dual" in sums:  # only with loss.dual_clip
            update["clip_fraction_dual"] = sums["clip_dual"] / tokens
        self._updates.append(update)

    def of_cluster(self, counters: Counters, staleness: int) -> None:
        """Work of the coordinator; logged only if workers are outside of this process."""
        self._row["cluster/staleness"] = float(staleness)  # training steps by which the rollouts' weights were behind
        self._row["cluster/redispatched"] = float(counters.num_redispatched)  # batches retried
        self._row["cluster/hedged"] = float(counters.num_hedged)  # batches also given to a second worker
        self._row["cluster/duplicates"] = float(counters.num_duplicates)  # results that came second and were dropped
        self._row["cluster/quarantined"] = float(counters.num_quarantined)  # batches that ended three workers
        self._row["cluster/lost_workers"] = float(counters.num_lost_workers)
        present = counters.present_seconds.get("roll", 0.0)
        busy = counters.busy_seconds.get("roll", 0.0)
        self._row["cluster/rollout_idle"] = 1 - busy / present if present else 0.0  # share of the workers' time

    def of_failed_saves(self, number: int) -> None:
        """Failed saves in a row; absent after a successful save."""
        self._row["failed_saves"] = float(number)

    def of_policy_drift(self, drift: float) -> None:
        """KL of the policy to the one that rolled out, nats per token; logged only if rollouts ran ahead."""
        self._row["cluster/policy_drift"] = drift

    def row(self) -> dict[str, float]:
        """Name → number; updates are averaged over the inner iterations."""
        row = dict(self._row)
        if self._updates:
            row |= {name: float(np.mean([u[name] for u in self._updates])) for name in self._updates[0]}
        row |= {f"time/{part}_seconds": seconds for part, seconds in self._seconds.items()}
        total = sum(self._seconds.values())
        if "cluster/rollout_idle" in row and total:
            row["cluster/trainer_idle"] = self._seconds.get("rollout", 0.0) / total  # share of the step
        row["time/step_seconds"] = total
        # Collating and logging are in none of the parts. Evaluations and checkpoints come after the row.
        row["time/other_seconds"] = max(0.0, time.perf_counter() - self._started - total)
        row["tokens_per_second"] = self._tokens / total if total else 0.0  # completion tokens trained on
        if torch.cuda.is_available():
            row["memory/gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        return row

    def headline(self) -> dict[str, float]:
        """The numbers of the progress display, by label."""
        row = self.row()
        shown = {
            "reward": "reward",
            "pass": "pass_rate",
            "kl": "kl",
            "tok/s": "tokens_per_second",
            "s/step": "time/step_seconds",
        }
        return {label: row[name] for label, name in shown.items() if name in row}


DETERMINISTIC_EXCEPT = ("time/", "memory/", "cache/", "cluster/", "tokens_per_second")
"""Metrics that start with one of these depend on the machine or the process; all others are equal in a resumed run."""
