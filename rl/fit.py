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
from coupled.rl.trainer.open import open_likelihood_learner


def fit(recipe: LikelihoodRecipe, resume: str = "never") -> Path:
    """Train by maximum likelihood (`stage: pretrain` or `sft`). Returns the last checkpoint's folder.

    Raises:
        CoupledError: the recipe's data or checkpoint is not usable; nothing is written then.
    """
    use_threads(recipe)
    policy = open_policy(recipe.model, recipe.seed)
    as_asked, recipe = recipe, recipe.model_copy(update={"fit": settle(recipe.fit, policy.family)})
    source = open_source(recipe.data, recipe.fit, recipe.seed, policy)
    run = open_run_folder(as_asked, resume)
    with ExitStack() as opened:
        learner = opened.enter_context(closing(open_likelihood_learner(recipe, policy, run.path)))
        watchdog = Watchdog(stall_seconds(recipe.cluster), run.path)
        policy.on_pass = watchdog.moved
        opened.callback(watchdog.close)
        done, cursor = 0, Cursor()
        if (latest := run.latest()) is not None:
            state = learner.read(latest)
            done, cursor = int(state["step"]), Cursor(**state["cursor"])
        run.forget_after(done)
        watchdog.start()
        rows = RowMaker(source, recipe.fit, recipe.seed, policy.tokenizer.eos_token_id, cursor)
        progress = opened.enter_context(Progress(recipe.num_steps, done, title=f"{recipe.stage} {run.path}"))

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
                "time/step_seconds": seconds,
                "tokens_per_second": batch.ids.numel() / seconds,
            }
            run.log(row)
            progress.update(step + 1, {"loss": update.loss, "grad norm": update.grad_norm})
            if (step + 1) % recipe.checkpoint.every == 0 or step + 1 == recipe.num_steps:
                state = {"step": step + 1, "cursor": asdict(rows.cursor)}
                with watchdog.phase("checkpoint", PATIENCE_WITH_FILES):
                    latest = run.commit(step + 1, partial(learner.write, state=state))
    run.close()
    if rows.cursor.skipped:
        Console(soft_wrap=True).print(f"rows left out: {told(rows.cursor.skipped)}", highlight=False, markup=False)
    assert latest is not None, "the last step always commits"
    return latest
