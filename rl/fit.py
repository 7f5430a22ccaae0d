"""Likelihood training, the stages before RL: next-token prediction, then masked diffusion with the prompt visible.

Reads top to bottom: rows of the step, noise, loss, optimizer step, log, commit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coupled.rl.checkpoint import open_policy, read_checkpoint, use_threads, write_checkpoint
from coupled.rl.data import load_rows, render_prompt, rows_of_step
from coupled.rl.errors import DataError
from coupled.rl.gradient_checkpointing import checkpoint_gradients
from coupled.rl.noise import bernoulli_mask, diffusion_loss, stratified_ratios
from coupled.rl.optimizer import apply_step, learning_rate, make_optimizer
from coupled.rl.policy import Policy
from coupled.rl.progress import Progress
from coupled.rl.recipe import Recipe
from coupled.rl.rundir import open_run_dir
from coupled.rl.shapes import Bool, Float, Int

RESPONSE = "```python\n{solution}\n```"
"""How a solution is answered; the format reward asks for the same fence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and its response, end token included, as token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitBatch:
    """Prompts padded on the left, responses filled with pad tokens up to the canvas."""

    ids: Int[Tensor, "B S"]
    pad_lengths: Int[Tensor, " B"]
    is_response: Bool[Tensor, "B C"]
    """Positions up to and including the end token."""


def fit(recipe: Recipe, resume: str = "never") -> Path:
    """Train by maximum likelihood (`stage: pretrain` or `sft`). Returns the last checkpoint's folder.

    Raises:
        CoupledError: the recipe's data or checkpoint is not usable; nothing is written then.
    """
    use_threads(recipe)
    policy = open_policy(recipe.model, recipe.seed)
    examples = load_examples(recipe, policy)
    optimizer = make_optimizer(policy, recipe.optimizer)
    if recipe.optimizer.has_gradient_checkpointing:
        checkpoint_gradients(policy)
    run = open_run_dir(recipe, resume)
    done = 0
    if (latest := run.latest()) is not None:
        done = int(read_checkpoint(latest, policy, optimizer)["step"])
    run.forget_after(done)

    with Progress(recipe.num_steps, done, title=f"{recipe.stage} {run.path}") as progress:
        for step in range(done, recipe.num_steps):
            started = time.perf_counter()
            chosen = rows_of_step(
                len(examples), step=step, per_step=recipe.fit.batch_size, seed=recipe.seed, stream="fit"
            )
            batch = collate_examples([examples[i] for i in chosen], policy, recipe.fit.canvas, recipe.fit.objective)
            loss = fit_loss(policy, batch, recipe, step)
            loss.backward()
            rate = learning_rate(step, recipe.num_steps, recipe.optimizer)
            norm = apply_step(optimizer, policy, rate, recipe.optimizer.max_grad_norm)
            row = {"step": step + 1, "loss": loss.item(), "grad_norm": norm, "learning_rate": rate}
            seconds = time.perf_counter() - started
            run.log({**row, "time/step_seconds": seconds, "tokens_per_second": batch.ids.numel() / seconds})
            progress.update(step + 1, {"loss": row["loss"], "grad norm": norm})
            if (step + 1) % recipe.checkpoint.every == 0 or step + 1 == recipe.num_steps:
                latest = run.commit(step + 1, partial(_write, policy, optimizer, step + 1))
    run.close()
    assert latest is not None, "the last step always commits"
    return latest


def _write(policy: Policy, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    write_checkpoint(folder, policy, optimizer, {"step": step})


def fit_loss(policy: Policy, batch: FitBatch, recipe: Recipe, step: int) -> Float[Tensor, ""]:
    """The objective of one batch, in nats per position, under the noise of step `step`."""
    canvas = batch.is_response.shape[1]
    rows = torch.zeros_like(batch.ids, dtype=torch.bool)
    if recipe.fit.objective == "autoregressive":
        policy.is_causal = True
        rows[:, -canvas:] = batch.is_response
        loss = -policy.logp_at(batch.ids, batch.pad_lengths, rows, batch.ids).mean()
        policy.is_causal = False
        return loss
    low, high = recipe.fit.mask_ratio
    everywhere = torch.ones_like(batch.is_response)
    ratio = stratified_ratios(len(batch.ids), low, high, recipe.seed, "fit-ratio", step)
    masked = bernoulli_mask(ratio, everywhere, recipe.seed, "fit-mask", step)
    rows[:, -canvas:] = masked
    noisy = batch.ids.masked_fill(rows, policy.mask_id)
    logp = torch.zeros(masked.shape, device=noisy.device)
    logp[masked] = policy.logp_at(noisy, batch.pad_lengths, rows, batch.ids)
    return diffusion_loss(logp, masked, ratio, masked.numel())


def load_examples(recipe: Recipe, policy: Policy) -> list[Example]:
    """Tokenise prompt and solution of every row; rows that do not fit the canvas or the prompt limit are dropped.

    Raises:
        DataError: no column `solution`, or no row fits.
    """
    rows = load_rows(recipe.data.path, split=recipe.data.split)
    columns = recipe.data.columns
    prompt_column, solution_column = columns.get("prompt", "prompt"), columns.get("solution", "solution")
    for column in (prompt_column, solution_column):
        if not isinstance(rows[0].get(column), str):
            raise DataError(
                f"stage {recipe.stage} trains on text columns {prompt_column!r} and {solution_column!r}; the dataset "
                f"has {', '.join(rows[0])}. Map them with data.columns.prompt=NAME and data.columns.solution=NAME"
            )
    tokenizer: Any = policy.tokenizer
    prompts = tokenizer([render_prompt(r[prompt_column], tokenizer) for r in rows], add_special_tokens=False)
    responses = tokenizer([RESPONSE.format(solution=r[solution_column]) for r in rows], add_special_tokens=False)
    examples = [
        Example(prompt_ids=tuple(p), response_ids=(*r, tokenizer.eos_token_id))
        for p, r in zip(prompts["input_ids"], responses["input_ids"], strict=True)
    ]
    fitting = [
        e
        for e in examples
        if len(e.response_ids) <= recipe.fit.canvas and len(e.prompt_ids) <= recipe.data.max_prompt_tokens
    ]
    if not fitting:
        raise DataError(
            f"no row fits fit.canvas = {recipe.fit.canvas} and data.max_prompt_tokens = "
            f"{recipe.data.max_prompt_tokens}; the shortest response has "
            f"{min(len(e.response_ids) for e in examples)} tokens"
        )
    return fitting


def collate_examples(examples: list[Example], policy: Policy, canvas: int, objective: str) -> FitBatch:
    """Left-pad prompts, fill responses. Next-token prediction needs no positions beyond the longest response."""
    if objective == "autoregressive":
        canvas = max(len(e.response_ids) for e in examples)
    prompt_length = max(len(e.prompt_ids) for e in examples)
    ids = torch.full((len(examples), prompt_length + canvas), policy.pad_id)
    is_response = torch.zeros((len(examples), canvas), dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, prompt_length - len(example.prompt_ids) : prompt_length] = torch.tensor(example.prompt_ids)
        ids[row, prompt_length : prompt_length + len(example.response_ids)] = torch.tensor(example.response_ids)
        is_response[row, : len(example.response_ids)] = True
    pad_lengths = torch.tensor([prompt_length - len(e.prompt_ids) for e in examples])
    return FitBatch(
        ids=ids.to(policy.device),
        pad_lengths=pad_lengths.to(policy.device),
        is_response=is_response.to(policy.device),
    )
