"""How much an estimate of a completion's score, and the policy gradient made of it, depends on the mask draw.

    python benchmarks/variance.py

The embedded model rolls out completions once, and they are judged by their hidden tests. Then nothing changes but the
masks: per estimator, many draws of the same completions at the same weights. Measured are

    variance    of Σ_k s_k over draws, mean over completions, in nats²
    noise       tr Cov(g) / ‖E g‖² of the gradient g of the clipped loss at θ = θ_old, over draws
    share       of tr Cov(g) in the variance of g when prompts and completions are drawn again as well
    cosine      of E g with the gradient of the ELBO, and with the one along the rollout's own trajectory

each by unbiased moments: ‖E g‖² and E g · E h are means over products of *different* draws. Standard errors are by
jackknife over draws. Writes docs/results/variance.json and .md and, with matplotlib (pip install -e '.[bench]'), .svg.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.models import prompts_of
from harness.report import (
    RESULTS,
    draw_if_possible,
    environment,
    pyplot,
    save_figure,
    short_help,
    software,
    write_report,
)
from harness.seeds import QUICKSTART
from harness.tables import line, table

from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.estimators.subsets import exact_count, stack
from coupled.rl.judging.open import open_grader
from coupled.rl.keys import Key, generator
from coupled.rl.model.open import open_policy
from coupled.rl.model.policy import Policy
from coupled.rl.objective.advantage import group_advantages
from coupled.rl.objective.batch import collate, micro_batches, rewards_of
from coupled.rl.objective.loss import coupled_grpo_loss, loss_denominator
from coupled.rl.recipe.objective import Estimator, Loss
from coupled.rl.recipe.read import load_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.denoise import denoise
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Group, MaskDraw, TrainBatch, View

NUM_FORWARDS = 5
"""Estimators are compared at this many masked inputs per completion: λ = 2 with the fully masked one."""
MAIN = "Equal forwards"
PAIRS = "Number of pairs"
COUNTS = "Exact counts"
RANGES = "Range of t"

CONFIGURATIONS: dict[str, tuple[str, Estimator]] = {
    **{
        f"{name}, {weights}": (MAIN, Estimator(name=name, weights=weights, num_pairs=2))
        for weights in ("paper", "normalized", "antithetic", "unit")
        for name in ("coupled", "decoupled")
    },
    "random_mask": (MAIN, Estimator(name="random_mask", num_pairs=2)),
    "espo": (MAIN, Estimator(name="espo", num_pairs=2)),
    "gdpo, 5 nodes": (MAIN, Estimator(name="gdpo", num_nodes=5)),
    "gdpo, 3 nodes": (MAIN, Estimator(name="gdpo")),
    "full_mask": (MAIN, Estimator(name="full_mask")),
    "trajectory, 5 sampled steps": (MAIN, Estimator(name="trajectory", num_sampled_steps=5)),
    "trajectory": (MAIN, Estimator(name="trajectory")),
    **{
        f"{name}, paper, λ = {num_pairs}": (PAIRS, Estimator(name=name, num_pairs=num_pairs))
        for num_pairs in (1, 4)
        for name in ("coupled", "decoupled")
    },
    **{
        f"{name}, {weights}, exact count": (
            COUNTS,
            Estimator(name=name, weights=weights, num_pairs=2, draw="exact_count"),
        )
        for weights in ("paper", "antithetic")
        for name in ("coupled", "decoupled")
    },
    "random_mask, exact count": (COUNTS, Estimator(name="random_mask", num_pairs=2, draw="exact_count")),
    **{
        f"{name}, antithetic, t in [{low}, {round(1 - low, 2)}]": (
            RANGES,
            Estimator(name=name, weights="antithetic", num_pairs=2, mask_ratio=(low, 1 - low)),
        )
        for low in (0.5, 0.05)
        for name in ("coupled", "decoupled")
    },
    "coupled, antithetic, t in [0.05, 0.95], exact count": (
        RANGES,
        Estimator(weights="antithetic", num_pairs=2, mask_ratio=(0.05, 0.95), draw="exact_count"),
    ),
}
WITHOUT_CHANCE = ("full_mask", "trajectory")
ORACLE = "ELBO: one mask of every size"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """Results of n draws of one estimator."""

    scores: np.ndarray
    """float64 [n, B]: Σ_k s_k of every completion."""
    gradients: torch.Tensor
    """float32 [n, D]."""
    of_prompts: torch.Tensor
    """float32 [P, D]: the part of each prompt, mean over draws."""
    num_forwards: float
    """Masked inputs that score something, per completion and draw."""


# --- the fixed completions --------------------------------------------------------------------------------------------


def judged_batch(recipe: Recipe, policy: Policy, num_prompts: int) -> tuple[TrainBatch, list[Group]]:
    """The first `num_prompts` prompts whose completions differ in reward: the others have no gradient."""
    prompts = prompts_of(recipe, policy)
    size, groups = recipe.rollout.group_size, []
    grader = open_grader(recipe)
    try:
        for place, prompt in enumerate(prompts):
            uids = [f"variance/{place}-{prompt.task.uid}/{i}" for i in range(size)]
            requests = [Request(uid=uid, prompt_ids=prompt.token_ids) for uid in uids]
            made = denoise(policy, requests, recipe.rollout.sampler, seed=recipe.seed)
            verdicts = grader.score([prompt.task] * size, [rollout.text for rollout in made])
            group = Group(prompt=prompt, rollouts=tuple(made), verdicts=tuple(verdicts))
            if float(rewards_of([group]).std()) > 0:
                groups.append(group)
            if len(groups) == num_prompts:
                break
    finally:
        grader.close()
    return collate(groups, group_advantages(rewards_of(groups), recipe.advantage), policy), groups


# --- draws ------------------------------------------------------------------------------------------------------------


def elbo_draw(batch: TrainBatch, key: tuple[Key, ...]) -> MaskDraw:
    """One mask of every size: Σ_{n=1..L} 1/n · Σ_{k∈M_n} ℓ_k(M_n), |M_n| = n. Unbiased for the ELBO, hardly random."""
    forwards = []
    valid = batch.valid.numpy()
    for size in range(1, batch.canvas_length + 1):
        rows = [
            exact_count(generator(*key, size, uid).random(batch.canvas_length), size, row) & (row.sum() >= size)
            for uid, row in zip(batch.uids, valid, strict=True)
        ]
        forwards.append((View.of_mask(stack(rows, batch.valid), torch.full((len(batch),), float(size))),))
    return MaskDraw(forwards=tuple(forwards), total=1)


def gradient(
    policy: Policy, batch: TrainBatch, draw: MaskDraw, estimator: Estimator, temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ_k s_k [B]; the gradient of the clipped loss at θ = θ_old [D]; its parts by micro-batch [B / size, D]."""
    denominator = loss_denominator(batch.valid, "token")
    scores, parts = [], []
    for rows in micro_batches(len(batch), size):
        part = batch.rows(rows)
        new = estimate_logp(policy, part, draw.rows(rows), estimator, temperature)
        output = coupled_grpo_loss(new, new.detach(), None, part.advantages, part.valid, denominator, Loss())
        output.loss.backward()
        scores.append(new.detach().sum(-1))
        grads = [p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]
        parts.append(torch.cat(grads))
        policy.model.zero_grad(set_to_none=True)
    stacked = torch.stack(parts)
    return torch.cat(scores), stacked.sum(0), stacked


