"""Likelihood training, the stages before RL: next-token prediction and the forms of masked diffusion.

Reads top to bottom: rows of the step, noise, loss, optimizer step, log, commit.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from coupled.rl.likelihood.batch import RowMaker, collate
from coupled.rl.likelihood.objective import draw_noise, settle
from coupled.rl.likelihood.samples import Cursor, open_source, told
from coupled.rl.model.open import open_policy, use_threads
from coupled.rl.monitoring.progress import Progress
from coupled.rl.monitoring.watchdog import PATIENCE_WITH_FILES, Watchdog, stall_seconds
from coupled.rl.recipe.schema import LikelihoodRecipe
from coupled.rl.run_folder.folder import open_run_folder
from coupled.rl.run_folder.saver import CheckpointSaver
from coupled.rl.trainer.open import open_likelihood_learner


def fit(recipe: LikelihoodRecipe, resume: str = "never") -> Path:
    """Train by maximum likelihood (`stage: pretrain` or `sft`). Returns the last checkpoint's folder.

    Raises:
        CoupledError: the recipe's data or checkpoint is not usable; nothing has been written.
        SaveError: several checkpoints in a row cannot be written, or the final one.
    """
    use_threads(recipe)
    policy = open_policy(recipe.model, recipe.seed)
    as_asked, recipe = recipe, recipe.model_copy(update={"fit": settle(recipe.fit, policy.family)})
    source = open_source(recipe.data, recipe.fit, recipe.seed, policy)
    console = Console(soft_wrap=True)
    report = partial(console.print, highlight=False, markup=False)
    folder = open_run_folder(as_asked, resume)
    with ExitStack() as opened:
        opened.callback(folder.close)
        learner = opened.enter_context(closing(open_likelihood_learner(recipe, policy, folder.path)))
        watchdog = Watchdog(stall_seconds(recipe.cluster), folder.path)
        watchdog.beat_on(*learner.bodies)
        opened.callback(watchdog.close)
        saver = CheckpointSaver(folder, num_steps=recipe.num_steps, every=recipe.checkpoint.every, report=report)
        state = saver.restore(learner.read)
        done, cursor = int(state["step"]), Cursor(**state.get("cursor", {}))
        watchdog.start()
        rows = RowMaker(source, recipe.fit, recipe.seed, policy.tokenizer.eos_token_id, cursor)
        title = f"{recipe.stage} {folder.path}"
        progress = opened.enter_context(Progress(recipe.num_steps, done, title=title, console=console))

        for step in range(done, recipe.num_steps):
            started = time.perf_counter()
            with watchdog.phase("data", PATIENCE_WITH_FILES):
                batch = collate(rows.rows_of_step(step), policy, recipe.fit)
            noise = draw_noise(batch, recipe.fit, recipe.seed, step)
            update = learner.fit(step, batch, noise)
            seconds = time.perf_counter() - started
            row = {
                "step": step + 1,
                **asdict(update),
                "scored_share": int(noise.masked.sum()) / int(batch.carries_loss.sum()),
                **{f"skipped/{reason}": count for reason, count in sorted(rows.cursor.skipped.items())},
                **({"failed_saves": float(saver.num_failed)} if saver.num_failed else {}),
                "time/step_seconds": seconds,
                "tokens_per_second": batch.ids.numel() / seconds,
            }
            folder.log(row)
            progress.update(step + 1, {"loss": update.loss, "grad norm": update.grad_norm})
            state = {"step": step + 1, "cursor": asdict(rows.cursor)}
            with watchdog.phase("checkpoint", PATIENCE_WITH_FILES):
                saver.save_if_due(step + 1, partial(learner.write, state=state))
    if rows.cursor.skipped:
        report(f"rows left out: {told(rows.cursor.skipped)}")
    latest = folder.latest()
    assert latest is not None, "the last step always commits"
    return latest
