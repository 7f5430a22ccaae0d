"""A run owns what training needs: learner (policy, reference, optimizer), engine, sandbox, tasks and the run folder.

`train` reads as the algorithm because the handling of resources, clocks and files is here.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from coupled.reward import RewardError, Status, Task
from coupled.rl.data.order import rows_of_step
from coupled.rl.data.prompts import encode_prompts
from coupled.rl.data.tasks import load_tasks
from coupled.rl.errors import DataError, RecipeError, RolloutError, SaveError
from coupled.rl.evaluation.held_out import Evaluation, evaluate
from coupled.rl.judging.grader import Grader
from coupled.rl.judging.open import open_grader
from coupled.rl.model.open import open_policy, use_threads
from coupled.rl.model.policy import Policy
from coupled.rl.monitoring.events import EventLog
from coupled.rl.monitoring.metrics import StepMetrics
from coupled.rl.monitoring.progress import Progress
from coupled.rl.monitoring.watchdog import PATIENCE_WITH_FILES, Watchdog, stall_seconds
from coupled.rl.objective.advantage import filter_groups, group_advantages
from coupled.rl.objective.batch import collate, passes_of, refuse_identical_groups, rewards_of
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.exactness import NUM_COMPARED, TOLERANCE, compare, exact_counterpart
from coupled.rl.rollout.open import open_engine
from coupled.rl.rollout.parity import prompts_to_check, sampler_for_parity
from coupled.rl.rollout.sampler import Request
from coupled.rl.rollout.workers import ClusterEngine
from coupled.rl.run_folder.folder import RunFolder, open_run_folder
from coupled.rl.run_folder.rollout_log import write_rollouts
from coupled.rl.trainer.checkpoint import read_carried, write_carried
from coupled.rl.trainer.open import open_rl_learner
from coupled.rl.trainer.rank_group import RankGroup
from coupled.rl.trainer.rl_learner import RLLearner
from coupled.rl.types import Anchor, Group, MaskDraw, Prompt, Rollout, TrainBatch
from coupled.sandbox import CacheStatistics

MAX_BLIND_STEPS = 3
"""Steps in a row without a single score before the run ends: nothing is learned from them."""
MAX_FAILED_SAVES = 5
"""Checkpoints in a row that cannot be written before the run ends: what it computes would be lost."""


class Run:
    """Everything of one RL run. Use `open_run`, as a context manager."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        grader: Grader,
        folder: RunFolder,
        engine: ClusterEngine,
        learner: RLLearner | RankGroup | None = None,
        events: EventLog | None = None,
    ) -> None:
        self.recipe = recipe
        self.policy = policy
        self.folder = folder
        self._prompts = prompts
        self._held_out = held_out
        self._grader = grader
        self._engine = engine
        self.learner = RLLearner(recipe, policy) if learner is None else learner
        self._events = events or EventLog()
        self._watchdog = Watchdog(stall_seconds(recipe.cluster), folder.path, state=engine.oldest)
        self._events.on_result = self.policy.on_pass = self._watchdog.moved
        self._version = 0
        """Of the weights that rolled out the step under way."""
        self._staleness = 0
        """Training steps between those and the weights that are there; 0 is on-policy."""
        self._num_mismatched = 0
        self._num_failed_saves = 0
        self._num_blind = 0
        self._metrics = StepMetrics()
        self._progress: Progress | None = None
        self._console = Console(soft_wrap=True)
        self._cache = CacheStatistics()
        self._tasks: dict[str, Task] = {}
        """Of the completions that are asked for, by their uid."""
        self._done = 0
        self._under_way: dict[int, int] = {}
        """Steps that were begun before the run was interrupted, and the version of their weights."""
        if (latest := folder.latest()) is not None:
            state = self.learner.read(latest)
            self._done = int(state["step"])
            self._under_way = self._restore(latest, state)
        folder.forget_after(self._done)
        self._sampler = recipe.rollout.sampler
        if any("mismatch/fell_back" in row for row in folder.rows()):
            self._sampler = self._sampler.exact()
        engine.load_weights(self.learner, self._done)

    def __enter__(self) -> Run:
        self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.close()
        self._engine.close()
        self.learner.close()
        self._grader.close()
        self._events.close()
        self.folder.close()

    def steps(self) -> Iterator[int]:
        """The steps still to do, 1 … num_steps, with the progress display around them."""
        title = f"coupled-GRPO {self.folder.path}"
        self._engine.begin(
            self._requests_of,
            lambda: self._sampler,
            seed=self.recipe.seed,
            num_trained=self._done,
            num_steps=self.recipe.num_steps,
            versions=self._under_way,
            on_rolled=self._begin_to_judge,
        )
        with Progress(self.recipe.num_steps, self._done, title=title, console=self._console) as self._progress:
            for step in range(self._done + 1, self.recipe.num_steps + 1):
                self._metrics = StepMetrics()
                yield step

    def check_parity(self) -> None:
        """Refuse to train when scoring does not give rollouts the log-probabilities they were drawn with.

        A few rows, once, before anything is trained or evaluated. Resumed runs are checked, too: the engine's weights
        then came out of a checkpoint.
        """
        recipe = self.recipe
        if self._done >= recipe.num_steps:
            return
        prompts = prompts_to_check(self._prompts)
        requests = [Request(uid=f"parity/{i}-{p.task.uid}", prompt_ids=p.token_ids) for i, p in enumerate(prompts)]
        made = self._engine.generate(
            requests, sampler_for_parity(recipe.rollout.sampler, self.policy.family.block_length), seed=recipe.seed
        )
        found = self.learner.check_parity(prompts, made)
        self._console.print(
            f"scoring agrees with {len(made)} replayed rollouts within {found:.1g} nats", highlight=False
        )

    def rollouts(self, step: int) -> list[Group]:
        """Denoise a group of completions per prompt of the step, and have every program executed and scored."""
        prompts = self._prompts_of(step)
        with self._clock("rollout"):
            found = self._engine.rollouts(step)
        uids = [
            [self._uid(step, place, prompt, sample) for sample in self._samples] for place, prompt in enumerate(prompts)
        ]
        whole = [place for place in range(len(prompts)) if all(uid in found for uid in uids[place])]
        if len(whole) < len(prompts):
            lost = ", ".join(prompts[place].task.uid for place in range(len(prompts)) if place not in whole)
            self._console.print(
                f"step {step}: no rollouts of {lost}, see events.jsonl; they are left out", highlight=False
            )
        if not whole:
            raise RolloutError(
                f"step {step} has no prompt all of whose completions could be made; events.jsonl says what ended the "
                "workers. Look at the memory they have; lower rollout.batch_size"
            )
        prompts = [prompts[place] for place in whole]
        made = [found[uid] for place in whole for uid in uids[place]]
        self._version = made[0].weight_version
        self._staleness = step - 1 - self._version
        with self._clock("sandbox"):
            groups = self._judge(step, prompts, made, has_begun=True)
        asked = [uid for of_group in uids for uid in of_group]
        self._grader.forget(asked)
        for uid in asked:
            del self._tasks[uid]
        before, self._cache = self._cache, self._grader.cache_statistics()
        self._metrics.of_cache(before, self._cache)
        try:
            write_rollouts(self.folder.path, step, groups)
        except OSError as error:
            self._console.print(f"alarm: the rollouts of step {step} are not written ({error})", highlight=False)
        refuse_identical_groups(groups)
        self._metrics.of_groups(groups)
        self._watch_scores(step, groups)
        if not self._sampler.is_exact:
            self._metrics.of_bounds(groups)
        self._compare_with_exact(step, prompts, groups)
        return groups

    def _watch_scores(self, step: int, groups: Sequence[Group]) -> None:
        """Say why completions that should have a score have none.

        Raises:
            RolloutError: time after time none of them has one.
        """
        verdicts = [verdict for group in groups for verdict in group.verdicts]
        failed = [verdict for verdict in verdicts if verdict.status is Status.INFRA]
        if failed:
            why = failed[0].detail or failed[0].outcome
            self._events.tell("unscored", step=step, completions=len(failed), why=why[:500])
            self._console.print(
                f"alarm: step {step}: {len(failed)} of {len(verdicts)} completions have no score and are left out: "
                f"{why}",
                highlight=False,
                markup=False,
            )
        self._num_blind = self._num_blind + 1 if all(verdict.score is None for verdict in verdicts) else 0
        if self._num_blind >= MAX_BLIND_STEPS:
            raise RolloutError(
                f"in {self._num_blind} steps running, to step {step}, not one completion has a score, so nothing is "
                "learned. Look at the reward functions and the sandbox: `coupled doctor`, `coupled sandbox run`; then "
                f"continue with resume={self.folder.path}"
            )

    def _compare_with_exact(self, step: int, prompts: Sequence[Prompt], groups: Sequence[Group]) -> None:
        """Decode some groups of the step again, exactly, where that is due, and do what the recipe says of a mismatch.

        Raises:
            RolloutError: there is one, and the recipe wants to stop.
        """
        rollout = self.recipe.rollout
        if not rollout.monitor_every or (step - 1) % rollout.monitor_every or self._sampler.is_exact:
            return
        some = groups[:NUM_COMPARED]
        requests = [Request(uid=r.uid, prompt_ids=r.prompt_ids) for group in some for r in group.rollouts]
        with self._clock("monitor"):
            made = self._engine.generate(requests, exact_counterpart(self._sampler), seed=self.recipe.seed)
            found = compare(some, self._judge(step, prompts[: len(some)], made))
        self._metrics.add(found.row())
        if not found.is_beyond(TOLERANCE):
            return
        text = f"step {step}: rollouts differ from exact ones by more than chance: {found}"
        if rollout.on_mismatch == "stop":
            raise RolloutError(
                f"{text}. rollout.on_mismatch is stop: lower rollout.entropy_bound, raise rollout.end_fill, "
                "refresh the cache more often, or roll out exactly (rollout.preset=rl)"
            )
        if rollout.on_mismatch == "fall_back":
            self._sampler = self._sampler.exact()
            self._metrics.add({"mismatch/fell_back": 1.0})
            text += "; exact from the next step on"
        self._console.print(text, highlight=False)

    def informative(self, step: int, groups: Sequence[Group]) -> list[Group]:
        """The groups that the recipe's filter keeps; none at all when the step has nothing to teach."""
        recipe = self.recipe
        found = filter_groups(rewards_of(groups), passes_of(groups), recipe.group_filter, recipe.accuracy_range)
        if recipe.group_filter != "none":
            self._metrics.of_filter(found)
        kept = [group for group, is_kept in zip(groups, found.is_kept.tolist(), strict=True) if is_kept]
        if not kept:
            self._console.print(
                f"step {step}: group_filter={recipe.group_filter} drops all {len(groups)} groups; the weights stay as "
                "they are",
                highlight=False,
            )
        return kept

    def collate(self, groups: Sequence[Group]) -> TrainBatch:
        """Groups and their advantages as one batch of tensors."""
        advantages = group_advantages(rewards_of(groups), self.recipe.advantage)
        self._metrics.of_advantages(advantages)
        return collate(groups, advantages, self.policy)

    def anchor(self, batch: TrainBatch, masks: MaskDraw, *, is_first: bool) -> Anchor:
        """Scores under the rollout policy and the reference, before any weight moves.

        Rollouts that were made ahead have a policy of their own, with the weights of their version.
        """
        with self._clock("scoring"):
            if not self._staleness:
                return self.learner.anchor(batch, masks, is_first=is_first)
            anchor = self.learner.anchor(batch, masks, is_first=is_first, earlier=self._engine.state_of(self._version))
            if is_first and anchor.old is not None:
                self._watch_mismatch(anchor.old, self.learner.present_scores(batch, masks), batch)
            return anchor

    def update(self, step: int, batch: TrainBatch, masks: MaskDraw, anchor: Anchor) -> None:
        """One clipped optimizer step on the whole batch."""
        with self._clock("update"):
            done = self.learner.update(step, batch, masks, anchor)
        self._metrics.of_update(done.sums, done.grad_norm, done.learning_rate)

    def sync_reference(self, step: int) -> None:
        """Let a `synced` reference follow the policy, every `sync_every` steps; others stay where they are."""
        self.learner.sync_reference(step)

    def sync_weights(self, step: int) -> None:
        """From here on rollouts are made with the updated weights."""
        with self._clock("sync"):
            self._engine.load_weights(self.learner, step)
            self._engine.trained(step)

    def log(self, step: int) -> None:
        """Write the step's metrics and show them."""
        if self.recipe.rollout.workers != "inline":
            self._metrics.of_cluster(self._engine.take_counters(), self._staleness)
        if self._num_failed_saves:
            self._metrics.of_failed_saves(self._num_failed_saves)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = {"step": step, **self._metrics.row(), "memory/peak_mb": peak_mb}
        self.folder.log(row)
        assert self._progress is not None
        self._progress.update(step, self._metrics.headline())

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate on the held-out problems during training, if the recipe asks for it."""
        every = self.recipe.evaluation.every
        if every and step % every == 0 and step < self.recipe.num_steps:
            self.evaluate(step)

    def evaluate(self, step: int) -> Evaluation | None:
        """Held-out pass rates of the present weights; None without held-out problems. Done once for each step."""
        if not self._held_out:
            return None
        if (known := self.evaluation_at(step)) is not None:
            return known
        # Said beforehand: for half a minute nothing else moves on the screen.
        self._console.print(f"evaluating {len(self._held_out)} held-out problems at step {step} ...", highlight=False)
        tasks = [prompt.task for prompt in self._held_out] * (self.recipe.evaluation.num_samples + 1)
        with self._watchdog.phase("evaluation", self._grader.patience(tasks)):
            found = evaluate(self._engine, self._grader, self._held_out, self.recipe, step=step)
        self.folder.log(found.to_row(), file="evaluation.jsonl")
        self._console.print(f"held-out pass@1 at step {step}: {found.headline()}", highlight=False)
        return found

    def evaluation_at(self, step: int) -> Evaluation | None:
        """What was measured at a step, from the run folder."""
        rows = [row for row in self.folder.rows("evaluation.jsonl") if row["step"] == step]
        return Evaluation.from_row(rows[0]) if rows else None

    def commit_if_due(self, step: int) -> None:
        """Write a checkpoint: from here on, a crash loses nothing of this step.

        One that cannot be written is no reason to stop: it is said, and tried again after the next step.

        Raises:
            SaveError: it cannot be written time after time, or at the end.
            FencedError: another process has the run by now.
        """
        is_last = step == self.recipe.num_steps
        if not (is_last or step % self.recipe.checkpoint.every == 0 or self._num_failed_saves):
            return
        state: dict[str, Any] = {"step": step}
        coordinator = self._engine.snapshot()
        carried = {v: self._engine.state_of(v) for v in coordinator["versions"].values() if v != step}
        if self.recipe.rollout.workers != "inline":
            has_fallen_back = coordinator["lag"] < self.recipe.cluster.lag
            state["coordinator"] = {"versions": coordinator["versions"], "has_fallen_back": has_fallen_back}

        def write(to: Path) -> None:
            self.learner.write(to, state)
            write_carried(to, carried)

        about = {"exactness": _exactness(self.policy), "lag": coordinator["lag"]}
        try:
            with self._watchdog.phase("checkpoint", PATIENCE_WITH_FILES):
                self.folder.commit(step, write, about)
        except SaveError as error:
            self._num_failed_saves += 1
            self._events.tell("save_failed", step=step, why=str(error))
            if is_last or self._num_failed_saves >= MAX_FAILED_SAVES:
                raise
            self._console.print(f"alarm: {error}. Training goes on, and the next step is tried", highlight=False)
        else:
            self._num_failed_saves = 0

    @property
    def _samples(self) -> range:
        return range(self.recipe.rollout.group_size)

    def _prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of a step: a function of the step alone, so that none is skipped or repeated, come what may."""
        chosen = rows_of_step(
            len(self._prompts),
            step=step - 1,
            per_step=self.recipe.rollout.num_prompts,
            seed=self.recipe.seed,
            stream="prompts",
        )
        return [self._prompts[i] for i in chosen]

    def _uid(self, step: int, place: int, prompt: Prompt, sample: int) -> str:
        return f"step-{step}/{place}-{prompt.task.uid}/{sample}"

    def _requests_of(self, step: int) -> list[Request]:
        named = [
            (self._uid(step, place, prompt, sample), prompt)
            for place, prompt in enumerate(self._prompts_of(step))
            for sample in self._samples
        ]
        self._tasks.update((uid, prompt.task) for uid, prompt in named)
        return [Request(uid=uid, prompt_ids=prompt.token_ids) for uid, prompt in named]

    def _begin_to_judge(self, made: Sequence[Rollout]) -> None:
        """Run programs while the other batches of their step are still denoised, or an earlier step is trained."""
        self._grader.begin([r.uid for r in made], [self._tasks[r.uid] for r in made], [r.text for r in made])

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> dict[int, int]:
        """Load the weights that rollouts under way had; returns the version of each of those steps."""
        coordinator = state.get("coordinator", {"versions": {}, "has_fallen_back": False})
        versions = {int(step): int(version) for step, version in coordinator["versions"].items()}
        if coordinator["has_fallen_back"]:
            self._engine.fall_back()
        if self.recipe.rollout.workers == "inline":
            return {}
        for version, tensors in read_carried(checkpoint).items():
            self._engine.load_state(tensors, version)
        return versions

    def _watch_mismatch(self, old: torch.Tensor, present: torch.Tensor, batch: TrainBatch) -> None:
        """How far the policy has moved from the one that rolled out; too far, twice running: no more running ahead.

        KL(old ‖ present) by its estimate k3 = r - 1 - log r, with r = present / old [Schulman 2020].
        """
        log_ratio = (present - old)[batch.valid].clamp(max=self.recipe.loss.max_log_ratio)
        mismatch = float((log_ratio.exp() - 1 - log_ratio).mean()) if len(log_ratio) else 0.0
        self._metrics.of_mismatch(mismatch)
        limit = self.recipe.cluster.max_policy_drift
        self._num_mismatched = self._num_mismatched + 1 if mismatch > limit else 0
        if self._num_mismatched >= 2 and self._engine.lag:
            self._engine.fall_back()
            self._events.tell("fall_back", mismatch=mismatch)
            self._console.print(
                f"the policy moved {mismatch:.3g} nats per token from the one that rolled out, twice more than "
                f"cluster.max_policy_drift={limit:g}: rollouts run ahead no more (lag 0)",
                highlight=False,
            )

    def _judge(
        self, step: int, prompts: Sequence[Prompt], made: Sequence[Rollout], *, has_begun: bool = False
    ) -> list[Group]:
        size = self.recipe.rollout.group_size
        tasks = [p.task for p in prompts for _ in range(size)]
        try:
            with self._watchdog.phase("sandbox", self._grader.patience(tasks)):
                verdicts = self._grader.score(tasks, [r.text for r in made], [r.uid for r in made] if has_begun else ())
        except RewardError as error:
            kept = write_rollouts(self.folder.path, step, made)
            raise RewardError(
                f"{error}\nNothing is lost: the {len(made)} completions of step {step} are in {kept}, and the run "
                f"continues after step {step - 1} with resume={self.folder.path}"
            ) from error
        return [
            Group(
                prompt=prompt,
                rollouts=tuple(made[i * size : (i + 1) * size]),
                verdicts=tuple(verdicts[i * size : (i + 1) * size]),
            )
            for i, prompt in enumerate(prompts)
        ]

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        with self._watchdog.phase(part):
            yield
        self._metrics.add_seconds(part, time.perf_counter() - started)


