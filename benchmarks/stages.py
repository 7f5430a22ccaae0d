"""Three claims of Stable-DiffCoder at the size of the embedded model, over several seeds.

    python benchmarks/stages.py --seeds 0 1 2 --runs /tmp/stages-runs

(a) The noise warm-up removes the spike of the gradient norm where an autoregressive checkpoint becomes a diffusion one.
(b) Block-wise clipped noise learns more per step, at blocks of 2, 4 and 8.
(c) Autoregressive first, then diffusion, beats causal diffusion first, which beats diffusion all along, at equal steps.

Every training is one `coupled train` in a process of its own, continued where it stopped; what is finished is not run
again. Writes docs/results/stages.json and, with matplotlib (pip install -e '.[bench]'), stages-*.svg, and prints the
tables. `--scale 0.02 --problems 8 --seeds 0` tries everything in a few minutes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.models import prompts_of
from harness.report import RESULTS, ROOT, draw_if_possible, environment, pyplot, save_figure, short_help, write_report
from harness.seeds import Training
from harness.tables import ranged, table

from coupled.rl.data.rows import read_rows as dataset_rows
from coupled.rl.evaluation.held_out import bootstrap, is_pass
from coupled.rl.judging.open import open_grader
from coupled.rl.likelihood.batch import collate
from coupled.rl.likelihood.objective import draw_noise, fit_loss
from coupled.rl.likelihood.samples import Encoder, Example
from coupled.rl.model.open import open_policy
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.read import load_recipe
from coupled.rl.recipe.schema import LikelihoodRecipe
from coupled.rl.rollout.denoise import completion_length
from coupled.rl.run_folder.folder import committed_checkpoints, read_rows

TINY = ROOT / "recipes" / "tiny"
CLAIMS = ("a", "b", "c")
AR_STEPS, SWITCH_STEPS, WARMUP_STEPS, CLIP_STEPS, CURRICULUM_STEPS = 400, 300, 100, 200, 300
BLOCKS = (2, 4, 8)
DECODED_BLOCKS = (1, 2, 32)
NOISES = ("none", "paper", "exact")
CURRICULA = ("autoregressive", "causal_diffusion", "masked_diffusion")
LOSS_DRAWS = 8
"""Mask draws per held-out problem in the loss of claim (b)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One `coupled train`: a recipe of recipes/tiny with settings, in a run folder of its own."""

    name: str
    recipe: str
    steps: int
    settings: tuple[str, ...] = ()

    def run(self, seed: int, runs: Path) -> Path:
        """The run folder, trained to the end."""
        settings = (
            f"seed={seed}",
            f"num_steps={self.steps}",
            f"optimizer.warmup_steps={min(50, self.steps // 8)}",
            f"checkpoint.every={max(1, self.steps // 4)}",
            "checkpoint.keep=9",
            *self.settings,
        )
        training = Training(
            recipe=TINY / f"{self.recipe}.yaml", name=f"{self.name}-seed{seed}", runs=runs, settings=settings
        )
        if not (training.folder / "checkpoints" / f"step_{self.steps:06d}").is_dir():
            training.train()
        return training.folder


def last_checkpoint(folder: Path) -> Path:
    return committed_checkpoints(folder / "checkpoints")[-1]


def measured(folder: Path, name: str, measure: Any) -> Any:
    """The value of `measure()`, computed once and kept beside the run."""
    file = folder / f"{name}.json"
    if not file.is_file():
        file.write_text(json.dumps(measure()) + "\n")
    return json.loads(file.read_text())


# --- (a) the switch -----------------------------------------------------------------------------------------------


def switches(start: Path, scale: float) -> Iterator[tuple[str, Plan]]:
    """From the autoregressive checkpoint to full and to block attention, with and without the noise warm-up."""
    steps, warmup = scaled(SWITCH_STEPS, scale), scaled(WARMUP_STEPS, scale)
    for objective in ("masked_diffusion", "block_diffusion"):
        for length in (0, warmup):
            settings = (f"model.path={start}", f"fit.objective={objective}", f"fit.noise_warmup_steps={length}")
            name = f"{objective}, {'warm-up' if length else 'none'}"
            yield name, Plan(name=f"a-{objective}-{length}", recipe="adapt", steps=steps, settings=settings)


def switch_result(folder: Path, scale: float) -> dict[str, Any]:
    """The curve of the gradient norm; its peak during the warm-up, and after it, against the plateau at the end."""
    norms = [row["grad_norm"] for row in read_rows(folder / "metrics.jsonl")]
    warmup = scaled(WARMUP_STEPS, scale)
    plateau = statistics.median(norms[-max(1, len(norms) // 6) :])
    return {
        "grad_norm": norms,
        "plateau": plateau,
        "first_step": norms[0] / plateau,
        "peak_in_warmup": max(norms[:warmup]) / plateau,
        "peak_after_warmup": max(norms[warmup:]) / plateau,
    }


# --- (b) clipped noise --------------------------------------------------------------------------------------------


def clippings(start: Path, scale: float) -> Iterator[tuple[str, Plan]]:
    for block in BLOCKS:
        for noise in NOISES:
            settings = (
                f"model.path={start}",
                "model.shift=0",
                "fit.objective=block_diffusion",
                f"fit.block_length={block}",
                f"fit.clipped_noise={noise}",
            )
            training = Plan(
                name=f"b-block{block}-{noise}", recipe="adapt", steps=scaled(CLIP_STEPS, scale), settings=settings
            )
            yield f"{block}, {noise}", training


def clipping_result(folder: Path, recipe: LikelihoodRecipe, problems: int) -> dict[str, Any]:
    """Held-out loss along the way, of the same bound for every arm: t ~ U(0.05, 1), weight 1/t, masks not forced."""
    losses = {}
    for checkpoint in committed_checkpoints(folder / "checkpoints"):
        policy = policy_of(checkpoint, recipe)
        losses[int(checkpoint.name.removeprefix("step_"))] = held_out_loss(policy, recipe, problems)
    rows = read_rows(folder / "metrics.jsonl")
    return {"loss": losses, "scored_share": statistics.mean(row["scored_share"] for row in rows)}


@torch.no_grad()
def held_out_loss(policy: Policy, recipe: LikelihoodRecipe, problems: int) -> float:
    """Nats per response token of the block-diffusion bound, on held-out problems and fixed masks."""
    length = policy.family.block_length
    values = recipe.fit.model_dump() | {"objective": "block_diffusion", "block_length": length}
    fit = type(recipe.fit).model_validate(values | {"clipped_noise": "none", "mask_ratio": (0.05, 1.0)})
    examples = held_out(policy, recipe)[:problems]
    total = 0.0
    for first in range(0, len(examples), 50):
        rows = [(example,) for example in examples[first : first + 50]]
        batch = collate(rows, policy, fit)
        num = int(batch.carries_loss.sum())
        for draw in range(LOSS_DRAWS):
            noise = draw_noise(batch, fit, 0, draw)
            total += len(rows) * float(fit_loss(policy, batch, noise, fit, num, seed=0, step=draw)) / LOSS_DRAWS
    return total / len(examples)


def held_out(policy: Policy, recipe: LikelihoodRecipe) -> list[Example]:
    """Prompt and solution of the held-out problems, those that fit the canvas."""
    encoded = Encoder(recipe.data, recipe.fit, policy).encode(list(dataset_rows(str(TINY / "tasks" / "test.jsonl"))))
    return [example for example in encoded if isinstance(example, Example)]


# --- (c) curricula ------------------------------------------------------------------------------------------------


def first_halves(scale: float) -> Iterator[tuple[str, Plan]]:
    for objective in CURRICULA:
        settings = (f"fit.objective={objective}",)
        yield (
            objective,
            Plan(name=f"c1-{objective}", recipe="ar", steps=scaled(CURRICULUM_STEPS, scale), settings=settings),
        )


def second_half(objective: str, start: Path, scale: float) -> Plan:
    settings = (f"model.path={start}",)
    steps = scaled(CURRICULUM_STEPS, scale)
    return Plan(name=f"c2-{objective}", recipe="adapt", steps=steps, settings=settings)


def curriculum_result(folder: Path, recipe: LikelihoodRecipe, problems: int) -> dict[str, Any]:
    """Greedy pass@1 on held-out problems, decoded in blocks of 1, 2 and 32 positions."""
    rl = load_recipe(TINY / "rl.yaml")
    policy = policy_of(last_checkpoint(folder), recipe)
    assert rl.data.eval_path is not None
    prompts = prompts_of(rl, policy, rl.data.eval_path)[:problems]
    result = {}
    grader = open_grader(rl, [prompt.task for prompt in prompts])
    try:
        for block in DECODED_BLOCKS:
            texts = [
                text
                for first in range(0, len(prompts), 50)
                for text in decode(policy, [p.token_ids for p in prompts[first : first + 50]], rl.rollout.canvas, block)
            ]
            judged = grader.judge([prompt.task for prompt in prompts], texts)
            passes = bootstrap([float(is_pass(judgement)) for judgement in judged])
            result[str(block)] = [passes.mean, passes.low, passes.high]
    finally:
        grader.close()
    return result


@torch.no_grad()
def decode(policy: Policy, prompts: list[tuple[int, ...]], canvas: int, block: int) -> list[str]:
    """Greedy, block after block from the left, one position a step, the surest of the block first [LLaDA].

    Attention is full: later blocks are there, masked.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width + canvas), policy.mask_id)
    for row, prompt in enumerate(prompts):
        ids[row, :width] = policy.pad_id
        ids[row, width - len(prompt) : width] = torch.tensor(prompt)
    pads = torch.tensor([width - len(prompt) for prompt in prompts])
    for start in range(width, width + canvas, block):
        for _ in range(min(block, width + canvas - start)):
            rows = ids == policy.mask_id
            rows[:, :start] = False
            rows[:, start + block :] = False
            logp = torch.log_softmax(policy.without_mask_token(policy.logits_at(ids, pads, rows)), dim=-1)
            entropy = torch.full(ids.shape, float("inf"))
            entropy[rows] = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
            tokens = torch.zeros_like(ids)
            tokens[rows] = logp.argmax(-1)
            place = entropy.argmin(1, keepdim=True)
            ids.scatter_(1, place, tokens.gather(1, place))
    texts = []
    for row in ids[:, width:].numpy():
        length, has_end = completion_length(row, policy.end_ids)
        texts.append(policy.tokenizer.decode(row[: length - has_end].tolist(), skip_special_tokens=True))
    return texts


