"""Held-out evaluation: pass@1 with confidence intervals, and the table that compares before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from coupled.reward import Judgement, Status, Task
from coupled.rl.data.prompts import encode_prompts
from coupled.rl.data.tasks import load_tasks
from coupled.rl.errors import CoupledError, DataError
from coupled.rl.evaluation.statistics import Interval, bootstrap
from coupled.rl.judging.grader import Grader
from coupled.rl.judging.open import open_grader
from coupled.rl.model.open import open_policy, use_threads
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import RolloutEngine, policy_engine
from coupled.rl.rollout.sampler import Request
from coupled.rl.run_folder.find import find_checkpoint, recipe_for
from coupled.rl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRates:
    """Pass@1 of one decoding setting: the share of a problem's completions that pass all its hidden tests."""

    temperature: float
    num_samples: int
    uids: tuple[str, ...]
    rates: tuple[float, ...]
    """One per problem."""

    @property
    def pass_at_1(self) -> Interval:
        return bootstrap(self.rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out results of one version of the weights. `greedy` is None when the recipe omits it."""

    step: int
    sampled: PassRates
    greedy: PassRates | None

    def headline(self) -> str:
        """One line. Example: `sampled 24.2 [20.7, 27.8]  greedy 41.3 [35.7, 47.0]`, in per cent."""
        greedy = "" if self.greedy is None else f"  greedy {self.greedy.pass_at_1}"
        return f"sampled {self.sampled.pass_at_1}{greedy}"

    def to_row(self) -> dict[str, Any]:
        """The record as plain values, for evaluation.jsonl."""
        row = asdict(self)
        for kind in ("sampled", "greedy"):
            if row[kind] is not None:
                row[kind]["pass_at_1"] = asdict(getattr(self, kind).pass_at_1)
        return row

    @staticmethod
    def from_row(row: dict[str, Any]) -> Evaluation:
        """Restore a record from its row: the inverse of `to_row`."""

        def rates(part: dict[str, Any] | None) -> PassRates | None:
            if part is None:
                return None
            return PassRates(
                temperature=part["temperature"],
                num_samples=part["num_samples"],
                uids=tuple(part["uids"]),
                rates=tuple(part["rates"]),
            )

        sampled = rates(row["sampled"])
        assert sampled is not None, "every evaluation samples"
        return Evaluation(step=row["step"], sampled=sampled, greedy=rates(row["greedy"]))


def paired_gain(before: PassRates, after: PassRates) -> Interval:
    """after - before with its 95 % interval, paired by problem, so that the problems' difficulty cancels.

    Raises:
        CoupledError: the two are measured on different problems.
    """
    if before.uids != after.uids:
        raise CoupledError("a paired comparison needs the same problems in the same order on both sides")
    return bootstrap(np.subtract(after.rates, before.rates).tolist())


def is_pass(judgement: Judgement) -> bool:
    """True when there are hidden tests and all of them passed."""
    return len(judgement.per_test) > 0 and all(judgement.per_test)


def evaluate(
    engine: RolloutEngine, grader: Grader, prompts: Sequence[Prompt], recipe: Recipe, *, step: int
) -> Evaluation:
    """Sample and greedily decode held-out problems under the engine's weights, and run every program.

    The random numbers depend on problem and sample, not on the step: before and after are compared on the same
    draws.
    """
    sampler = recipe.rollout.sampler
    greedy = None
    if recipe.evaluation.has_greedy:
        greedy = _pass_rates(
            engine, grader, prompts, sampler.changed(temperature=0.0, top_p=1.0, top_k=0), 1, recipe.seed
        )
    sampled = _pass_rates(engine, grader, prompts, sampler, recipe.evaluation.num_samples, recipe.seed)
    return Evaluation(step=step, sampled=sampled, greedy=greedy)


def comparison_table(before: Evaluation, after: Evaluation) -> Table:
    """Table of held-out pass@1 before and after, in per cent with 95 % intervals."""
    rates = before.sampled
    title = f"held-out pass@1, % [95 % interval]: {len(rates.rates)} problems, {rates.num_samples} samples each"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("before", "after", "gain"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, old, new in (
        (f"sampled, T = {rates.temperature:g}", before.sampled, after.sampled),
        ("greedy", before.greedy, after.greedy),
    ):
        if old is not None and new is not None:
            gain = paired_gain(old, new)
            signed = ("+" if gain.mean >= 0 else "") + str(gain)
            table.add_row(name, str(old.pass_at_1), str(new.pass_at_1), signed)
    return table


def _pass_rates(
    engine: RolloutEngine,
    grader: Grader,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    num_samples: int,
    seed: int,
) -> PassRates:
    requests = [
        Request(uid=f"evaluation/{p.task.uid}/{sample}", prompt_ids=p.token_ids)
        for p in prompts
        for sample in range(num_samples)
    ]
    rollouts = engine.generate(requests, sampler, seed=seed)
    tasks: list[Task] = [p.task for p in prompts for _ in range(num_samples)]
    judgements = grader.judge(tasks, [r.text for r in rollouts])
    # A completion that the sandbox could not judge is no evidence: it is left out of its problem's mean.
    passes = np.array([np.nan if j.status is Status.INFRA else float(is_pass(j)) for j in judgements])
    by_problem = passes.reshape(len(prompts), num_samples)
    if np.isnan(by_problem).all(-1).any():
        raise CoupledError(
            f"the sandbox could not run {int(np.isnan(passes).sum())} of {len(passes)} programs, among them all of "
            "one problem: the machine is overloaded. Raise sandbox.wall_seconds or lower sandbox.num_workers"
        )
    rates = np.nanmean(by_problem, -1)
    return PassRates(
        temperature=sampler.temperature,
        num_samples=num_samples,
        uids=tuple(p.task.uid for p in prompts),
        rates=tuple(rates.tolist()),
    )


def evaluate_checkpoint(path: Path, recipe: str | None, overrides: tuple[str, ...] = ()) -> Evaluation:
    """Pass@1 of a checkpoint on the held-out problems of the recipe.

    Raises:
        CoupledError: no checkpoint, no recipe, or a recipe without `data.eval_path`.
    """
    checkpoint = find_checkpoint(path)
    chosen = recipe_for(checkpoint, recipe, overrides)
    if chosen.data.eval_path is None:
        raise DataError("the recipe names no held-out problems; add data.eval_path=FILE")
    use_threads(chosen)
    model = chosen.model.model_copy(update={"path": str(checkpoint), "init": "checkpoint", "adapter": None})
    policy = open_policy(model, chosen.seed)
    tasks = load_tasks(chosen.data, chosen.data.eval_path, allow_weak=chosen.reward.allow_weak)
    prompts = encode_prompts(tasks, policy.tokenizer, chosen.data.max_prompt_tokens)
    engine = policy_engine(policy, chosen.rollout.batch_size)
    prompts = prompts[: chosen.evaluation.num_problems]
    grader = open_grader(chosen, [prompt.task for prompt in prompts])
    try:
        return evaluate(engine, grader, prompts, chosen, step=0)
    finally:
        grader.close()
