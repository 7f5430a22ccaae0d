"""Likelihood training, the stages before RL: next-token prediction and the forms of masked diffusion.

Reads top to bottom: rows of the step, noise, loss, optimizer step, log, commit.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from coupled.rl.batch import micro_batches
from coupled.rl.checkpoint import open_policy, read_checkpoint, use_threads, write_checkpoint
from coupled.rl.fit_batch import FitBatch, RowMaker, collate
from coupled.rl.fit_data import Cursor, open_source, told
from coupled.rl.fit_objective import block_length_of, draw_noise, fit_loss, settle
from coupled.rl.gradient_checkpointing import checkpoint_gradients
from coupled.rl.optimizer import apply_step, learning_rate, make_optimizer
from coupled.rl.policy import Policy
from coupled.rl.progress import Progress
from coupled.rl.recipe import Recipe
from coupled.rl.rundir import open_run_dir


def fit(recipe: Recipe, resume: str = "never") -> Path:
    """Train by maximum likelihood (`stage: pretrain` or `sft`). Returns the last checkpoint's folder.

    Raises:
        CoupledError: the recipe's data or checkpoint is not usable; nothing is written then.
    """
    use_threads(recipe)
    policy = open_policy(recipe.model, recipe.seed)
    as_asked, recipe = recipe, recipe.model_copy(update={"fit": settle(recipe.fit, policy.family)})
    # What the objective makes of the model is saved with it, so that rollout and evaluation attend alike.
    policy.attend(block_length_of(recipe.fit))
    source = open_source(recipe, policy)
    optimizer = make_optimizer(policy, recipe.optimizer)
    if recipe.optimizer.has_gradient_checkpointing:
        checkpoint_gradients(policy)
    run = open_run_dir(as_asked, resume)
    done, cursor = 0, Cursor()
    if (latest := run.latest()) is not None:
        state = read_checkpoint(latest, policy, optimizer)
        done, cursor = int(state["step"]), Cursor(**state["cursor"])
    run.forget_after(done)
    rows = RowMaker(source, recipe, policy.tokenizer.eos_token_id, cursor)

    with Progress(recipe.num_steps, done, title=f"{recipe.stage} {run.path}") as progress:
        for step in range(done, recipe.num_steps):
            started = time.perf_counter()
            batch = collate(rows.rows_of_step(step), policy, recipe.fit)
            loss, masked = backward(policy, batch, recipe, step)
            rate = learning_rate(step, recipe.num_steps, recipe.optimizer)
            norm = apply_step(optimizer, policy, rate, recipe.optimizer.max_grad_norm)
            row = {"step": step + 1, "loss": loss, "grad_norm": norm, "learning_rate": rate, "scored_share": masked}
            seconds = time.perf_counter() - started
            skipped = {f"skipped/{reason}": count for reason, count in sorted(rows.cursor.skipped.items())}
            speed = {"time/step_seconds": seconds, "tokens_per_second": batch.ids.numel() / seconds}
            run.log({**row, **skipped, **speed})
            progress.update(step + 1, {"loss": loss, "grad norm": norm})
            if (step + 1) % recipe.checkpoint.every == 0 or step + 1 == recipe.num_steps:
                state = {"step": step + 1, "cursor": asdict(rows.cursor)}
                latest = run.commit(step + 1, partial(_write, policy, optimizer, state))
    run.close()
    if rows.cursor.skipped:
        Console(soft_wrap=True).print(f"rows left out: {told(rows.cursor.skipped)}", highlight=False, markup=False)
    assert latest is not None, "the last step always commits"
    return latest


def backward(policy: Policy, batch: FitBatch, recipe: Recipe, step: int) -> tuple[float, float]:
    """Accumulate the gradient of a step. Returns the loss in nats per position, and the share of them scored."""
    fit = recipe.fit
    noise = draw_noise(batch, fit, recipe.seed, step)
    num_positions = int(batch.carries_loss.sum())
    total = 0.0
    for part in micro_batches(len(batch.ids), fit.micro_batch_size or len(batch.ids)):
        loss = fit_loss(policy, batch.rows(part), noise.rows(part), fit, num_positions, seed=recipe.seed, step=step)
        loss.backward()
        total += loss.item()
    return total, int(noise.masked.sum()) / num_positions


def _write(policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, object], folder: Path) -> None:
    write_checkpoint(folder, policy, optimizer, state)