# --- the whole of it ----------------------------------------------------------------------------------------------


def scaled(steps: int, scale: float) -> int:
    return max(2, round(steps * scale))


def policy_of(checkpoint: Path, recipe: LikelihoodRecipe) -> Policy:
    model = recipe.model.model_copy(update={"path": str(checkpoint), "init": "checkpoint"})
    return open_policy(model, recipe.seed)


def run_seed(seed: int, runs: Path, claims: list[str], scale: float, problems: int) -> dict[str, Any]:
    """Everything of one seed; each claim's numbers by arm."""
    recipe = load_recipe(TINY / "adapt.yaml")
    start = last_checkpoint(Plan(name="ar", recipe="ar", steps=scaled(AR_STEPS, scale)).run(seed, runs))
    found: dict[str, Any] = {"seed": seed}
    if "a" in claims:
        found["a"] = {arm: switch_result(t.run(seed, runs), scale) for arm, t in switches(start, scale)}
    if "b" in claims:
        found["b"] = {}
        for arm, training in clippings(start, scale):
            folder = training.run(seed, runs)
            found["b"][arm] = measured(folder, "loss", lambda f=folder: clipping_result(f, recipe, problems))
    if "c" in claims:
        found["c"] = {}
        for arm, training in first_halves(scale):
            middle = last_checkpoint(training.run(seed, runs))
            folder = second_half(arm, middle, scale).run(seed, runs)
            found["c"][arm] = measured(folder, "pass", lambda f=folder: curriculum_result(f, recipe, problems))
    return found