def open_run(recipe: Recipe, resume: str = "never") -> Run:
    """Open everything a run needs, checking the user's input before anything is written.

    Raises:
        CoupledError: recipe, dataset, checkpoint or reward function is not usable.
    """
    use_threads(recipe)
    policy = open_policy(recipe.model, recipe.seed)
    needs_tests = any(function.name == "code" for function in recipe.reward.functions)
    tasks = load_tasks(recipe.data, needs_tests=needs_tests, allow_weak=recipe.reward.allow_weak)
    prompts = encode_prompts(tasks, policy.tokenizer, recipe.data.max_prompt_tokens)
    held_out = _held_out(recipe, policy, prompts)
    _check_fit(recipe, policy, [*prompts, *held_out])
    judged = [*prompts, *held_out] if needs_tests else held_out
    events = EventLog()
    with ExitStack() as opened:
        grader = open_grader(recipe, [prompt.task for prompt in judged], tell=events.tell)
        opened.callback(grader.close)
        folder = open_run_folder(recipe, resume)
        events.bind(folder.path)
        opened.callback(events.close)
        learner = open_rl_learner(recipe, policy, folder.path)
        opened.callback(learner.close)
        engine = open_engine(recipe, learner, folder.path, events.tell)
        opened.callback(engine.close)
        run = Run(recipe, policy, prompts, held_out, grader, folder, engine, learner, events)
        opened.pop_all()
    return run