def sample(make: Callable[[int], MaskDraw], num_draws: int, step: Callable[..., Any], batch: TrainBatch) -> Sample:
    """The draws 0 … n-1 of one estimator."""
    scores, gradients, forwards = [], [], []
    of_prompts = torch.zeros(())
    for index in range(num_draws):
        draw = make(index)
        total, flat, parts = step(draw)
        of_prompts = of_prompts + parts / num_draws
        scores.append(total.double().numpy())
        gradients.append(flat)
        forwards.append(sum(float(view.scored.any(-1).sum()) for view in draw.views) / len(batch))
    return Sample(
        scores=np.stack(scores),
        gradients=torch.stack(gradients),
        of_prompts=of_prompts,
        num_forwards=round(float(np.mean(forwards)), 1),
    )


# --- moments ----------------------------------------------------------------------------------------------------------


def jackknife(statistic: Callable[[np.ndarray], float], num_draws: int) -> tuple[float, float]:
    """The statistic of all draws, and its standard error √((n-1)/n · Σ (θ_(i) - mean)²), θ_(i) without the i-th."""
    everything = np.arange(num_draws)
    left_out = np.array([statistic(np.delete(everything, i)) for i in everything])
    error = math.sqrt((num_draws - 1) / num_draws * float(((left_out - left_out.mean()) ** 2).sum()))
    return statistic(everything), error