def tables(seeds: list[dict[str, Any]]) -> str:
    """The findings as Markdown: one row an arm, one value a seed."""
    lines = []
    if "a" in seeds[0]:
        lines += ["(a) gradient norm over its median in the last sixth of the run, by seed", ""]
        names = ("first_step", "peak_in_warmup", "peak_after_warmup", "plateau")
        head = ("arm", "first step", "peak while warming up", "peak afterwards", "plateau")
        lines += table(
            head,
            [
                (arm, *(" / ".join(f"{seed['a'][arm][name]:.2f}" for seed in seeds) for name in names))
                for arm in seeds[0]["a"]
            ],
        )
        lines.append("")
    if "b" in seeds[0]:
        steps = list(next(iter(seeds[0]["b"].values()))["loss"])
        lines += ["(b) held-out loss in nats per token, mean over seeds (range); share of response tokens scored", ""]
        rows = []
        for arm in seeds[0]["b"]:
            losses = [[seed["b"][arm]["loss"][step] for seed in seeds] for step in steps]
            cells = [ranged(statistics.mean(values), min(values), max(values), ".3f") for values in losses]
            share = statistics.mean(seed["b"][arm]["scored_share"] for seed in seeds)
            rows.append((arm, *cells, f"{share:.2f}"))
        lines += table(("block, noise", *(f"step {s}" for s in steps), "scored"), rows)
        lines.append("")
    if "c" in seeds[0]:
        lines += ["(c) greedy held-out pass@1 in per cent, by seed, decoded in blocks of", ""]
        rates = {
            arm: [" / ".join(f"{100 * seed['c'][arm][str(b)][0]:.1f}" for seed in seeds) for b in DECODED_BLOCKS]
            for arm in seeds[0]["c"]
        }
        lines += table(("first half", *DECODED_BLOCKS), [(arm, *cells) for arm, cells in rates.items()])
    return "\n".join(lines) + "\n"