def _exactness(policy: Policy) -> str:
    """What a resumed run promises. E2: every bit the same. E1: the same prompts in the same order, none twice."""
    is_exact = policy.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return "E2" if is_exact else "E1"


def _held_out(recipe: Recipe, policy: Policy, prompts: Sequence[Prompt]) -> list[Prompt]:
    if recipe.data.eval_path is None:
        return []
    tasks = load_tasks(recipe.data, recipe.data.eval_path, allow_weak=recipe.reward.allow_weak)
    held_out = encode_prompts(tasks, policy.tokenizer, recipe.data.max_prompt_tokens)
    held_out = held_out[: recipe.evaluation.num_problems]
    seen = {p.token_ids for p in prompts} & {p.token_ids for p in held_out}
    if seen:
        raise DataError(
            f"{len(seen)} held-out prompts are also training prompts, so the gain would be measured on what was "
            "trained on; take them out of data.eval_path or data.path"
        )
    return held_out


def _check_fit(recipe: Recipe, policy: Policy, prompts: Sequence[Prompt]) -> None:
    longest = max(len(p.token_ids) for p in prompts)
    limit = getattr(policy.config, "max_position_embeddings", None)
    if limit is not None and longest + recipe.rollout.canvas > limit:
        raise RecipeError(
            f"the longest prompt ({longest} tokens) and rollout.canvas ({recipe.rollout.canvas}) exceed the model's "
            f"{limit} positions; lower rollout.canvas or data.max_prompt_tokens"
        )