def gram(one: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """Inner products of the gradients of two samples, fp64."""
    return (one.double() @ other.double().T).numpy()


def squared_mean(products: np.ndarray) -> float:
    """‖E g‖², unbiased: the mean of g_i · g_j over i ≠ j. One draw stands for a gradient without chance."""
    size = len(products)
    return float(products[0, 0]) if size == 1 else float((products.sum() - products.trace()) / (size * (size - 1)))


def noise(products: np.ndarray) -> float:
    """tr Cov(g) / ‖E g‖²."""
    mean = squared_mean(products)
    return (float(products.trace()) / len(products) - mean) / mean


def measure(drawn: Sample, elbo: Sample, replayed: Sample) -> dict[str, Any]:
    """Every number of one estimator."""
    scores, size = drawn.scores, len(drawn.scores)
    products = gram(drawn.gradients, drawn.gradients)
    result: dict[str, Any] = {"num_draws": size, "num_forwards": drawn.num_forwards, "mean": float(scores.mean())}
    share = drawn.num_forwards / NUM_FORWARDS

    def variance(rows: np.ndarray) -> float:
        return float(scores[rows].var(0, ddof=1).mean())

    def relative(rows: np.ndarray) -> float:
        return variance(rows) / float((scores[rows].mean(0) ** 2).mean())

    if size > 1:
        for name, statistic in (("variance", variance), ("relative_variance", relative)):
            result[name] = jackknife(statistic, size)
        result["noise"] = jackknife(lambda rows: noise(products[np.ix_(rows, rows)]), size)
        result["share"] = share_of_masks(drawn, products.trace() / size - squared_mean(products))
    else:
        result["share"] = 0.0
        result |= dict.fromkeys(("variance", "relative_variance", "noise"), (0.0, 0.0))
    result["noise_at_equal_forwards"] = [share * value for value in result["noise"]]
    result["relative_variance_at_equal_forwards"] = [share * value for value in result["relative_variance"]]
    for name, oracle in (("elbo", elbo), ("trajectory", replayed)):
        across = gram(drawn.gradients, oracle.gradients).mean(1)
        length = squared_mean(gram(oracle.gradients, oracle.gradients))

        def cosine(rows: np.ndarray, across: np.ndarray = across, length: float = length) -> float:
            # A gradient that is mostly noise may have an estimated length of nothing.
            own = max(squared_mean(products[np.ix_(rows, rows)]), 1e-30)
            return float(across[rows].mean()) / math.sqrt(own * length)

        result[f"cosine_{name}"] = jackknife(cosine, size) if size > 1 else (cosine(np.arange(1)), 0.0)
    return result


def share_of_masks(drawn: Sample, trace: float) -> float:
    """tr Cov of the masks over tr Cov of masks, prompts and completions together.

    A batch of P prompts is a sum of independent parts, whose covariance has the trace P/(P-1) · Σ_p ‖g_p - mean‖². Of
    the parts' means over n draws, 1/n of the masks' trace is in that sum.
    """
    parts = drawn.of_prompts.double()
    number = len(parts)
    spread = number / (number - 1) * float((parts - parts.mean(0)).square().sum())
    return trace / (trace + spread - trace / len(drawn.scores))


# --- the page ---------------------------------------------------------------------------------------------------------


def draw_picture(report: dict[str, Any], to: Path) -> None:
    """Variance of the score and noise of the gradient, at equal forwards, as dots with their standard errors."""
    plt = pyplot()
    from matplotlib.ticker import NullFormatter

    rows = [(label, row) for label, row in report["estimators"].items() if row["noise"][0] > 0]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.26 * len(rows) + 1), sharey=True)
    colours = {group: f"C{i}" for i, group in enumerate((MAIN, PAIRS, COUNTS, RANGES))}
    for axis, name, title in zip(
        axes,
        ("relative_variance_at_equal_forwards", "noise_at_equal_forwards"),
        ("variance of Σ s over its squared mean", "gradient: tr Cov over squared mean"),
        strict=True,
    ):
        for place, (label, row) in enumerate(rows):
            value, error = row[name]
            marker = "o" if label.startswith("coupled") else "s"
            axis.errorbar(value, place, xerr=error, marker=marker, color=colours[row["group"]], ls="", ms=5)
        axis.set(xscale="log", xlabel=f"{title},\nat {NUM_FORWARDS} forwards")
        ticks = [tick for tick in (0.03, 0.1, 0.3, 1, 3) if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes[0].invert_yaxis()
    save_figure(figure, to)


def page(report: dict[str, Any], picture: str, reading: str) -> str:
    """docs/results/variance.md: everything measured, with how to measure it again."""
    made, setting = report["environment"], report["setting"]
    lines = [
        "# Variance of the estimators",
        "",
        "Made by `benchmarks/variance.py`; all numbers are in [variance.json](variance.json).",
        "",
        f"* command: `{made['command']}`",
        f"* commit: {made['commit']}",
        f"* hardware: one thread on an {made['processor']}, no GPU; {software(made)}, float32",
        "",
        f"{setting['num_completions']} completions ({setting['num_prompts']} prompts × {setting['group_size']}, "
        f"{setting['mean_length']:.1f} tokens on average) of the embedded model, rolled out as the quickstart",
        "does and judged by their hidden tests; prompts whose completions all have one reward are left out, because",
        "they have no gradient. Weights and completions never change: only the masks are drawn again and again, as",
        "training draws them. λ = 2 and t in [0.2, 0.8] unless the row says otherwise. ± is one standard error, by",
        "jackknife over draws.",
        "",
        "* **forwards**: masked inputs that score something, per completion. The fully masked one counts as 1, though",
        "  completions of a prompt may share it.",
        "* **mean Σ s**: over completions and draws, in nats. "
        f"The ELBO is {setting['elbo'][0]:.2f} ± {setting['elbo'][1]:.2f}.",
        "* **variance**: of Σ s over draws, mean over completions; **relative**: over the mean of (E Σ s)².",
        "* **noise**: tr Cov(g) / ‖E g‖² of the gradient g of the clipped loss at θ = θ_old, without a penalty. The",
        f"  second column is for {NUM_FORWARDS} forwards (n draws averaged have 1/n of it).",
        "* **share**: how much of the gradient's variance is the masks', in a batch of this size whose prompts and",
        "  completions are drawn again as well. Estimated from the spread over the prompts here.",
        "* **cosine**: between E g and the gradient of the ELBO, or the one along the rollout's own trajectory. By",
        "  unbiased moments, so that chance may take it above 1.",
        "",
        reading,
        "",
        f"![variance of the score and noise of the gradient]({picture})",
    ]
    for group in (MAIN, PAIRS, COUNTS, RANGES):
        lines += [
            "",
            f"## {group}",
            "",
            *table(
                COLUMNS, [_cells(label, row) for label, row in report["estimators"].items() if row["group"] == group]
            ),
        ]
    return "\n".join(lines) + "\n"


COLUMNS = (
    "estimator",
    "draws",
    "forwards",
    "mean Σ s",
    "variance",
    "relative, %",
    "noise",
    f"noise at {NUM_FORWARDS}",
    "share, %",
    "cosine, ELBO",
    "cosine, trajectory",
)


def _cells(label: str, row: dict[str, Any]) -> list[str]:
    is_sure = row["num_draws"] == 1

    def cell(name: str, digits: int, factor: float = 1.0) -> str:
        value, error = (factor * x for x in row[name])
        return f"{value:.{digits}f}" + ("" if is_sure else f" ± {error:.{digits}f}")

    return [
        label,
        str(row["num_draws"]),
        f"{row['num_forwards']:g}",
        f"{row['mean']:.2f}",
        "0" if is_sure else cell("variance", 2),
        "0" if is_sure else cell("relative_variance", 1, 100),
        "0" if is_sure else cell("noise", 3),
        "0" if is_sure else cell("noise_at_equal_forwards", 3),
        f"{100 * row['share']:.1f}",
        cell("cosine_elbo", 3),
        cell("cosine_trajectory", 3),
    ]


def main() -> None:
    parser = short_help(__doc__)
    parser.add_argument("--recipe", default=str(QUICKSTART))
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--forwards", type=int, default=60, help="masked inputs per completion spent on an estimator")
    parser.add_argument("--elbo-draws", type=int, default=6)
    parser.add_argument("--only", nargs="*", help="these estimators, by their label; all when left out")
    parser.add_argument("--reading", type=Path, help="Markdown that goes above the tables")
    parser.add_argument("--redraw", action="store_true", help="make page and picture from the JSON that is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "variance.json")
    arguments = parser.parse_args()
    report = json.loads(arguments.out.read_text()) if arguments.redraw else run(arguments)
    picture = arguments.out.with_suffix(".svg")
    reading = arguments.reading.read_text().strip() if arguments.reading else ""
    write_report(report, arguments.out, lambda report: page(report, picture.name, reading))
    print(f"wrote {arguments.out}")
    draw_if_possible(draw_picture, report, picture)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, printing a line per estimator."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    recipe = load_recipe(arguments.recipe)
    policy = open_policy(recipe.model, recipe.seed)
    batch, groups = judged_batch(recipe, policy, arguments.num_prompts)
    size, temperature = recipe.rollout.group_size, recipe.rollout.temperature
    print(f"{len(batch)} completions, rewards {rewards_of(groups).tolist()}")

    def step(draw: MaskDraw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # A micro-batch is the group of a prompt.
        return gradient(policy, batch, draw, Estimator(), temperature, size)

    elbo = sample(lambda i: elbo_draw(batch, (recipe.seed, "elbo", i)), arguments.elbo_draws, step, batch)
    replay = draw_masks(batch, Estimator(name="trajectory"), (recipe.seed, "variance"))
    replayed = sample(lambda i: replay, 1, step, batch)
    print(f"ELBO {elbo.scores.mean():.3f}, noise {noise(gram(elbo.gradients, elbo.gradients)):.4f}")
    means = elbo.scores.mean(1)
    report: dict[str, Any] = {
        "environment": environment(),
        "setting": {
            "num_completions": len(batch),
            "num_prompts": len(groups),
            "group_size": size,
            "mean_length": float(batch.valid.sum(-1).float().mean()),
            "rewards": rewards_of(groups).tolist(),
            "temperature": temperature,
            "elbo": [float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))],
        },
        # The cosine with itself is 1 by definition, and not estimated.
        "estimators": {ORACLE: {"group": MAIN, **measure(elbo, elbo, replayed), "cosine_elbo": (1.0, 0.0)}},
    }
    for label, (group, estimator) in CONFIGURATIONS.items():
        if arguments.only and label not in arguments.only:
            continue

        def make(index: int, estimator: Estimator = estimator, label: str = label) -> MaskDraw:
            # The label is in the key: the draws of two estimators are independent, which the cosines rely on.
            return draw_masks(batch, estimator, (recipe.seed, "variance", label, index))

        planned = len(make(0).views)
        num_draws = 1 if label in WITHOUT_CHANCE else max(6, math.ceil(arguments.forwards / planned))
        row = {"group": group, **measure(sample(make, num_draws, step, batch), elbo, replayed)}
        report["estimators"][label] = row
        print(f"{time.perf_counter() - started:4.0f} s  {line(_cells(label, row))}", flush=True)
    report["seconds"] = time.perf_counter() - started
    return report


if __name__ == "__main__":
    main()
