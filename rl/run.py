"""A run owns the resources of training: learner (policy, reference, optimizer), engine, sandbox, prompts, run folder.

`train` reads as the algorithm because this module handles resources, clocks and files.
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

from coupled.reward import RewardError
from coupled.rl.data.prompts import encode_prompts, held_out_prompts, refuse_too_long
from coupled.rl.data.tasks import load_tasks
from coupled.rl.errors import RolloutError
from coupled.rl.evaluation.held_out import Evaluation, evaluate
from coupled.rl.judging.grader import Grader
from coupled.rl.judging.open import open_grader
from coupled.rl.model.open import open_policy, use_threads
from coupled.rl.model.policy import Policy
from coupled.rl.monitoring.checks import RunChecks, policy_drift
from coupled.rl.monitoring.events import EventLog
from coupled.rl.monitoring.metrics import StepMetrics
from coupled.rl.monitoring.progress import Progress
from coupled.rl.monitoring.watchdog import PATIENCE_WITH_FILES, Watchdog, stall_seconds
from coupled.rl.objective.advantage import filter_groups, group_advantages
from coupled.rl.objective.batch import collate, passes_of, refuse_identical_groups, rewards_of
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import EngineSnapshot, StepEngine
from coupled.rl.rollout.exactness import NUM_COMPARED, compare, exact_counterpart
from coupled.rl.rollout.open import open_engine
from coupled.rl.rollout.parity import prompts_to_check, sampler_for_parity
from coupled.rl.rollout.sampler import Request
from coupled.rl.rollout.schedule import PromptSchedule
from coupled.rl.run_folder.folder import RunFolder, open_run_folder
from coupled.rl.run_folder.rollout_log import write_rollouts
from coupled.rl.run_folder.saver import CheckpointSaver
from coupled.rl.trainer.checkpoint import read_carried, write_carried
from coupled.rl.trainer.open import open_rl_learner
from coupled.rl.trainer.rank_group import RankGroup
from coupled.rl.trainer.rl_learner import RLLearner
from coupled.rl.types import Anchor, Group, MaskDraw, Prompt, Rollout, TrainBatch
from coupled.sandbox import CacheStatistics


class Run:
    """The resources of one RL run, and the verbs of `train`. Use `open_run`, as a context manager."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        grader: Grader,
        folder: RunFolder,
        engine: StepEngine,
        learner: RLLearner | RankGroup | None = None,
        events: EventLog | None = None,
    ) -> None:
        self.recipe = recipe
        self.policy = policy
        self.folder = folder
        self.learner = RLLearner(recipe, policy) if learner is None else learner
        self._held_out = held_out
        self._grader = grader
        self._engine = engine
        self._events = events or EventLog()
        self._watchdog = Watchdog(stall_seconds(recipe.cluster), folder.path, state=engine.oldest)
        self._events.on_result = self._watchdog.moved
        self._watchdog.beat_on(*self.learner.bodies)
        self._console = Console(soft_wrap=True)
        self._progress: Progress | None = None
        self._metrics = StepMetrics()
        self._cache = CacheStatistics()
        self._checks = RunChecks(recipe, str(folder.path), self._events.emit, self._report)
        self._schedule = PromptSchedule(
            prompts, num_prompts=recipe.rollout.num_prompts, group_size=recipe.rollout.group_size, seed=recipe.seed
        )
        self._version = 0
        """Version of the weights that rolled out the step that is being trained."""
        self._staleness = 0
        """Training steps between those weights and the present ones; 0 is on-policy."""
        self._saver = CheckpointSaver(
            folder,
            num_steps=recipe.num_steps,
            every=recipe.checkpoint.every,
            emit=self._events.emit,
            report=self._report,
        )
        self._done = int(self._saver.restore(self._read)["step"])
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

    # --- the verbs of `train` -----------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps still to do, 1 … num_steps, with the progress display around them."""
        recipe = self.recipe
        self._engine.begin(
            self._schedule.requests_of,
            lambda: self._sampler,
            seed=recipe.seed,
            num_trained=self._done,
            num_steps=recipe.num_steps,
            on_rolled=self._begin_to_judge,
        )
        title = f"coupled-GRPO {self.folder.path}"
        with Progress(recipe.num_steps, self._done, title=title, console=self._console) as self._progress:
            for step in range(self._done + 1, recipe.num_steps + 1):
                self._metrics = StepMetrics()
                yield step

    def check_parity(self) -> None:
        """Refuse to train when scoring does not reproduce the log-probabilities that rollouts were drawn with.

        A few rows, once, before anything is trained or evaluated. Resumed runs are checked as well, because the
        engine's weights come from a checkpoint there.
        """
        recipe = self.recipe
        if self._done >= recipe.num_steps:
            return
        prompts = prompts_to_check(self._schedule.prompts)
        requests = [Request(uid=f"parity/{i}-{p.task.uid}", prompt_ids=p.token_ids) for i, p in enumerate(prompts)]
        made = self._engine.generate(
            requests, sampler_for_parity(recipe.rollout.sampler, self.policy.family.block_length), seed=recipe.seed
        )
        found = self.learner.check_parity(prompts, made)
        self._report(f"scoring agrees with {len(made)} replayed rollouts within {found:.1g} nats")

    def rollouts(self, step: int) -> list[Group]:
        """Denoise a group of completions per prompt of the step; execute and score every program.

        Raises:
            RolloutError: no group could be made, or no completion of several steps in a row has a score.
        """
        with self._clock("rollout"):
            found = self._engine.rollouts(step)
        prompts, made = self._whole_groups(step, found)
        self._version = made[0].weight_version
        self._staleness = step - 1 - self._version
        with self._clock("sandbox"):
            groups = self._judge(step, prompts, made, has_begun=True)
        self._forget(step)
        try:
            write_rollouts(self.folder.path, step, groups)
        except OSError as error:
            self._report(f"alarm: the rollouts of step {step} could not be written ({error})")
        refuse_identical_groups(groups)
        self._metrics.of_groups(groups)
        self._checks.scores(step, groups)
        if not self._sampler.is_exact:
            self._metrics.of_bounds(groups)
        if self._checks.is_exactness_due(step, self._sampler):
            self._compare_with_exact(step, prompts, groups)
        return groups

    def informative(self, step: int, groups: Sequence[Group]) -> list[Group]:
        """Groups that the recipe's filter keeps; an empty list when it drops all of them."""
        recipe = self.recipe
        found = filter_groups(rewards_of(groups), passes_of(groups), recipe.group_filter, recipe.accuracy_range)
        if recipe.group_filter != "none":
            self._metrics.of_filter(found)
        kept = [group for group, is_kept in zip(groups, found.is_kept.tolist(), strict=True) if is_kept]
        if not kept:
            self._report(
                f"step {step}: group_filter={recipe.group_filter} drops all {len(groups)} groups; the weights stay as "
                "they are"
            )
        return kept

    def collate(self, groups: Sequence[Group]) -> TrainBatch:
        """Groups and their advantages as one batch of tensors."""
        advantages = group_advantages(rewards_of(groups), self.recipe.advantage)
        self._metrics.of_advantages(advantages)
        return collate(groups, advantages, self.policy)

    def anchor(self, batch: TrainBatch, masks: MaskDraw, *, is_first: bool) -> Anchor:
        """Scores under the rollout policy and the reference, before any weight moves.

        With a lag, `old` is the policy with the weights of the version that made the rollouts.
        """
        with self._clock("scoring"):
            if not self._staleness:
                return self.learner.anchor(batch, masks, is_first=is_first)
            anchor = self.learner.anchor(batch, masks, is_first=is_first, earlier=self._engine.state_of(self._version))
            if is_first and anchor.old is not None:
                self._watch_policy_drift(anchor.old, self.learner.present_scores(batch, masks), batch)
            return anchor

    def update(self, step: int, batch: TrainBatch, masks: MaskDraw, anchor: Anchor) -> None:
        """One clipped optimizer step on the whole batch."""
        with self._clock("update"):
            done = self.learner.update(step, batch, masks, anchor)
        self._metrics.of_update(done.sums, done.grad_norm, done.learning_rate)

    def sync_reference(self, step: int) -> None:
        """Update a `synced` reference every `sync_every` steps; other references do not move."""
        self.learner.sync_reference(step)

    def sync_weights(self, step: int) -> None:
        """Load the updated weights into the engine: later rollouts are made with them."""
        with self._clock("sync"):
            self._engine.load_weights(self.learner, step)
            self._engine.trained(step)

    def log(self, step: int) -> None:
        """Write the step's metrics and display them."""
        if (counters := self._engine.take_counters()) is not None:
            self._metrics.of_cluster(counters, self._staleness)
        if self._saver.num_failed:
            self._metrics.of_failed_saves(self._saver.num_failed)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = {"step": step, **self._metrics.row(), "memory/peak_mb": peak_mb}
        self.folder.log(row)
        assert self._progress is not None
        self._progress.update(step, self._metrics.headline())

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate on the held-out problems during training, every `evaluation.every` steps."""
        every = self.recipe.evaluation.every
        if every and step % every == 0 and step < self.recipe.num_steps:
            self.evaluate(step)

    def evaluate(self, step: int) -> Evaluation | None:
        """Held-out pass rates of the present weights; None without held-out problems. Done once for each step."""
        if not self._held_out:
            return None
        if (known := self.evaluation_at(step)) is not None:
            return known
        # Reported beforehand: the evaluation prints nothing for half a minute.
        self._report(f"evaluating {len(self._held_out)} held-out problems at step {step} ...")
        tasks = [prompt.task for prompt in self._held_out] * (self.recipe.evaluation.num_samples + 1)
        with self._watchdog.phase("evaluation", self._grader.patience(tasks)):
            found = evaluate(self._engine, self._grader, self._held_out, self.recipe, step=step)
        self.folder.log(found.to_row(), file="evaluation.jsonl")
        self._report(f"held-out pass@1 at step {step}: {found.headline()}")
        return found

    def evaluation_at(self, step: int) -> Evaluation | None:
        """The evaluation of a step, from the run folder."""
        rows = [row for row in self.folder.rows("evaluation.jsonl") if row["step"] == step]
        return Evaluation.from_row(rows[0]) if rows else None

    def commit_if_due(self, step: int) -> None:
        """Write a checkpoint: a later crash loses nothing of this step. See `CheckpointSaver.save_if_due`.

        Raises:
            SaveError: several in a row cannot be written, or the final one.
            FencedError: another process has taken over the run.
        """
        with self._watchdog.phase("checkpoint", PATIENCE_WITH_FILES):
            facts = {"exactness": _exactness(self.policy), "lag": self._engine.lag}
            self._saver.save_if_due(step, lambda to: self._write(to, step), facts)

    # --- rollouts and verdicts ----------------------------------------------------------------------------------------

    def _whole_groups(self, step: int, found: dict[str, Rollout]) -> tuple[list[Prompt], list[Rollout]]:
        """Prompts whose completions were all made, and their completions, group by group."""
        asked = list(zip(self._schedule.prompts_of(step), self._schedule.uids_of(step), strict=True))
        whole = [(prompt, uids) for prompt, uids in asked if all(uid in found for uid in uids)]
        if len(whole) < len(asked):
            lost = ", ".join(prompt.task.uid for prompt, uids in asked if any(uid not in found for uid in uids))
            self._report(f"step {step}: no rollouts of {lost}, which are left out; see events.jsonl")
        if not whole:
            raise RolloutError(
                f"in step {step} no prompt has all of its completions; events.jsonl records how the workers ended. "
                "Check the memory of their hosts; lower rollout.batch_size"
            )
        return [prompt for prompt, _ in whole], [found[uid] for _, uids in whole for uid in uids]

    def _begin_to_judge(self, made: Sequence[Rollout]) -> None:
        """Run programs while the other batches of their step are still denoised, or an earlier step is trained."""
        uids = [r.uid for r in made]
        self._grader.begin(uids, self._schedule.tasks_of(uids), [r.text for r in made])

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

    def _forget(self, step: int) -> None:
        """Release the judged completions of the step, and count the sandbox's cache hits for them."""
        asked = [uid for uids in self._schedule.uids_of(step) for uid in uids]
        self._grader.forget(asked)
        self._schedule.forget(asked)
        before, self._cache = self._cache, self._grader.cache_statistics()
        self._metrics.of_cache(before, self._cache)

    # --- checks -------------------------------------------------------------------------------------------------------

    def _compare_with_exact(self, step: int, prompts: Sequence[Prompt], groups: Sequence[Group]) -> None:
        """Decode some groups of the step again, exactly, and follow the recipe on a mismatch."""
        some = groups[:NUM_COMPARED]
        requests = [Request(uid=r.uid, prompt_ids=r.prompt_ids) for group in some for r in group.rollouts]
        with self._clock("monitor"):
            made = self._engine.generate(requests, exact_counterpart(self._sampler), seed=self.recipe.seed)
            found = compare(some, self._judge(step, prompts[: len(some)], made))
        self._metrics.add(found.row())
        if self._checks.exactness(step, found):
            self._sampler = self._sampler.exact()
            self._metrics.add({"mismatch/fell_back": 1.0})

    def _watch_policy_drift(self, old: torch.Tensor, present: torch.Tensor, batch: TrainBatch) -> None:
        """Log the drift from the policy that rolled out; above the limit rollouts stop running ahead."""
        drift = policy_drift(old, present, batch.valid, self.recipe.loss.max_log_ratio)
        self._metrics.of_policy_drift(drift)
        if self._checks.policy_drift(drift, lag=self._engine.lag):
            self._engine.fall_back()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _write(self, to: Path, step: int) -> None:
        state: dict[str, Any] = {"step": step}
        under_way = self._engine.snapshot()
        if under_way.versions or under_way.has_fallen_back:
            state["coordinator"] = {
                "versions": dict(under_way.versions),
                "has_fallen_back": under_way.has_fallen_back,
            }
        self.learner.write(to, state)
        write_carried(to, dict(under_way.states))

    def _read(self, checkpoint: Path) -> dict[str, Any]:
        state = self.learner.read(checkpoint)
        if (saved := state.get("coordinator")) is not None:
            under_way = EngineSnapshot(
                versions={int(step): int(version) for step, version in saved["versions"].items()},
                states=read_carried(checkpoint),
                has_fallen_back=saved["has_fallen_back"],
            )
            self._engine.restore(under_way)
        return state

    def _report(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        with self._watchdog.phase(part):
            yield
        self._metrics.add_seconds(part, time.perf_counter() - started)


def open_run(recipe: Recipe, resume: str = "never") -> Run:
    """Open the resources of a run. The user's input is checked before anything is written.

    Raises:
        CoupledError: recipe, dataset, checkpoint or reward function is not usable.
    """
    use_threads(recipe)
    policy = open_policy(recipe.model, recipe.seed)
    needs_tests = any(function.name == "code" for function in recipe.reward.functions)
    tasks = load_tasks(recipe.data, needs_tests=needs_tests, allow_weak=recipe.reward.allow_weak)
    prompts = encode_prompts(tasks, policy.tokenizer, recipe.data.max_prompt_tokens)
    held_out = held_out_prompts(recipe, policy.tokenizer, prompts)
    max_positions = getattr(policy.config, "max_position_embeddings", None)
    refuse_too_long([*prompts, *held_out], recipe.rollout.canvas, max_positions)
    judged = [*prompts, *held_out] if needs_tests else held_out
    events = EventLog()
    with ExitStack() as opened:
        grader = open_grader(recipe, [prompt.task for prompt in judged], emit=events.emit)
        opened.callback(grader.close)
        folder = open_run_folder(recipe, resume)
        events.bind(folder.path)
        opened.callback(events.close)
        learner = open_rl_learner(recipe, policy, folder.path)
        opened.callback(learner.close)
        engine = open_engine(recipe, learner.generate, folder.path, events.emit)
        opened.callback(engine.close)
        run = Run(recipe, policy, prompts, held_out, grader, folder, engine, learner, events)
        opened.pop_all()
    return run


def _exactness(policy: Policy) -> str:
    """Exactness of a resumed run. E2: every bit the same. E1: the same prompts in the same order, none twice."""
    is_exact = policy.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    return "E2" if is_exact else "E1"