def draw(seeds: list[dict[str, Any]], to: Path) -> None:
    """One picture a claim: stages-a.svg, stages-b.svg, stages-c.svg."""
    plt = pyplot()
    if "a" in seeds[0]:
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
        for axis, objective in zip(axes, ("masked_diffusion", "block_diffusion"), strict=True):
            for colour, warmup in enumerate(("none", "warm-up")):
                for number, seed in enumerate(seeds):
                    norms = seed["a"][f"{objective}, {warmup}"]["grad_norm"]
                    axis.plot(norms, color=f"C{colour}", lw=0.8, label=None if number else warmup)
            axis.set(xlabel="step after the switch", ylabel="gradient norm", title=objective, yscale="log")
            axis.legend(frameon=False)
        save(figure, to.with_name(f"{to.stem}-a.svg"))
    if "b" in seeds[0]:
        figure, axes = plt.subplots(1, len(BLOCKS), figsize=(12, 3.6))
        for axis, block in zip(axes, BLOCKS, strict=True):
            for colour, noise in enumerate(NOISES):
                for number, seed in enumerate(seeds):
                    loss = seed["b"][f"{block}, {noise}"]["loss"]
                    label = None if number else noise
                    axis.plot([int(s) for s in loss], list(loss.values()), color=f"C{colour}", marker="o", label=label)
            axis.set(xlabel="step", ylabel="held-out loss, nats per token", title=f"blocks of {block}")
            axis.legend(frameon=False, title="clipped_noise")
        save(figure, to.with_name(f"{to.stem}-b.svg"))
    if "c" in seeds[0]:
        figure, axis = plt.subplots(figsize=(6, 3.6))
        for colour, arm in enumerate(CURRICULA):
            for number, seed in enumerate(seeds):
                rates = [100 * seed["c"][arm][str(block)][0] for block in DECODED_BLOCKS]
                axis.plot(
                    [str(b) for b in DECODED_BLOCKS], rates, "o-", color=f"C{colour}", label=None if number else arm
                )
        axis.set(xlabel="positions of a decoded block", ylabel="greedy pass@1, %")
        axis.legend(frameon=False, title="first half")
        save(figure, to.with_name(f"{to.stem}-c.svg"))


def save(figure: Any, to: Path) -> None:
    """Write a picture and print its path."""
    save_figure(figure, to)
    print(f"wrote {to}")


def main() -> None:
    parser = short_help(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all numbers of steps")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems per measurement")
    parser.add_argument("--out", type=Path, default=RESULTS / "stages.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = arguments.runs.resolve()
    seeds = []
    for seed in arguments.seeds:
        seeds.append(run_seed(seed, runs, arguments.claims, arguments.scale, arguments.problems))
        report = {
            "environment": environment(),
            "scale": arguments.scale,
            "problems": arguments.problems,
            "seeds": seeds,
        }
        write_report(report, arguments.out)
    print(tables(seeds))
    print(f"wrote {arguments.out}")
    draw_if_possible(draw, seeds, arguments.out)


if __name__ == "__main__":
    main()
